"""Tests of the log of a run: times, the profile and preemption."""

import os
import signal
import time

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import multihost_utils

from distill_jax.errors import InputError, Preempted
from distill_jax.runtime import distributed
from distill_jax.training import run_log
from distill_jax.training.metric_writer import read_metrics
from distill_jax.training.run_log import Log, Profile

pytestmark = pytest.mark.smoke


def test_goodput_is_the_share_of_time_in_steps(tmp_path, monkeypatch):
  """Steps take 2 s; compiling takes 10 s before the first, saving 4 s after the third."""
  times = iter([110.0, 112.0, 114.0, 118.0, 120.0])  # row, row, row, saved, row
  metrics = {name: jnp.float32(x) for name, x in (("loss", 1), ("grad_norm", 1), ("tokens", 64))}
  monkeypatch.setattr(run_log, "Progress", lambda *_, **__: Silent())
  with Log(tmp_path, 0, 4, 100.0, lambda: next(times)) as it:
    it.saved()  # before the first step, of a round
    for n in range(3):
      it.step(n, metrics)
    it.flush()
    it.saved()
    it.step(3, metrics)
    it.flush()
  rows = read_metrics(tmp_path)
  assert [r["step"] for r in rows] == [0, 1, 2, 3]
  assert [r["step_seconds"] for r in rows] == [0, 2, 2, 2]
  assert [r["tokens_per_second"] for r in rows] == [0, 32, 32, 32]
  assert [r["goodput"] for r in rows] == [0, 2 / 12, 4 / 14, 6 / 20]


class Silent:
  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def begin(self, doing):
    pass

  def add(self, *_, **__):
    pass


@pytest.mark.parametrize("name, value", [("loss", jnp.nan), ("grad_norm", jnp.inf)])
def test_a_loss_or_gradient_that_is_not_finite_writes_no_row(tmp_path, name, value):
  metrics = dict.fromkeys(("loss", "grad_norm", "tokens"), jnp.float32(1))
  with (
    pytest.raises(FloatingPointError, match=f"{name} of step 0 is {value}"),
    Log(tmp_path, 0, 2, time.monotonic()) as it,
  ):
    it.step(0, metrics | {name: jnp.float32(value)})
    it.flush()
  assert read_metrics(tmp_path) == []


def test_the_requested_steps_are_profiled(tmp_path):
  profile = Profile("1:3", tmp_path)
  for n in range(4):
    profile.step(n)
    jax.block_until_ready(jnp.ones(8) + n)
    assert profile._running == (1 <= n < 3)
  assert list(tmp_path.rglob("*.xplane.pb"))


@pytest.mark.parametrize("steps", ["3", "a:b", "3:3", "-1:2", "5:2"])
def test_invalid_profile_steps_are_refused(tmp_path, steps):
  with pytest.raises(InputError, match="profile_steps is .*; expected FIRST:END"):
    Profile(steps, tmp_path)


def test_sigterm_is_caught_and_the_old_handler_is_restored():
  before = signal.getsignal(signal.SIGTERM)
  with distributed.Preemption() as preemption:
    assert not preemption.reached()
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.reached() and preemption.reached()
  assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_at_the_end_of_one_work_stops_the_command_before_the_next():
  check = lambda: distributed.Preemption.check_late("distill", "finished stages are kept")
  with distributed.Preemption():
    signal.raise_signal(signal.SIGTERM)  # after the last check
  with pytest.raises(Preempted, match="distill received SIGTERM; finished stages are kept"):
    check()
  with pytest.raises(Preempted), distributed.Preemption() as stopped:
    signal.raise_signal(signal.SIGTERM)
    raise stopped.stop("train", "step 3 is saved")
  check()


def test_sigterm_stops_sampling_in_training_but_not_its_evaluation():
  with distributed.Preemption() as outer:
    with distributed.Preemption() as inner:
      signal.raise_signal(signal.SIGTERM)
      with distributed.Preemption.deferred():
        assert not inner.reached() and not outer.reached()
      assert inner.reached()
    with distributed.Preemption() as another:
      assert another.reached()
    assert outer.reached()
  with distributed.Preemption() as later:
    distributed.Preemption.request()
    assert later.reached()


def test_processes_that_stop_at_the_end_of_scoring_stop_training_too(monkeypatch):
  """Jax tells each process once, at the same check, e.g. that of the last batch of a round."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with distributed.Preemption() as outer:
    at = distributed.Preemption._checks + 2
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda n: n == at)
    with distributed.Preemption() as inner:
      assert not inner.reached() and inner.reached()
    assert outer.reached()
