"""Makes records of sorted probabilities, for the rival loss tools/rival_losses/uld.py.

The targets of a position that begins with a token of the teacher are the counts of that token's
distribution in descending order, with their ranks as ids. Other positions have the last id of the
vocabulary alone, which the loss skips. Nothing tells which tokens the probabilities belong to, so
this is not part of the product: it is one of the students in configs/cross_tokenizer.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distill_jax.cross_tokenizer.rows import align_rows
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.records.fields import ARGMAX, ENTROPY, IDS, LABEL_LOGP, Record
from distill_jax.records.manifest import Manifest
from distill_jax.records.projected_rows import teacher_rows
from distill_jax.records.store import Store, Writer


def write(folder: Path, store: Store, tables: PairTables, like: Manifest) -> None:
  """Writes a store of sorted probabilities.

  Args:
    folder: The folder of the store.
    store: Records of kind "sampled" in the teacher's tokens.
    tables: The tables of both tokenizers.
    like: The manifest of the same records after `retarget`.
  """
  with Writer(folder, dataclasses.replace(like, shards=())) as writer:
    for rows in writer.missing():
      writer.write_shard(rows, convert(tables, store.read_many(list(rows)), like.seq_len, like.n))
    writer.complete()


def convert(tables: PairTables, rows: Sequence[Record], length: int, n: int) -> list[Record]:
  """Returns rows that were read as rows in the student's tokens, of `length` positions."""
  aligned = align_rows(tables, rows, length)
  teacher = teacher_rows(aligned, rows, n)
  begins = np.flatnonzero(aligned.offset_X == 0)
  _, count_E, size = teacher.entries(aligned.aligned.g_H[aligned.token_X[begins]])
  owner_E = np.repeat(np.arange(len(begins)), size)
  order = np.lexsort((-count_E, owner_E))
  rank_E = np.arange(len(owner_E)) - np.searchsorted(owner_E, owner_E)
  ids_XN = np.full((len(aligned.token_X), n), tables.student.size - 1, np.int32)
  ids_XN[begins] = np.repeat(rank_E, count_E[order]).reshape(-1, n)
  for i, record in enumerate(aligned.records):
    x = slice(*np.searchsorted(aligned.row_X, [i, i + 1]))
    record[IDS.record] = np.zeros((length, n), np.int32)
    record[IDS.record][aligned.position_X[x]] = ids_XN[x]
    record |= {f.record: np.zeros(length, f.dtype) for f in (ARGMAX, ENTROPY, LABEL_LOGP)}
  return aligned.records
