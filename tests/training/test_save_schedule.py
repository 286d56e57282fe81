"""When checkpoints are saved: by steps and by minutes, on all processes at the same steps."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from distill_jax.errors import InputError
from distill_jax.training.metric_writer import read_metrics
from distill_jax.training.options import TrainOptions
from distill_jax.training.run_log import CLOCK
from distill_jax.training.save_schedule import SaveSchedule

ROOT = Path(__file__).parents[2]


def saved(options, seconds_per_step, start=0):
  """Returns the steps at which a run of this speed saves."""
  now = [0.0]
  schedule = SaveSchedule(options, start, clock=lambda: now[0])
  steps = []
  for step in range(start + 1, options.steps + 1):
    now[0] += seconds_per_step(step)
    if schedule.due(step, lambda: None):
      steps.append(step)
  return steps


def test_by_minutes_whatever_the_time_of_a_step():
  options = TrainOptions(steps=40, checkpoint_minutes=1)
  assert saved(options, lambda step: 53.0) == [*range(2, 41, 2)]
  assert saved(options, lambda step: 6.0) == [10, 20, 30, 40]
  assert saved(options, lambda step: 6.0, start=25) == [35, 40]
  compiles = lambda step: 120.0 if step == 1 else 6.0
  assert saved(options, compiles) == [1, 11, 21, 31, 40]
  fast = saved(TrainOptions(steps=200_000, checkpoint_minutes=10), lambda step: 0.01)
  assert fast[:3] == pytest.approx([60_000, 120_000, 180_000], abs=5)


def test_steps_that_become_slower_are_noticed_soon():
  options = TrainOptions(steps=10_000, checkpoint_minutes=10)
  first = saved(options, lambda step: 0.01 if step < 3000 else 1.0)[0]
  assert 3000 + 570 <= first <= 3000 + 570 + 1000


def test_by_steps_and_at_the_end():
  options = TrainOptions(steps=10, checkpoint_minutes=0, checkpoint_every=4, keep_every=3)
  assert saved(options, lambda step: 1e6) == [3, 4, 6, 8, 9, 10]
  assert saved(TrainOptions(steps=10, checkpoint_minutes=0), lambda step: 1e6) == [10]


def test_negative_intervals_are_refused():
  with pytest.raises(InputError, match="train.checkpoint_minutes is -1"):
    TrainOptions(checkpoint_minutes=-1)
  with pytest.raises(InputError, match="train.checkpoint_every is -5"):
    TrainOptions(checkpoint_every=-5)
  with pytest.raises(InputError, match="train.keep is 0; expected at least 1"):
    TrainOptions(keep=0)  # all checkpoints would be deleted


CLOCKS = """
import itertools, sys
from distill_jax.training import loop, save_schedule
of_process_0 = any(arg.endswith(",2,0") for arg in sys.argv)
ticks = itertools.count(step=7.0) if of_process_0 else itertools.count(step=1e5)
Schedule = save_schedule.SaveSchedule
loop.SaveSchedule = lambda options, start: Schedule(options, start, lambda: next(ticks))
"""


@pytest.mark.slow
def test_only_the_clock_of_process_0_counts(tiny_run, tmp_path):
  """A clock of process 1 that passes a day per step changes neither steps nor losses."""
  changes = [
    'c.teacher.source = ""',
    "c.train.steps, c.train.checkpoint_every, c.train.keep = 12, 0, 12",
    "c.train.checkpoint_minutes = 0.5",
  ]
  config = tiny.write_config(tmp_path / "config.py", tiny_run, *changes)
  config.write_text(CLOCKS + config.read_text())
  line = [sys.executable, "launch/local.py", "--processes=2", "--devices=1", "--", "train"]
  rows = []
  for minutes in (0.5, 0.0):
    workdir = tmp_path / f"run{minutes}"
    where = [f"--config={config}", f"--workdir={workdir}"]
    flags = [f"--config.train.checkpoint_minutes={minutes}"]
    done = subprocess.run(
      [*line, *where, *flags], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    saves = sorted(int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*"))
    # The clock of process 0 advances 7 seconds at each decision and at each save.
    assert saves == ([5, 10, 12] if minutes else [12])
    rows.append([{k: v for k, v in row.items() if k not in CLOCK} for row in read_metrics(workdir)])
  assert rows[0] == rows[1]
  assert len(rows[0]) == 12
