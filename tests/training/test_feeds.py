"""Feeds whose batches need servers: `train` asks them in time, and saves when they are gone."""

import functools

import pytest
import tiny

from distill_jax import config
from distill_jax.errors import Unavailable
from distill_jax.runtime import checkpoint
from distill_jax.training import loop
from distill_jax.training.feed import StoredFeed


class ServedFeed(StoredFeed):
  """The stored batches, with servers that are gone before step 3 or, with `fails`, always."""

  def __init__(self, config, *args, fails):
    super().__init__(config, *args)
    self.fails = fails

  def check_servers(self):
    if self.fails:
      raise Unavailable("The server does not answer.")

  def due(self, step):
    return step == 3

  def begin(self, step, state):
    raise Unavailable("The server is gone.")


def test_a_server_that_is_gone_ends_a_run_with_its_state_saved(tiny_run, tmp_path):
  c = tiny.tiny(tiny_run)
  c.train.checkpoint_every = 0
  c, run = config.resolve(c), tmp_path / "run"

  def train(feed=None, **kwargs):
    loop.train(c, run, open_feed=feed and functools.partial(feed, c, **kwargs))

  with pytest.raises(Unavailable, match="does not answer"):
    train(ServedFeed, fails=True)
  with pytest.raises(Unavailable, match="is gone"):
    train(ServedFeed, fails=False)
  assert [p.name for p in (run / "checkpoints").glob("[0-9]*")] == ["3"]
  train()
  assert tiny.measured(run) == tiny.measured(tiny_run / "whole")
  assert checkpoint.digest(run) == checkpoint.digest(tiny_run / "whole")
  train(ServedFeed, fails=True)  # it is finished, and asks no server
