"""Training on records in a teacher's tokens, with a student of another tokenizer."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import tiny
import tokenizers
from tiny_run import train
from tokenizers import decoders, models, pre_tokenizers

from distill_jax import config
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError
from distill_jax.losses import SpanTargets
from distill_jax.records import store
from distill_jax.training import stores, validate
from distill_jax.training.span_store import SpanStore

T, ROWS = 32, 10
MERGES = {"teacher": ["ti", "me", "an", "io"], "student": ["es", "is", "s,", "io"]}


def write_tokenizer(path, merges):
  """A tokenizer.json of 250 bytes and four merges: 254 of the 256 rows of llama.TINY."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:250]
  pieces = {c: i for i, c in enumerate([*letters, *merges])}
  made = tokenizers.Tokenizer(models.BPE(pieces, [tuple(m) for m in merges]))
  made.add_special_tokens(["<|endoftext|>"])
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  made.decoder = decoders.ByteLevel()
  made.save(str(path))
  return str(path)


def write_store(folder, tokenizer, **changes):
  """A store as import_logprobs makes it of a server that returns the text's tokens only."""
  stream = iter(tokenizer.encode(" ".join(tiny.sentences())))
  rng = np.random.default_rng(0)

  def row(_):
    tokens = np.array([*itertools.islice(stream, T)], np.int32)
    mask = np.arange(T) < T - 1
    logp = -rng.exponential(1.0, T).astype(np.float16).astype(np.float32) * mask
    ids = np.append(tokens[1:], 0).astype(np.int32)
    return {
      "tokens_T": tokens,
      "segments_T": np.ones(T, np.int32),
      "mask_T": mask,
      "ids_TN": ids[:, None],
      "logp_TN": np.where(mask, logp, -1)[:, None],
      "argmax_T": ids,
      "label_logp_T": logp,
    }

  manifest = store.Manifest(
    kind="topk",
    n=1,
    vocab_size=tokenizer.vocab_size,
    seq_len=T,
    teacher={"name": "vllm", "config": {}, "digest": "unknown: behind a server"},
    tokenizer=tokenizer.digest,
    corpus=folder.name,
    sequences_per_shard=4,
    extents=(ROWS,),
    entropy=False,
    missing_mass="tail_bucket",
  )
  with store.Writer(folder, dataclasses.replace(manifest, **changes), 0, 1) as writer:
    for shard in writer.missing():
      writer.write_shard(shard, map(row, shard))
    writer.complete()
  return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("aligned")
  for name, merges in MERGES.items():
    write_tokenizer(folder / f"{name}.json", merges)
  write_store(folder / "records", load_tokenizer(folder / "teacher.json"))
  return folder


def make_config(folder, **losses):
  c = tiny.tiny(folder)
  c.teacher.source = ""
  c.data.tokenizer = str(folder / "teacher.json")
  c.retarget.tokenizer = str(folder / "student.json")
  c.losses = {name: config.loss(name) for name in losses or ("alm", "ce")}
  return c


def test_a_batch_has_the_same_text_and_spans_as_targets(folder):
  c = config.resolve(make_config(folder))
  (opened,) = stores.open_stores(c)
  assert isinstance(opened, SpanStore) and len(opened) == ROWS
  teacher, student = (load_tokenizer(folder / f"{name}.json") for name in MERGES)
  assert opened.manifest.tokenizer == student.digest and opened.manifest.seq_len == 128
  assert opened.read_many([]) == []  # of a process that has padding rows alone
  theirs = opened.store.read_many(range(ROWS))
  for row, source in zip(opened.read_many(range(ROWS)), theirs, strict=True):
    n = (row["segments_T"] > 0).sum()
    assert student.decode(row["tokens_T"][:n].tolist()) == teacher.decode(source["tokens_T"])
  batch = next(stores.batches(c, [opened]))
  targets = batch.targets["teacher"]
  assert isinstance(targets, SpanTargets)
  assert targets.span_logp_BT.shape == batch.labels_BT.shape == (c.train.batch_size, 128)
  assert (targets.span_left_BT > 0).sum() > 0.9 * batch.mask_BT.sum()
  assert not targets.span_left_BT[~batch.mask_BT].any()


def test_losses_and_options_that_do_not_fit_are_refused(folder):
  def check(c):
    resolved = config.resolve(c)
    validate.check_run(resolved, stores.open_stores(resolved))

  check(make_config(folder))
  with pytest.raises(InputError, match=r"losses.kd needs targets in the student's tokens, .* Run"):
    check(make_config(folder, kd=1, ce=1))
  other = make_config(folder)
  other.data.tokenizer = tiny.write_tokenizer(folder / "other.json").as_posix()
  with pytest.raises(InputError, match="were made with another tokenizer"):
    check(other)
  unknown = make_config(folder)
  unknown.retarget.tokenizer, unknown.data.tokenizer = "", str(folder / "student.json")
  with pytest.raises(InputError, match="were made with another tokenizer .* or name the teacher"):
    check(unknown)
  hot = make_config(folder)
  tokenizer = load_tokenizer(folder / "teacher.json")
  hot.train.records = (str(write_store(folder / "hot", tokenizer, temperature=2.0)),)
  with pytest.raises(InputError, match="temperature"):
    check(hot)


def test_batches_after_a_stop_are_the_same(folder):
  c = config.resolve(make_config(folder))
  first, resumed = (stores.batches(c, stores.open_stores(c), start) for start in (0, 2))
  for got, want in zip(itertools.islice(resumed, 2), itertools.islice(first, 2, 4), strict=True):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_heldout_rows_have_a_length_of_training(folder):
  c = make_config(folder)
  c.train.heldout = (str(folder / "records"),)
  short = config.resolve(c)
  c.retarget.seq_len = 384
  longer = stores.open_stores(config.resolve(c))
  (held,) = stores.open_heldout(short, None, longer)
  assert held.manifest.seq_len == longer[0].manifest.seq_len == 384
  assert held.tables is longer[0].tables


@pytest.mark.slow  # it compiles a training step and an evaluation
def test_training_and_its_evaluation_lower_both_losses(folder, tmp_path):
  c = make_config(folder)
  held = write_store(folder / "heldout", load_tokenizer(folder / "teacher.json"))
  c.train.heldout, c.train.eval_every = (str(held),), 3
  train(c, tmp_path)
  first, last = (tiny.measured(tmp_path)[i] for i in (0, -1))
  for name in ("alm", "ce", "heldout/alm", "heldout/ce"):
    assert last[name] < first.get(name, first[name.removeprefix("heldout/")])
  assert last["teacher_ce/teacher"] > 0
