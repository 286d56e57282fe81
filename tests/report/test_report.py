"""The report: its numbers and headline against arithmetic, and the HTML of the page."""

import copy
import json
import math
import re

import pytest
from html_pages import Page
from json_lines import read_lines, write_lines

from distill_jax.errors import InputError
from distill_jax.report.html_report import write_report
from distill_jax.report.results import gaps, headline, summary
from distill_jax.training.metric_writer import MetricsWriter

pytestmark = pytest.mark.smoke


def model(ce, kl, agreement, parameters=1_000, speed=100.0):
  return {
    "ce": ce,
    "perplexity": math.exp(ce),
    "kl": kl,
    "agreement": agreement,
    "entropy": 2.5,
    "parameters": parameters,
    "bytes": 4 * parameters,
    "tokens_per_second": speed,
  }


EVALUATION = {
  "models": {
    "teacher": model(3.0, 0.0, 1.0, 134_515_008, 410.0),
    "start": model(7.6, 5.0, 0.08, 70_805_952, 812.0),
    "hard": model(4.0, 1.25, 0.487, 70_805_952, 820.0),
    "distilled": model(3.8, 0.75, 0.5625, 70_805_952, 816.0),
  },
  "tokens": 6753,
  "corpus": "Python's reference",
}
RECORDS = {
  "kind": "sampled",
  "n": 63,
  "bytes_per_token": 64.0,
  "entries_per_target": 17.25,
  "vocab_size": 49152,
}


def changed(**models):
  """Returns EVALUATION with numbers of models replaced; None removes a model."""
  out = copy.deepcopy(EVALUATION)
  for name, numbers in models.items():
    if numbers is None:
      del out["models"][name]
    else:
      out["models"][name].update(numbers)
  return out


@pytest.fixture
def workdir(tmp_path):
  for name, end in (("distilled", 3.5), ("hard", 3.9)):
    with MetricsWriter(tmp_path / name) as w:
      for step in range(40):
        w.write(step, {"loss": 1.0, "ce": end + 1 / (1 + step), "kl/teacher": end - 3})
    config = {"optim": {"peak_lr": 3e-4}, "text": "</pre><script>"}
    (tmp_path / name / "config.json").write_text(json.dumps(config))
    versions = {
      "command": ["/venv/bin/distill-jax", "train", f"--workdir=a b/{name}"],
      "python": "3.11.7",
      "git": "92b2f46c2c8e-dirty",
      "platform": "Linux",
      "started": f"2026-11-24T1{len(name)}:00",
      "packages": {"jax": "0.10.2"},
    }
    (tmp_path / name / "versions.json").write_text(json.dumps(versions))
  (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
  return tmp_path


def render(workdir, evaluation=EVALUATION, **more):
  numbers = write_report(workdir, evaluation, **more)
  return Page((workdir / "report.html").read_text()), numbers


def test_the_numbers_are_on_the_page(workdir):
  numbers = write_report(workdir, records=RECORDS, export_dir="out/export")
  page = Page((workdir / "report.html").read_text())
  assert page.row("Cross-entropy")[2:] == ["3.000", "7.600", "4.000", "3.800"]
  assert page.row("Perplexity")[2:] == ["20.09", "1,998", "54.60", "44.70"]
  assert page.row("KL to the teacher")[2:] == ["0.000", "5.000", "1.250", "0.750"]
  assert page.row("Top-1 agreement")[2:] == ["100.0%", "8.0%", "48.7%", "56.2%"]
  assert page.row("Parameters")[1:] == ["134.5 M", "70.8 M", "70.8 M", "70.8 M"]
  assert page.row("Size")[2:] == ["538.1 MB", "283.2 MB", "283.2 MB", "283.2 MB"]
  assert page.row("Tokens per second")[2:] == ["410", "812", "820", "816"]
  assert page.row("These records") == ["These records", "64.0", "1.0×"]
  assert [r[1:] for r in page.rows if "Top 64" in r[:1][0]] == [["512.0", "8.0×"]]
  assert [r[1:] for r in page.rows if "49,152" in r[:1][0]] == [["196,608", "3,072.0×"]]
  words = " ".join(page.words)
  for part in (
    "6,753 held-out tokens of Python's reference",
    "40.0%",
    "20.0%",
    "85.0%",
    "17.2 entries per target",
    "out/export",
    "92b2f46c2c8e-dirty",
    "jax 0.10.2",
    "40 steps",
    "0.53×",
    "1.99×",
    "distill-jax train '--workdir=a b/hard'",
    '"peak_lr": 0.0003',
  ):
    assert part in words, part
  assert words.index("a b/hard'") < words.index("a b/distilled'")  # in the order they were started
  assert numbers == summary(EVALUATION, RECORDS, "out/export")


def test_the_name_of_the_corpus(workdir):
  page, _ = render(workdir, changed() | {"corpus": "pydoc  heldout"})
  assert "Evaluated on 6,753 held-out tokens of pydoc." in page.words


def test_the_page_is_small_and_loads_no_other_resource(workdir):
  render(workdir, records=RECORDS)
  text = (workdir / "report.html").read_text()
  for tag, attrs in Page(text).tags:
    assert tag not in ("script", "link", "img", "iframe", "object", "base")
    assert not {"src", "href", "xlink:href", "srcset", "data", "action"} & attrs.keys()
    assert not any(k.startswith("on") for k in attrs)
  assert not re.search(r"https?:|url\(|@import|//\w", text)
  assert len(text) < 60_000
  assert "prefers-color-scheme: dark" in text and "tabular-nums" in text
  assert [p.name for p in workdir.glob(".*")] == []


def test_curves_show_the_metrics_of_the_runs(workdir):
  page, _ = render(workdir)
  paths = [a for t, a in page.tags if t == "path"]
  assert [p["class"] for p in paths] == [
    "raw hard",
    "mean hard",
    "raw distilled",
    "mean distilled",
  ] * 3  # ce, kl/teacher, loss
  # From 4.9 at step 0 to 3.925 at step 39 on an axis from 3.5 to 5, 1000 high and wide.
  points = [tuple(map(float, p.split())) for p in re.split("[ML]", paths[0]["d"])[1:]]
  assert len(points) == 40
  assert points[0] == pytest.approx((0, 1000 * (5 - 4.9) / 1.5), abs=0.06)
  assert points[-1] == pytest.approx((1000, 1000 * (5 - 3.925) / 1.5), abs=0.06)


def test_summary():
  got = summary(EVALUATION, RECORDS, "out/export")
  assert got["distilled"] == {"ce": 3.8, "kl": 0.75, "agreement": 0.5625}
  assert got["teacher"] == {"ce": 3.0, "kl": 0.0, "agreement": 1.0}
  assert got["hard"]["ce"] == 4.0 and got["start"]["kl"] == 5.0
  assert got["gap_closed"] == pytest.approx(0.4) and got["gap_closed_ce"] == pytest.approx(0.2)
  assert got["bytes_per_token"] == 64.0 and got["export_dir"] == "out/export"
  assert summary(EVALUATION)["bytes_per_token"] is None
  broken = summary(changed(distilled={"kl": math.nan}, hard=None))
  assert broken["distilled"]["kl"] == "NaN" and broken["hard"]["kl"] is None
  assert broken["gap_closed"] is None
  json.dumps(broken, allow_nan=False)


@pytest.mark.parametrize(
  "ours, says, not_says",
  [
    ({"kl": 0.75, "ce": 3.8}, ["closer", "0.750 vs. 1.250", "40.0%", "lower"], ["farther"]),
    ({"kl": 0.75, "ce": 4.5}, ["closer", "cross-entropy is higher (4.500 vs. 4.000)"], ["lower"]),
    ({"kl": 0.75, "ce": 4.001}, ["closer", "the same within 1%"], ["lower", "higher"]),
    ({"kl": 1.255}, ["as close to", "1.255 vs. 1.250"], ["closer", "farther"]),
    ({"kl": 1.4}, ["farther", "1.400 vs. 1.250"], ["closer", "closed"]),
    ({"kl": math.nan}, ["cannot be compared", "NaN for the distilled"], ["closer", "farther"]),
    ({"kl": None}, ["cannot be compared", "not measured: Distilled"], ["closer", "farther"]),
    ({"kl": 0.75, "ce": math.nan}, ["closer", "cross-entropy is NaN"], ["lower", "higher"]),
  ],
)
def test_the_headline_agrees_with_the_numbers(ours, says, not_says):
  sentence = headline(changed(distilled=ours))
  assert all(s in sentence for s in says) and not any(s in sentence for s in not_says), sentence


def test_the_headline_without_a_hard_label_student(workdir):
  assert headline(changed(hard=None)) == (
    "Distillation has lowered the student's KL to the teacher from 5.000 to 0.750 nats per token "
    "(85.0% of the gap closed)."
  )
  raised = headline(changed(hard=None, distilled={"kl": 6.0}))
  assert raised.endswith(
    "has raised the student's KL to the teacher from 5.000 to 6.000 nats per token."
  )
  page, _ = render(workdir, changed(hard=None), records=RECORDS)
  assert "of the KL gap to the teacher closed, compared with before training" in page.words
  assert page.row("Cross-entropy")[2:] == ["3.000", "7.600", "3.800"]
  assert not [w for w in page.words if "compared with hard labels" in w or w == "not measured"]


def test_undefined_gaps():
  kl, ce, start = gaps(EVALUATION)
  assert [g.share for g in (kl, ce, start)] == pytest.approx([0.4, 0.2, 0.85])
  _, ce, _ = gaps(changed(hard={"ce": 2.9}))
  assert ce.share is None and "no gap to close" in ce.why
  kl, _, _ = gaps(changed(hard={"kl": 0.0}))
  assert kl.share is None and "no gap to close" in kl.why
  kl, ce, _ = gaps(changed(distilled={"kl": 1.5, "ce": 2.5}))
  assert kl.share == pytest.approx(-0.2) and ce.share == pytest.approx(1.5)
  _, _, start = gaps(changed(start=None))
  assert start.share is None and "Before training" in start.why


def test_nan_and_missing_are_shown(workdir):
  page, _ = render(workdir, changed(distilled={"ce": math.nan, "kl": math.inf}, start=None))
  assert page.row("Cross-entropy")[2:] == ["3.000", "not measured", "4.000", "NaN"]
  assert page.row("KL to the teacher")[2:] == ["0.000", "not measured", "1.250", "infinite"]
  assert page.row("Parameters")[2] == "not measured"
  words = " ".join(page.words)
  assert "a number is NaN or infinite" in words and "The students cannot be compared" in words
  assert "The size of the records was not measured." in words
  dots = [a for t, a in page.tags if "left" in a.get("style", "") and "dot" in a.get("class", "")]
  assert len(dots) == 3 * 4 - 3 - 2  # missing numbers have no dot


def test_nan_in_a_curve_is_a_gap_and_is_counted(workdir):
  path = workdir / "hard" / "metrics.jsonl"
  rows = read_lines(path)
  for row in rows[10:13]:
    row["ce"] = "NaN"
  write_lines(path, rows)
  page, _ = render(workdir)
  raw = next(a for t, a in page.tags if t == "path")
  assert raw["d"].count("M") == 2 and "nan" not in raw["d"].lower()
  assert "3 values are NaN or infinite" in " ".join(page.words)


def test_runs_without_known_metrics_and_missing_runs(workdir, tmp_path):
  page, _ = render(workdir, runs={})
  assert "There are no training curves" in " ".join(page.words)
  for name in ("hard", "distilled"):
    (workdir / name / "metrics.jsonl").write_text('{"step": 0, "other": 1.0}\n')
  page, _ = render(workdir)
  assert "The runs have no metric that can be drawn." in page.words
  page, _ = render(workdir, runs={"hard": tmp_path / "gone"})
  assert "has not begun" in page.words


def test_names_are_escaped_and_other_models_are_shown(workdir):
  evaluation = changed()
  evaluation["models"]["<b>seed 2"] = {"ce": 3.7}
  evaluation["corpus"] = "<script>alert(1)</script>"
  page, _ = render(workdir, evaluation)
  assert "<b>seed 2" in page.words and not [t for t, _ in page.tags if t == "script"]
  assert page.row("Cross-entropy")[-1] == "3.700" and page.row("Size")[-1] == "not measured"


def test_bad_evaluations_raise(workdir):
  for evaluation, says in [
    ({"tokens": 3}, "has \\['tokens'\\] but no models"),
    (changed(hard={"agreement": 48.7}), "hard.agreement is 48.7; expected a number from 0 to 1"),
  ]:
    with pytest.raises(InputError, match=says):
      write_report(workdir, evaluation)
  (workdir / "evaluation.json").write_text("{")
  with pytest.raises(InputError, match="evaluation.json is not JSON"):
    write_report(workdir)
  (workdir / "evaluation.json").unlink()
  with pytest.raises(InputError, match=r"has no evaluation.json, and none of its runs \(gone\)"):
    write_report(workdir, runs={"gone": workdir / "gone"})
  assert not (workdir / "report.html").exists()
