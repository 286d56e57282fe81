"""Evaluation is the training step without gradients, for every kind of run.

The held-out store has the rows of the training store, in shards of another size, and a batch of
training has all of them. The evaluation after step n - 1 therefore has the losses of step n.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import tiny_image_text
from json_lines import write_lines
from tiny_run import record, train

from distill_jax import config
from distill_jax.training import validate_heldout
from distill_jax.training.metric_writer import read_metrics

ROOT = Path(__file__).parents[2]


def made(folder, records="records"):
  c = tiny.tiny(folder)
  c.teacher.source = ""
  c.data.sequences = 4
  c.train.records, c.train.heldout = ((str(folder / f"{n}{records}"),) for n in ("", "same-"))
  c.train.steps, c.train.eval_every = 2, 1
  return c


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Returns a folder with stores of four rows and features, twice for each of two teachers."""
  path = tmp_path_factory.mktemp("kinds")
  for seed, name in enumerate(("records", "other")):
    for rows, prefix in ((6, ""), (2, "same-")):
      c = made(path)
      c.seed = seed
      c.records.tokens_per_shard = rows * tiny.SEQ_LEN
      c.records.taps = (1,)
      record(c, path / f"{prefix}{name}")
  return path


def online(c, _):
  c.train.online = True
  c.losses.soft = config.loss("kd", temperature=2.0)


def several_teachers(c, folder):
  c.train.teachers = {"other": (str(folder / "other"),)}
  c.train.heldout_teachers = {"other": (str(folder / "same-other"),)}
  c.losses.soft = config.loss("mixture", teachers=("teacher", "other"), by="label")


def features(c, _):
  c.losses.hidden = config.loss("hidden", layers="0:1")


def accumulated(c, _):
  c.optim.accumulate = 2  # two batches of two rows
  c.mesh.fsdp, c.mesh.tensor = 2, 2


def adapters(c, folder):
  c.student.source, c.student.train = f"run:{folder / 'base'}", "lora"
  c.student.lora.rank = 2


KINDS = (online, several_teachers, features, accumulated, adapters)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_has_the_losses_of_the_next_step(folder, tmp_path, kind, monkeypatch):
  # Runs refuse to evaluate the rows that they are trained on.
  monkeypatch.setattr(validate_heldout, "_check_disjoint", lambda *_: None)
  c = made(folder)
  if kind is adapters and not (folder / "base").exists():
    train(made(folder), folder / "base")
  kind(c, folder)
  train(c, tmp_path)
  first, second = read_metrics(tmp_path)
  values = {k.removeprefix("heldout/"): v for k, v in first.items() if k.startswith("heldout/")}
  assert values.keys() >= {"loss", "ce", *c.losses} and values["tokens"] == 124
  for name, value in values.items():
    # The rows are in another order: sums of float32 in another order.
    assert value == pytest.approx(second[name], rel=1e-5, abs=1e-6), name


@pytest.mark.slow
def test_kills_at_any_moment_change_no_row(folder, tmp_path):
  """A process is killed with -9 at several moments; the finished run has the same rows."""
  c = made(folder)
  other = made(folder)
  other.data.path, other.records.taps = str(tmp_path / "other.txt"), (1,)
  Path(other.data.path).write_text("\n".join(reversed(tiny.sentences())))
  record(other, tmp_path / "heldout")
  c.train.heldout = (str(tmp_path / "heldout"),)
  c.train.steps, c.train.checkpoint_every, c.train.keep = 12, 3, 1
  c.train.eval_every, c.train.best_metric = 2, "heldout/loss"
  train(c, tmp_path / "whole")
  resolved = config.resolve(c)
  file = tmp_path / "job.json"
  job = [["train", str(tmp_path / "killed"), config.to_dict(resolved)]]
  file.write_text(json.dumps(job))
  env = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
  line = [sys.executable, str(ROOT / "tests" / "mesh_worker.py"), str(file), "", ""]
  rows = tmp_path / "killed" / "metrics.jsonl"
  for after in (1, 4, 7, 10):  # rows that are written when the process is killed
    with subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
      deadline = time.monotonic() + 200
      while not rows.exists() or rows.read_bytes().count(b"\n") < after:
        assert run.poll() is None and time.monotonic() < deadline, run.stderr.read()[-2000:]
        time.sleep(0.002)
      run.send_signal(signal.SIGKILL)
  result = train(c, tmp_path / "killed")
  assert tiny.measured(tmp_path / "whole") == tiny.measured(tmp_path / "killed")
  whole = train(c, tmp_path / "whole")
  assert [result[k] for k in ("best_step", "best_value")] == [
    whole[k] for k in ("best_step", "best_value")
  ]


def classes(folder):
  """Returns a config of a task with 12 training and 5 held-out rows of records."""
  c = config.base()
  for model in (c.teacher, c.student):
    model.family, model.shape, model.changes = "bert", "tiny", {"num_hidden_layers": 1}
  lines = [{"text": f"number {i}", "label": "even" if i % 2 == 0 else "odd"} for i in range(40)]
  c.tasks.parity = config.task(
    "text_classes",
    path=str(write_lines(folder / "numbers.jsonl", lines)),
    classes=("odd", "even"),
    max_tokens=32,
    heldout_fraction=0.3,
    tokenizer=str(tiny.write_tokenizer(folder / "tokenizer.json")),
  )
  c.records.kind, c.records.batch_size, c.records.heldout_sequences = "dense", 4, 5
  c.losses.soft, c.losses.hard = config.loss("kd"), config.loss("ce")
  c.train.records, c.train.heldout = ((str(folder / f"records{n}"),) for n in ("", "/heldout"))
  c.train.steps, c.train.batch_size, c.train.eval_every = 2, 4, 1
  return c


@pytest.mark.slow
def test_tasks_are_evaluated_on_records_or_on_their_own_examples(tmp_path):
  c = classes(tmp_path)
  record(c, tmp_path / "records")
  result = train(c, tmp_path / "recorded")
  assert result["heldout/tokens"] == 5 and result["heldout/soft"] > 0
  del c.losses.soft
  c.train.records = c.train.heldout = ()
  result = train(c, tmp_path / "labels")
  heldout = result["heldout/tokens"]
  assert 5 < heldout < 20 and result["heldout/loss"] == result["heldout/hard"]
  c = tiny_image_text.configured(tmp_path)  # contrastive: rows are compared in whole batches
  c.tasks.pairs.heldout_fraction = 0.7
  c.train.online, c.train.eval_every = True, 1
  c.losses.soft = config.loss("kd")
  result = train(c, tmp_path / "pairs")
  assert result["heldout/tokens"] % 8 == 0 and result["heldout/loss"] > 0
