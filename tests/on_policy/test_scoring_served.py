"""Scores of a round's texts by a teacher on servers."""

import dataclasses

import numpy as np
import pytest
import scoring_server
import tiny
import tiny_store
from scoring_server import Server

from distill_jax import config
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError
from distill_jax.models import loading
from distill_jax.nn import sharding
from distill_jax.on_policy.round_folders import folder_of
from distill_jax.on_policy.scoring import Scorer
from distill_jax.records import manifest
from distill_jax.records.store import open_store

ROWS, T = 5, 20


def text(i):
  """Text i of random bytes; the prompt has 3."""
  rng, t = np.random.default_rng(i), np.arange(T)
  used = t < 10 + i
  named = {"tokens_T": np.where(used, rng.integers(0, 256, T), 0).astype(np.int32)}
  mask = (t >= 2) & (t < 9 + i)
  logp = -rng.gamma(1, 2, T).astype(np.float32)
  return named | {"segments_T": np.int32(used), "mask_T": mask, "behaviour_logp_T": logp}


@pytest.fixture
def server(tmp_path):
  encode = load_tokenizer(tiny.write_tokenizer(tmp_path / "tokenizer.json")).encode
  with Server(encode=encode) as server:
    yield server


def scorer(folder, server, teachers=("teacher",), **changes):
  c = config.base()
  c.student.shape, c.data.tokenizer = "tiny", str(folder / "tokenizer.json")
  c.records.kind, c.records.batch_size, c.generate.cache_len = "labels", 4, T
  c.generate.server.urls = (server.url,)
  c.update_from_flattened_dict(changes)
  c = config.resolve(c)
  student, teacher = loading.open_source(c.student), loading.open_source(c.teacher)
  sources = dict.fromkeys(teachers, teacher)
  return Scorer(c, student, sources, sharding.make_mesh(), folder / "run")


def rollouts(folder):
  rollout = {"round": 0, "student": "abc", "sampling": {}, "scalars": ["behaviour_logp"]}
  digest = load_tokenizer(folder / "tokenizer.json").digest
  plain = tiny_store.manifest(ROWS, kind="text", n=0, vocab_size=256, seq_len=T, teacher={})
  plain = dataclasses.replace(plain, tokenizer=digest)
  at = folder_of(folder / "run", 0, "teacher") / "rollouts"
  tiny_store.record(at, manifest.with_rollout(plain, rollout), make=text)
  return open_store(at)


def test_scores_are_the_servers_and_a_finished_store_asks_for_none(tmp_path, server):
  own = scorer(tmp_path, server)
  own.check()
  assert not server.asked
  own.check_servers()
  texts = rollouts(tmp_path)
  store = own.score(0, "teacher", texts)
  store.verify()
  assert (store.manifest.kind, store.manifest.teacher["name"]) == ("labels", "big")
  for i, row in enumerate(store):
    for name, x in texts[i].items():
      np.testing.assert_array_equal(row[name], x)
    for t in np.flatnonzero(row["mask_T"]):
      want = scoring_server.logp(row["tokens_T"][: t + 1])[row["tokens_T"][t + 1]]
      assert row["label_logp_T"][t] == pytest.approx(want, rel=1e-3)
  asked = len(server.asked)
  assert own.score(0, "teacher", texts).manifest == store.manifest
  assert len(server.asked) == asked


def test_a_server_that_cannot_score_the_texts_is_refused_before_there_are_any(tmp_path, server):
  server.max_len = T - 2
  with pytest.raises(InputError, match=str(T)):
    scorer(tmp_path, server).check_servers()


def test_several_teachers_are_refused(tmp_path, server):
  with pytest.raises(InputError, match="expected no servers with the 2 teachers of the prompts"):
    scorer(tmp_path, server, ("teacher", "second")).check()
  assert not server.asked
