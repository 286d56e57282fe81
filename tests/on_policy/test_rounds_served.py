"""Rounds whose texts servers score, while the student trains and samples the next ones."""

import time

import pytest
import tiny
import tiny_on_policy
from scoring_server import Server

from distill_jax import config
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.on_policy import feed, round_scores
from distill_jax.runtime import checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path):
  encode = load_tokenizer(tiny.write_tokenizer(tmp_path / "tokenizer.json")).encode
  with Server(encode=encode) as server:
    yield server


def test_scores_ahead_give_the_same_bits(server, tmp_path, monkeypatch):
  c = tiny_on_policy.on_policy_config(tmp_path)
  c.train.online, c.records.kind, c.on_policy.lag, c.on_policy.every = False, "labels", 1, 2
  c.on_policy.keep_rounds, c.train.steps = 0, 6
  c.losses = {"ratio": config.loss("log_ratio")}
  c.generate.server.urls = (server.url,)
  real, waited = feed.RoundsFeed.next, []

  def waiting(self, step):
    """Before the first step of a round, waits for the scores of the next one."""
    number = step // 2 + 1
    done = tmp_path / f"ahead/rounds/{number:05d}/teacher/records/manifest.json"
    if step % 2 == 0 and number < 3:
      deadline = time.monotonic() + 60
      while not (done.exists() and '"shards": [\n' in done.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
      waited.append(step)
    return real(self, step)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(feed.RoundsFeed, "next", waiting)
    tiny_on_policy.run(c, tmp_path / "ahead")
  assert waited == [0, 2]

  init = round_scores.RoundScores.__init__
  monkeypatch.setattr(
    round_scores.RoundScores, "__init__", lambda self, score, ahead: init(self, score, False)
  )
  tiny_on_policy.run(c, tmp_path / "in turn")
  assert tiny.measured(tmp_path / "ahead") == tiny.measured(tmp_path / "in turn")
  assert checkpoint.digest(tmp_path / "ahead") == checkpoint.digest(tmp_path / "in turn")
