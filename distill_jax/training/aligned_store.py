"""Stores of text in an online teacher's tokens, for a student with another tokenizer.

The text is aligned when a batch is read, in the threads of the loader, so nothing is stored twice.
A thread aligns about 100,000 teacher tokens per second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import SupportsIndex

from distill_jax.config import Config
from distill_jax.cross_tokenizer import sides
from distill_jax.cross_tokenizer.chains import Splits
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.data import corpus
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError, bad_value
from distill_jax.losses import FeatureLoss
from distill_jax.models import loading
from distill_jax.models.loading import ModelSource
from distill_jax.records.fields import Record
from distill_jax.records.multi_teacher import MultiTeacherStore
from distill_jax.records.student_rows import StudentRows
from distill_jax.retarget import source
from distill_jax.training import pairing
from distill_jax.training.pairing import TrainedStore


class AlignedStore:
  """A random-access source of the student's rows of a store of text.

  Args:
    store: The store.
    rows: The student's rows of it.

  Attributes:
    rows: See Args.
    manifest: The manifest of the student's rows.
    folder: The folder or URL of the store.
    digests: The digests of the store and of the student's tokenizer.
    others: The stores of further teachers; none.
  """

  def __init__(self, store: MultiTeacherStore, rows: StudentRows):
    student = rows.tables.student
    self.rows, self.folder = rows, store.folder
    self.others: dict[str, MultiTeacherStore] = {}
    self.digests = [*store.digests, student.digest]
    self.manifest = dataclasses.replace(
      store.manifest,
      kind="text",
      n=0,
      logp=False,
      missing_mass="none",
      nucleus=1.0,
      taps=None,
      teacher={},
      temperature=1.0,
      vocab_size=student.size,
      tokenizer=student.digest,
      seq_len=rows.positions,
      rollout=store.manifest.rollout if rows.texts else {},
    )

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: SupportsIndex) -> Record:
    return self.rows[index]

  def read_many(self, indices: Sequence[int]) -> list[Record]:
    """Returns the records of some indices."""
    return self.rows.read_many(indices)


def align(
  config: Config,
  student: ModelSource,
  key: str,
  stores: Sequence[MultiTeacherStore],
  trained: Sequence[TrainedStore] = (),
) -> Sequence[MultiTeacherStore | AlignedStore]:
  """Returns the stores, as the student's rows if the online teacher has another tokenizer.

  The student's tokenizer is retarget.tokenizer, or that of the student. Without retarget.tokenizer,
  data.tokenizer is the tokenizer of both.

  Args:
    config: The config of the run.
    student: The model to train.
    key: The config key of the stores.
    stores: The stores of text or records, in the teacher's tokens.
    trained: The stores that are trained on, if these are held out; see `pairing`.

  Raises:
    InputError: The stores are in other tokens, or the config has what only one tokenizer allows.
  """
  ours = pairing.student_tokenizer(config, student)
  if ours is None or all(store.manifest.tokenizer == ours.digest for store in stores):
    return stores
  teacher = loading.open_source(config.teacher, config.seed)
  theirs = corpus.tokenizer_of(config.data, teacher.pretrained)
  for store in stores:
    _check_store(key, store, teacher, theirs, ours)
  check_options(config)
  same = [s.rows for s in trained if isinstance(s, AlignedStore)]
  if same:
    tables, splits = same[0].tables, same[0].splits
  else:
    tables = make_tables(config, student, teacher)
    splits = Splits.of(tables)
  lengths = pairing.row_lengths(config, tables, stores, trained)
  return [
    AlignedStore(s, StudentRows(s, tables, splits, length, s.manifest.seq_len))
    for s, length in zip(stores, lengths, strict=True)
  ]


def make_tables(config: Config, student: ModelSource, teacher: ModelSource) -> PairTables:
  """Returns the tables of an online teacher's tokens and the student's.

  Raises:
    InputError: The student's tokens cannot be aligned with the teacher's.
  """
  theirs = corpus.tokenizer_of(config.data, teacher.pretrained)
  is_chat = source.holds_chats(config)
  side = sides.teacher_side(config.data, teacher.pretrained, theirs, is_chat)
  return pairing.make_tables(config, student, side)


def check_options(config: Config) -> None:
  """Raises InputError for options that need one tokenizer."""
  why = "for an online teacher with another tokenizer than the student's"
  for name, fn in config.losses.items():
    if isinstance(fn, FeatureLoss):
      expected = f"a loss of logits {why}, whose positions are not the student's"
      raise bad_value(f"losses.{name}", type(fn).__module__, expected, "Remove the loss")
  for key in ("teachers", "heldout_teachers"):
    if found := getattr(config.train, key):
      expected = f"{{}} {why}, because their records are in other tokens"
      raise bad_value(f"train.{key}", found, expected, "Remove the key")


def _check_store(
  key: str, store: MultiTeacherStore, teacher: ModelSource, theirs: Tokenizer, ours: Tokenizer
) -> None:
  """Raises InputError if a store is not in tokens that the teacher can read."""
  manifest = store.manifest
  if manifest.tokenizer != theirs.digest:
    raise InputError(
      f"The text {store.folder} in {key} has tokens of digest {manifest.tokenizer[:12]}; expected "
      f"those of the student ({ours.where}, {ours.digest[:12]}) or of the online teacher "
      f"({theirs.where}, {theirs.digest[:12]}). Pack the text with one of them."
    )
  pairing.check_sizes(f"The text {store.folder} in {key}", manifest, "teacher", teacher)
  if manifest.smoothing:
    raise InputError(
      f"The text {store.folder} in {key} has label smoothing, which belongs to the teacher's "
      "tokens. Pack it without data.trust."
    )
