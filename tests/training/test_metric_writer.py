"""Tests of the metrics files."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from distill_jax.errors import InputError
from distill_jax.training.metric_writer import MetricsWriter, read_metrics


def events(folder):
  """(tag, step, value) of every scalar in the event files, read by their own framing.

  As TensorBoard does, it forgets the steps from each restart on.
  """
  from tensorboardX.proto.event_pb2 import Event

  found = []
  for path in sorted(folder.glob("events.*")):
    raw = path.read_bytes()
    while raw:  # length (8), its crc (4), the event, its crc (4)
      n = int.from_bytes(raw[:8], "little")
      event, raw = Event.FromString(raw[12 : 12 + n]), raw[16 + n :]
      if event.HasField("session_log"):
        assert event.session_log.status == event.session_log.START
        found = [f for f in found if f[1] < event.step]
      found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
  return found


def test_rows_and_events(tmp_path):
  with MetricsWriter(tmp_path / "run") as w:
    w.write(0, {"loss": 3.5, "lr": np.float32(0.25)})
    assert read_metrics(tmp_path / "run") == [{"step": 0, "loss": 3.5, "lr": 0.25}]  # at once
    w.write(2, {"loss": np.asarray(2.5)})
  rows = read_metrics(tmp_path / "run")
  assert rows == [{"step": 0, "loss": 3.5, "lr": 0.25}, {"step": 2, "loss": 2.5}]
  assert isinstance(rows[1]["step"], int) and isinstance(rows[1]["loss"], float)
  assert sorted(events(tmp_path / "run")) == [("loss", 0, 3.5), ("loss", 2, 2.5), ("lr", 0, 0.25)]


def test_nan_and_infinity_survive_strict_json(tmp_path):
  with MetricsWriter(tmp_path) as w:
    w.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e300})

  def refuse(name):
    raise AssertionError(f"{name} is not JSON")

  text = (tmp_path / "metrics.jsonl").read_text()
  assert json.loads(text, parse_constant=refuse)["a"] == "NaN" and "null" not in text
  (row,) = read_metrics(tmp_path)
  assert math.isnan(row["a"]) and (row["b"], row["c"], row["d"]) == (math.inf, -math.inf, 1e300)


def test_resuming_removes_rows_that_will_be_written_again(tmp_path):
  with MetricsWriter(tmp_path) as w:
    for step in range(10):
      w.write(step, {"loss": float(step)})
  with MetricsWriter(tmp_path, purge_step=6) as w:
    assert [r["step"] for r in read_metrics(tmp_path)] == list(range(6))
    for step in range(6, 9):
      w.write(step, {"loss": 100.0 + step})
  rows = read_metrics(tmp_path)
  assert [r["step"] for r in rows] == list(range(9))
  assert rows[5]["loss"] == 5 and rows[6]["loss"] == 106
  assert sorted(events(tmp_path)) == [("loss", r["step"], r["loss"]) for r in rows]
  with MetricsWriter(tmp_path) as w:  # without purge_step all rows are kept
    w.write(9, {"loss": 0.0})
  assert [r["step"] for r in read_metrics(tmp_path)] == list(range(10))
  assert not list(tmp_path.glob(".*"))


def test_an_incomplete_line_is_removed(tmp_path):
  with MetricsWriter(tmp_path) as w:
    w.write(0, {"loss": 1.0})
  path = tmp_path / "metrics.jsonl"
  whole = path.read_bytes()
  for half in (b'{"step": 1, "lo', b'{"step": 1}', b"\xff"):
    path.write_bytes(whole + half)
    assert read_metrics(tmp_path) == [{"step": 0, "loss": 1.0}]
    MetricsWriter(tmp_path).close()
    assert path.read_bytes() == whole


def test_a_killed_writer_leaves_its_rows(tmp_path):
  code = (
    "import os, signal; from distill_jax.training.metric_writer import MetricsWriter\n"
    f"w = MetricsWriter({str(tmp_path)!r})\n"
    "for i in range(5): w.write(i, {'loss': 0.5})\n"
    "os.kill(os.getpid(), signal.SIGKILL)"
  )
  assert subprocess.run([sys.executable, "-c", code]).returncode == -9
  assert [r["step"] for r in read_metrics(tmp_path)] == list(range(5))


def test_a_step_is_written_once(tmp_path):
  with MetricsWriter(tmp_path) as w:
    w.write(3, {"loss": 1.0})
    for step in (3, 2):
      with pytest.raises(ValueError, match="after step 3"):
        w.write(step, {"loss": 1.0})
  with MetricsWriter(tmp_path) as w, pytest.raises(ValueError, match="after step 3"):
    w.write(3, {"loss": 1.0})
  assert len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize(
  "line",
  [
    b"loss 3",
    b"[1]",
    b'{"loss": 1.0}',
    b'{"step": "x"}',
    b'{"step": 1, "loss": [1]}',
    b"",
    b'{"step": 1, "loss": null}',
  ],
)
def test_a_file_of_another_format_is_refused_and_kept(tmp_path, line):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"step": 0}\n' + line + b"\n")
  before = path.read_bytes()
  for use in (read_metrics, MetricsWriter):
    with pytest.raises(InputError, match="line 2"):
      use(tmp_path)
  assert path.read_bytes() == before


def test_a_missing_file_is_refused(tmp_path):
  with pytest.raises(InputError, match="does not exist"):
    read_metrics(tmp_path)
