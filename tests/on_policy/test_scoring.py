"""Scores of a round's texts: the teacher's exact numbers, resumed, by several teachers."""

import dataclasses
import gc
import shutil

import jax
import numpy as np
import pytest
import tiny_checkpoints
import tiny_store
from tiny_store import contents

from distill_jax import config
from distill_jax.data import corpus
from distill_jax.errors import InputError
from distill_jax.losses import LabelTargets
from distill_jax.models import loading
from distill_jax.nn import logits as logits_lib
from distill_jax.nn import sharding
from distill_jax.on_policy import run_setup
from distill_jax.on_policy.round_folders import folder_of
from distill_jax.on_policy.scoring import Scorer
from distill_jax.records import collate, manifest
from distill_jax.records.store import open_store
from distill_jax.types import Inputs

ROWS, T, V = 6, 24, tiny_checkpoints.CONFIG.vocab_size


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """The folders of two teachers."""
  folder = tmp_path_factory.mktemp("models")
  for seed, name in enumerate(("one", "two")):
    weights = {k: x * 0.2 for k, x in tiny_checkpoints.tensors(seed=seed).items()}
    tiny_checkpoints.write_folder(folder / name, weights=weights)
  return folder


def base(models, **changes):
  c = config.base()
  c.teacher.source = c.student.source = str(models / "one")
  c.teachers = {"second": str(models / "two")}
  c.records.kind, c.records.n, c.records.batch_size, c.records.chunk = "labels", 15, 4, 8
  c.records.tokens_per_shard, c.generate.cache_len = 4 * T, T
  c.update_from_flattened_dict(changes)
  return config.resolve(c)


def scorer(models, run, **changes):
  c = base(models, **changes)
  student = loading.open_source(c.student)
  teachers = run_setup.sources(c, ("teacher", "second"))
  return Scorer(c, student, teachers, sharding.make_mesh(), run)


def text(i, seed=0):
  """Row i of the texts, as the student's sampler stores it."""
  rng = np.random.default_rng([seed, i])
  prompt, end = 2 + i % 3, 12 + i
  t = np.arange(T)
  return {
    "tokens_T": np.where(t < end, rng.integers(0, V, T), 0).astype(np.int32),
    "segments_T": (t < end).astype(np.int32),
    "mask_T": (t >= prompt - 1) & (t < end - 1),
    "behaviour_logp_T": -rng.gamma(1, 2, T).astype(np.float32),
    "reward_T": np.full(T, i % 2, np.float32),
  }


def rollouts(run, models, number=0, teacher="teacher", seed=0):
  """The store of a round's texts."""
  sampling = {"temperature": 1.0}
  rollout = {"round": number, "student": "abc", "sampling": sampling}
  rollout["scalars"] = ["behaviour_logp", "reward"]
  tokenizer = corpus.tokenizer_of(config.resolve(config.base()).data, _pretrained(models))
  plain = tiny_store.manifest(ROWS, kind="text", n=0, vocab_size=V, seq_len=T, teacher={})
  plain = dataclasses.replace(plain, tokenizer=tokenizer.digest, corpus=f"seed {seed}")
  at = folder_of(run, number, teacher) / "rollouts"
  shutil.rmtree(at, ignore_errors=True)
  tiny_store.record(at, manifest.with_rollout(plain, rollout), make=lambda i: text(i, seed))
  return open_store(at)


def _pretrained(models):
  return loading.open_source(base(models).teacher).pretrained


def log_probabilities(models, name, rows):
  """The teacher's distributions, float64 [row, position, V]."""
  source = loading.open_source(dataclasses.replace(base(models).teacher, source=str(models / name)))
  inputs = Inputs.of(*(np.stack([r[k] for r in rows]) for k in ("tokens_T", "segments_T")))
  loaded = source.load(sharding.make_mesh(), jax.random.key(0))
  out = loaded.model(inputs, loaded.compute)
  z_BTV = np.float64(logits_lib.logits(out.hidden_BTD, out.head_VD))
  return z_BTV - np.log(np.exp(z_BTV).sum(-1, keepdims=True))


def test_scores_are_the_teachers_and_texts_and_scalars_are_kept(models, tmp_path):
  own = scorer(models, tmp_path)
  own.check()
  for name, weights in (("teacher", "one"), ("second", "two")):
    texts = rollouts(tmp_path, models, teacher=name)
    store = own.score(0, name, texts)
    store.verify()
    assert store.manifest.kind == "labels" and store.manifest.rollout == texts.manifest.rollout
    assert store.manifest.teacher["name"] == str(models / weights)
    rows = [text(i) for i in range(ROWS)]
    logp_BTV = log_probabilities(models, weights, rows)
    for row, got, read, logp_TV in zip(rows, store, texts, logp_BTV, strict=True):
      mask, labels = row["mask_T"], np.append(row["tokens_T"][1:], 0)
      want = logp_TV[np.arange(T), labels]
      # Stored as float16, with a relative error of 2^-11.
      np.testing.assert_allclose(got["label_logp_T"][mask], want[mask], rtol=6e-4, atol=1e-5)
      entropy = -(np.exp(logp_TV) * logp_TV).sum(-1)
      np.testing.assert_allclose(got["entropy_T"][mask], entropy[mask], rtol=6e-4, atol=1e-5)
      for key, x in read.items():
        np.testing.assert_array_equal(got[key], x, key)
      assert set(got) == {*read, "label_logp_T", "entropy_T"}
  batch = collate.collate(store.read_many(range(ROWS)))
  assert isinstance(batch.targets["teacher"], LabelTargets)
  np.testing.assert_array_equal(batch.rollout.reward_BT[1], rows[1]["mask_T"] * 1.0)


def test_a_lost_shard_is_scored_again_to_the_same_bits(models, tmp_path):
  own = scorer(models, tmp_path, **{"records.kind": "sampled"})
  texts = rollouts(tmp_path, models)
  whole = contents(own.score(0, "teacher", texts).folder)
  folder = folder_of(tmp_path, 0, "teacher") / "records"
  lost = sorted(folder.glob("*-00001.*"))
  assert len(lost) > 1
  for file in lost:
    file.unlink()
  again = scorer(models, tmp_path, **{"records.kind": "sampled"}).score(0, "teacher", texts)
  assert contents(again.folder) == whole


def test_scores_of_other_texts_are_deleted(models, tmp_path, capsys):
  own = scorer(models, tmp_path)
  before = own.score(0, "teacher", rollouts(tmp_path, models))[0]
  assert not capsys.readouterr().err.count("deleted")
  after = own.score(0, "teacher", rollouts(tmp_path, models, seed=1))
  assert "holds scores of other texts; it is deleted." in capsys.readouterr().err
  assert not np.array_equal(after[0]["tokens_T"], before["tokens_T"])
  np.testing.assert_array_equal(after[0]["tokens_T"], text(0, seed=1)["tokens_T"])


def test_the_noise_of_samples_differs_between_rounds(models, tmp_path):
  own = scorer(models, tmp_path, **{"records.kind": "sampled"})
  ids = [own.score(n, "teacher", rollouts(tmp_path, models, n))[0]["ids_TK"] for n in (0, 1)]
  assert not np.array_equal(*ids)


def test_one_teacher_is_in_memory_at_a_time(models, tmp_path):
  own = scorer(models, tmp_path)
  held = []
  for n, name in enumerate(("teacher", "teacher", "second", "teacher")):
    own.score(n, name, rollouts(tmp_path, models, n, name))
    gc.collect()
    held.append(sum(x.nbytes for x in jax.live_arrays()))
  assert 0 < max(held) < 1.1 * held[0]


WRONG = {
  "records.kind": ("text", "records.kind is 'text'; expected a kind with the teacher's targets"),
  "records.logprobs": ("a.jsonl", "records.logprobs is 'a.jsonl'; expected '' for `on_policy`"),
  "records.batch_size": (3, "records.batch_size is 3"),
  "generate.cache_len": (65, "generate.cache_len is 65; expected at most 64"),
}


@pytest.mark.parametrize("key", WRONG)
def test_what_cannot_be_scored_is_refused_at_once(key, models, tmp_path):
  value, message = WRONG[key]
  own = scorer(models, tmp_path, **{key: value})
  with pytest.raises(InputError, match=message.replace("'", ".")):
    own.check()
