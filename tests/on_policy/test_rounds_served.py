"""Rounds whose texts servers score, while the student trains and samples the next ones."""

import time

import pytest
import tiny
import tiny_on_policy
from scoring_server import Server

from distill_jax import config
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import Unavailable
from distill_jax.on_policy import feed, round_scores
from distill_jax.runtime import checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("served")
  tiny.write_tokenizer(folder / "tokenizer.json")
  return folder


def serve(folder, port=0):
  return Server(encode=load_tokenizer(folder / "tokenizer.json").encode, port=port)


@pytest.fixture(scope="module")
def server(folder):
  with serve(folder) as server:
    yield server


def served(folder, server):
  """Returns the config of three rounds of two steps, whose texts are one round old."""
  c = tiny_on_policy.on_policy_config(folder)
  c.train.online, c.records.kind, c.on_policy.lag, c.on_policy.every = False, "labels", 1, 2
  c.on_policy.keep_rounds, c.train.steps = 0, 6
  c.losses = {"ratio": config.loss("log_ratio")}
  c.generate.server.urls = (server.url,)
  return c


@pytest.fixture(scope="module")
def in_turn(folder, server):
  """The workdir of a run that waits for the scores of each round."""
  init = round_scores.RoundScores.__init__
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      round_scores.RoundScores, "__init__", lambda self, score, ahead: init(self, score, False)
    )
    tiny_on_policy.run(served(folder, server), folder / "in turn")
  return folder / "in turn"


def result(workdir):
  return tiny.measured(workdir), checkpoint.digest(workdir)


def wait_for_scores(workdir, number):
  done = workdir / f"rounds/{number:05d}/teacher/records/manifest.json"
  deadline = time.monotonic() + 60
  while not (done.exists() and '"shards": [\n' in done.read_text()):
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_scores_ahead_give_the_same_bits(in_turn, folder, server, monkeypatch):
  real, waited = feed.RoundsFeed.next, []

  def waiting(self, step):
    """Before the first step of a round, waits for the scores of the next one."""
    if step in (0, 2):
      wait_for_scores(folder / "ahead", step // 2 + 1)
      waited.append(step)
    return real(self, step)

  monkeypatch.setattr(feed.RoundsFeed, "next", waiting)
  tiny_on_policy.run(served(folder, server), folder / "ahead")
  assert waited == [0, 2]
  assert result(folder / "ahead") == result(in_turn)


def test_a_finished_run_asks_no_server(in_turn, folder, server):
  asked = len(server.asked)
  tiny_on_policy.run(served(folder, server), in_turn)
  assert len(server.asked) == asked


def test_a_server_that_is_gone_ends_the_run_with_its_state_saved(in_turn, folder):
  """It has scored the texts of rounds 0 and 1; the scores of round 2 are needed before step 4."""
  real = feed.RoundsFeed.next
  with serve(folder) as server, pytest.MonkeyPatch.context() as patch:

    def going(self, step):
      if step == 1:
        wait_for_scores(folder / "gone", 1)
        server.shutdown()
        server.server_close()
      return real(self, step)

    patch.setattr(feed.RoundsFeed, "next", going)
    c = served(folder, server)
    c.train.checkpoint_every, c.generate.server.retries = 0, 0
    with pytest.raises(Unavailable, match="run the same command again"):
      tiny_on_policy.run(c, folder / "gone")
  assert [p.name for p in (folder / "gone/checkpoints").glob("[0-9]*")] == ["4"]
  with serve(folder, server.server_address[1]):
    tiny_on_policy.run(c, folder / "gone")
  assert result(folder / "gone") == result(in_turn)
