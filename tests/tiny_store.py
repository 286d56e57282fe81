"""A store of made-up records, small enough to write in a test."""

import dataclasses

import numpy as np

from distill_jax.records import store

T, V, N = 32, 500, 15


def manifest(total=10, **change):
  return dataclasses.replace(
    store.Manifest(
      kind="sampled",
      n=N,
      vocab_size=V,
      seq_len=T,
      teacher={"name": "t", "config": {"layers": 2}, "digest": "abc"},
      tokenizer="tok",
      corpus="cor",
      sequences_per_shard=3,
      extents=(total,),
    ),
    **change,
  )


def sequence(i):
  rng = np.random.default_rng(i)
  ids = np.sort(rng.integers(0, V, (T, N)), 1).astype(np.int32)
  segments = np.repeat([1, 2, 0], [T - 12, 8, 4]).astype(np.int32)
  return {
    "tokens_T": rng.integers(0, V, T).astype(np.int32),
    "segments_T": segments,
    "mask_T": segments > 0,
    "ids_TN": ids,
    "argmax_T": ids[:, 3],
    "entropy_T": rng.random(T).astype(np.float32),
    "label_logp_T": -rng.random(T).astype(np.float32),
  }


def record(folder, m=None, shards=None, index=0, count=1, make=sequence):
  """Writes what is missing (or that many shards of it), completes, returns the ranges.

  `make` returns the sequence of an index.
  """
  with store.Writer(folder, m or manifest(), index, count) as w:
    todo = w.missing()[:shards]
    for r in todo:
      w.write_shard(r, map(make, r))
    w.complete()
  return todo


def same(got, i):
  """Asserts that a record that was read is sequence i."""
  want = sequence(i)
  np.testing.assert_array_equal(got["tokens_T"], want["tokens_T"])
  dense = np.zeros((T, V))
  np.add.at(dense, (np.arange(T)[:, None], got["ids_TK"]), got["weight_TK"])
  ref = np.zeros((T, V))
  np.add.at(ref, (np.arange(T)[:, None], want["ids_TN"]), want["mask_T"][:, None] / N)
  np.testing.assert_allclose(dense, ref, atol=1e-6)


def contents(folder):
  """Returns the bytes of the files of a store, by name."""
  files = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
  return {p.name: p.read_bytes() for p in files}
