"""Stores in a teacher's tokens, read as the rows of a student with another tokenizer.

Row i of the result is the text of row i of the store, in the student's tokens. Its targets are the
teacher's log-probabilities of spans of the text (cross_tokenizer/spans.py), for the loss `alm`; the
loss `ce` needs none. `retarget` makes a store with distributions over the student's tokens, and
aligned_store.py reads text for a teacher in the training step.

Rows are aligned when they are read, in the loader's threads, at more than 100,000 of the teacher's
tokens per second and core. The tables of the two tokenizers take 2 to 6 seconds and 15 MB per
process. Nothing else is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import SupportsIndex

from distill_jax.config import Config
from distill_jax.cross_tokenizer import spans
from distill_jax.cross_tokenizer.rows import align_rows
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.errors import bad_value
from distill_jax.models.loading import ModelSource
from distill_jax.records.fields import LABEL_LOGP, Record
from distill_jax.records.multi_teacher import MultiTeacherStore
from distill_jax.records.store import Store
from distill_jax.retarget import source
from distill_jax.training import pairing
from distill_jax.training.pairing import TrainedStore


class SpanStore:
  """A random-access source of a store's rows in the student's tokens.

  Args:
    store: The store, in the teacher's tokens.
    tables: The tables of both tokenizers.
    length: Number of tokens of a row. Those that do not fit are cut.

  Attributes:
    store: See Args.
    tables: See Args.
    manifest: The manifest of the store, with the tokenizer, the size of the vocabulary and the
      length of the rows that are read.
    others: {}, as there are no targets of further teachers.
  """

  def __init__(self, store: Store, tables: PairTables, length: int):
    self.store, self.tables = store, tables
    self.others: Mapping[str, Store] = {}
    self.manifest = dataclasses.replace(
      store.manifest,
      tokenizer=tables.student.digest,
      vocab_size=tables.student.size,
      seq_len=length,
      taps=None,
      rollout={},
    )

  @property
  def folder(self) -> str | Path:
    """The folder or URL of the store."""
    return self.store.folder

  @property
  def digests(self) -> list[str]:
    """The digests of the store and of the student's tokenizer."""
    return [self.store.manifest.digest, self.tables.student.digest]

  def __len__(self) -> int:
    return len(self.store)

  def __getitem__(self, index: SupportsIndex) -> Record:
    return self.read_many([index])[0]

  def read_many(self, indices: Sequence[SupportsIndex]) -> list[Record]:
    """Returns the records of some indices."""
    if not len(indices):  # a batch of which this process holds padding alone
      return []
    rows = self.store.read_many(indices)
    aligned = align_rows(self.tables, rows, self.manifest.seq_len)
    if LABEL_LOGP.read in rows[0]:
      spans.add_spans(aligned, [row[LABEL_LOGP.read] for row in rows])
    return aligned.records


def align(
  config: Config,
  student: ModelSource,
  key: str,
  stores: Sequence[MultiTeacherStore],
  trained: Sequence[TrainedStore] = (),
) -> list[MultiTeacherStore | SpanStore]:
  """Returns stores, of which those in a teacher's tokens are read in the student's.

  The teacher's tokenizer is that of teacher.source or data.tokenizer, as for `retarget`. Without
  one, stores are returned unchanged.

  Args:
    config: The config of the run.
    student: The model to train.
    key: The config key of the stores, for messages.
    stores: The stores.
    trained: The stores that are trained on, if these are held out; see `pairing`.

  Raises:
    InputError: The teacher's tokenizer is unknown, or other options do not allow it.
  """
  tokenizer = pairing.student_tokenizer(config, student)
  if tokenizer is None or all(s.manifest.tokenizer == tokenizer.digest for s in stores):
    return list(stores)
  if not config.teacher.source and not config.retarget.tokenizer:
    return list(stores)
  teacher = source.teacher_side(config, {})
  other = [s for s in stores if s.manifest.tokenizer == teacher.vocabulary.digest]
  if not other:
    return list(stores)
  _check(key, other)
  same = [s.tables for s in trained if isinstance(s, SpanStore)]
  tables = same[0] if same else pairing.make_tables(config, student, teacher)
  lengths = iter(pairing.row_lengths(config, tables, other, trained))
  return [SpanStore(s.first, tables, next(lengths)) if s in other else s for s in stores]


def _check(key: str, stores: Sequence[MultiTeacherStore]) -> None:
  """Raises InputError if other options do not allow that rows are aligned."""
  folders = [str(store.folder) for store in stores]
  if any(store.others for store in stores):
    expected = "records in the student's tokens, because there are several teachers"
    raise bad_value(key, folders, expected, "Run `retarget` on all of them")
  if any(store.manifest.smoothing for store in stores):
    expected = "records without label smoothing, which belongs to the teacher's tokens"
    raise bad_value(key, folders, expected, "Record without data.trust")
