"""record, train and evaluate on a mesh with a context axis, against one without."""

import heldout_runs
import numpy as np
import pytest
import tiny
from tiny_run import record, train

from distill_jax import config
from distill_jax.commands.evaluate import run as evaluate
from distill_jax.records.store import open_store
from distill_jax.training.metric_writer import read_metrics


def spread(folder):
  c = tiny.tiny(folder)
  c.mesh.fsdp, c.mesh.tensor, c.mesh.context = 1, 2, 2
  return c


def compare_stores(one, two):
  """Offsets are drawn by row and position, so only a tie within rounding moves a sample."""
  a, b = open_store(one), open_store(two)
  assert len(a) == len(b) == 20
  moved = []
  for x, y in ((a[i], b[i]) for i in range(len(a))):
    assert x.keys() == y.keys()
    np.testing.assert_array_equal(x["tokens_T"], y["tokens_T"])
    for t in range(len(x["tokens_T"])):
      moved.append(abs(dense(x, t) - dense(y, t)).sum() / 2)
    for name in x.keys() - {"ids_TK", "weight_TK"}:  # float16 in the store
      np.testing.assert_allclose(x[name], y[name], rtol=1e-3, atol=1e-3, err_msg=name)
  assert max(moved) < 1.01 / a.manifest.n  # at most one sample of a position
  assert sum(m > 0 for m in moved) <= 3  # of 640 positions


def dense(row, t):
  """Returns the stored distribution of a position, [V]."""
  found = np.zeros(512)
  np.add.at(found, row["ids_TK"][t], row["weight_TK"][t])
  return found


@pytest.mark.slow
def test_record_and_train(tiny_run, tmp_path):
  c = spread(tiny_run)
  record(c, tmp_path / "records")
  compare_stores(tiny_run / "records", tmp_path / "records")
  train(c, tmp_path / "student")
  rows, want = tiny.measured(tmp_path / "student"), tiny.measured(tiny_run / "whole")
  assert len(rows) == len(want) == 6
  for a, b in zip(rows, want, strict=True):
    assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_features_and_held_out_text(tiny_run, tmp_path):
  """Recorded features have their positions on the third axis."""
  rows = {}
  for name, axes in (("one", {}), ("two", {"fsdp": 1, "tensor": 2, "context": 2})):
    c = heldout_runs.made(tmp_path / name)
    c.mesh.update(axes)
    c.records.taps = (0, 2)
    c.losses.hidden = config.loss("hidden", layers="0:0 2:2")
    c.train.records, c.train.steps = (str(tmp_path / name / "records"),), 2
    c.train.heldout, c.train.eval_every = (str(tmp_path / name / "records/heldout"),), 1
    c.evaluate.sequences, c.evaluate.batch_size = 4, 4
    c.evaluate.models = {"student": f"run:{tmp_path / name / 'student'}"}
    record(c, tmp_path / name / "records")
    train(c, tmp_path / name / "student")
    result = evaluate(config.resolve(c), tmp_path / name)["models"]["student"]
    result.pop("tokens_per_second")
    rows[name] = [*read_metrics(tmp_path / name / "student"), result]
  a, b = (open_store(tmp_path / name / "records")[3]["taps_PTD"] for name in rows)
  np.testing.assert_allclose(a, b, rtol=1e-3, atol=0.05)
  assert "heldout/loss" in rows["two"][0]
  for a, b in zip(rows["one"], rows["two"], strict=True):
    keys = a.keys() - tiny.CLOCK
    assert {k: a[k] for k in keys} == pytest.approx({k: b[k] for k in keys}, rel=1e-3, abs=1e-4)
