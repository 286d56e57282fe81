"""The curves of the report, and the page of a run that is going."""

import datetime
import json
import math
import re
import sys

import numpy as np
import pytest
from html_pages import Page

from distill_jax import cli, config
from distill_jax.report import axis, curves
from distill_jax.report.html_report import write_report
from distill_jax.report.runs import ReportedRun, duration, progress
from distill_jax.runtime.workdir import Workdir
from distill_jax.training.metric_writer import MetricsWriter

pytestmark = pytest.mark.smoke

NOW = datetime.datetime(2026, 11, 28, 21, 40, tzinfo=datetime.UTC)
CONFIG = {"train": {"steps": 1000}, "losses": {"soft": {"loss": "kd"}}}


def rows(n, **metrics):
  """Returns n rows with constants, or with functions of the step."""
  of = lambda x, step: x(step) if callable(x) else x
  return [{"step": i} | {k: of(x, i) for k, x in metrics.items()} for i in range(n)]


def going(folder, n=320):
  """Writes a run of 1,000 steps that is at step n."""
  with MetricsWriter(folder) as writer:
    for row in rows(n, loss=1.0, ce=lambda i: 4 - i / 500, step_seconds=3.0):
      writer.write(row.pop("step"), row)
  (folder / "config.json").write_text(json.dumps(CONFIG))


def panels(runs):
  """Returns the sections of curves: {title of a panel: (its note, its paths)}, by section."""
  found = {}
  for title, html in curves.sections({}, runs):
    found[title] = {}
    for part in html.split("<figure>")[1:]:
      name, note = re.match("<figcaption>(.*?)<small>(.*?)</small>", part).groups()
      found[title][name] = note, re.findall(' d="(.*?)"', part)
  return found


def points(d):
  return np.array([tuple(map(float, p.split())) for p in re.split("[ML]", d)[1:]])


def test_a_run_that_is_going_is_shown_so_far(tmp_path):
  going(tmp_path / "distilled")
  runs = {name: tmp_path / name for name in ("distilled", "hard")}
  numbers = write_report(tmp_path, runs=runs, now=NOW)
  page = Page((tmp_path / "report.html").read_text())
  words = " ".join(page.words)
  assert "Distilled: step 320 of 1,000, about 34 min left at its speed" in page.words
  assert "As of 2026-11-28 21:40 UTC." in words and "not measured yet" in words
  assert "32.0%" in page.words and "has not begun" in page.words
  assert "Held-out results" not in page.words and numbers["distilled"]["ce"] is None
  assert "Cross-entropy" in page.words


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_the_command_reads_a_workdir_that_is_in_use(tmp_path, monkeypatch, scheme):
  """The run in train/ of `distill` goes on, which holds the lock of the whole workdir."""
  going(tmp_path / "run" / "train")
  file = tmp_path / "c.py"
  source = f"run:{scheme}{tmp_path}/run/train"
  file.write_text(
    "from distill_jax import config\ndef get_config():\n  c = config.base()\n"
    f"  c.train.records = ('{tmp_path}/records',)\n"
    f"  c.evaluate.models = {{'distilled': '{source}'}}\n  return c\n"
  )
  monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path / "cache"))
  argv = ["distill-jax", "report", f"--config={file}", f"--workdir={scheme}{tmp_path}/run"]
  monkeypatch.setattr(sys, "argv", argv)
  with Workdir(tmp_path / "run", config.resolve(config.base())):
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    cli.main(argv)
    after = sorted(p.name for p in (tmp_path / "run").iterdir())
  assert after == sorted([*before, "report.html"])
  words = " ".join(Page((tmp_path / "run" / "report.html").read_text()).words)
  assert "step 320 of 1,000" in words and f"{tmp_path}/records" in words


def test_progress_and_evaluation_together(tmp_path):
  """A finished evaluation of an earlier checkpoint, and a run that goes on."""
  going(tmp_path / "distilled")
  model = {"ce": 3.0, "kl": 1.0, "agreement": 0.5}
  evaluation = {"models": {"teacher": model, "distilled": model}, "tokens": 5, "corpus": "c"}
  write_report(tmp_path, evaluation, now=NOW)
  words = " ".join(Page((tmp_path / "report.html").read_text()).words)
  assert "Held-out results" in words and "As of 2026-11-28" in words and "step 320" in words


def test_each_metric_has_its_panel():
  found = panels(
    {
      "distilled": ReportedRun(
        rows(
          40,
          **{
            "loss": 1.0,
            "ce": 3.0,
            "kl_at_2/big": 0.5,
            "soft": 0.5,
            "weight/soft": 0.9,
            "ramp": 2.0,
            "weight/ramp": lambda i: i / 40,
            "grad_norm": 1.0,
            "learning_rate": 1e-3,
            "goodput": lambda i: 0.9 if i % 20 else 0.0,
            "tokens_per_second": lambda i: 5e4 if i % 20 else 0.0,
          },
        ),
        CONFIG,
        {},
      ),
      "hard": ReportedRun(rows(4, ce=3.0, **{"heldout/ce": lambda i: 3 - i}), {}, {}),
    }
  )
  training = found["Training"]
  assert list(training) == [
    "Cross-entropy",
    "KL to big at temperature 2",
    "Loss soft",
    "Loss ramp",
    "Loss",
    "Weight of ramp",
  ]
  assert training["Loss soft"][0] == "kd weight 0.9"
  assert training["Loss ramp"][0] == "weight varies"
  held_out = found["Held-out data during training"]
  assert list(held_out) == ["Cross-entropy"]
  # One x axis for all panels: it ends at step 39, the last one of any run.
  assert points(held_out["Cross-entropy"][1][0])[-1] == pytest.approx(
    (1000 * 3 / 39, 1000), abs=0.06
  )
  speed = found["Optimisation and speed"]
  assert list(speed) == ["Learning rate", "Gradient norm", "Tokens per second", "Goodput"]
  assert len(points(speed["Goodput"][1][0])) == 38  # without the first rows of two processes


def test_long_runs_stay_small_and_keep_their_spikes(tmp_path):
  n = 20_000
  noise = np.random.default_rng(0).normal(size=n)
  noise[777], noise[9_001] = 40.0, math.nan
  run = ReportedRun(rows(n, ce=lambda i: noise[i]), {}, {})
  note, (raw, mean) = panels({"distilled": run})["Training"]["Cross-entropy"]
  assert len(raw) + len(mean) < 4_000 and "1 values are NaN" in note
  assert raw.count("M") == 2 and "nan" not in raw
  assert points(raw)[:, 1].min() == 0  # the spike is at the top of the axis
  at = points(mean)
  expected = np.convolve(np.nan_to_num(noise), np.ones(1000) / 1000, "valid")
  lo, hi, _ = axis.axis([np.nanmin(noise), 40.0], 3)
  first = 1000 * (hi - expected[(n - 1000) % 191]) / (hi - lo)
  assert at[0, 1] == pytest.approx(first, abs=0.06) and len(at) <= curves.BUCKETS


def test_a_single_value_is_a_dot():
  run = ReportedRun([{"step": 0, "ce": 1.0}, {"step": 9, "ce": 2.0, "heldout/ce": 1.5}], {}, {})
  _, (path,) = panels({"hard": run})["Held-out data during training"]["Cross-entropy"]
  assert path == "M1000.0 500.0h0"


@pytest.mark.parametrize(
  "values, n, ticks",
  [
    ([0.0, 63.0], 4, ["0", "20", "40", "60", "80"]),
    ([0.0, 0.001], 2, ["0", "5e-4", "1e-3"]),
    ([3.0, 3.0], 2, ["0", "2", "4", "6"]),
    ([0.0, 24_000.0], 3, ["0", "10k", "20k", "30k"]),
    ([0.0, 0.0], 2, ["-0.5", "0", "0.5"]),
  ],
)
def test_ticks_are_round(values, n, ticks):
  _, high, found = axis.axis(values, n)
  assert [axis.label(t, high) for t in found] == ticks


def test_a_run_that_patience_has_ended_is_finished():
  config = {"train": {"steps": 1000, "best_metric": "heldout/loss", "patience": 2}}
  found = [{"step": 9, "heldout/loss": 2.0}, {"step": 19, "heldout/loss": 1.0}]
  worse = [{"step": 29, "heldout/loss": 1.5}, {"step": 39, "heldout/loss": 1.2}]
  assert not ReportedRun(found + worse[:1], config, {}).is_finished
  run = ReportedRun(found + worse, config, {})
  assert run.is_finished
  assert progress(run) == "stopped early after step 40 of 1,000; the best one was step 20"


def test_durations():
  texts = [duration(s) for s in (0.5, 40, 150, 7_000, 12_600, 400_000)]
  assert texts == ["0.5 s", "40 s", "2.5 min", "117 min", "3.5 h", "4.6 days"]
