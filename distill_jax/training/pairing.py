"""The tokenizers, tables and lengths of stores whose rows are aligned when they are read.

Held-out stores share the tables of the stores that are trained on: making them takes 2 to 6 seconds
and 15 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from distill_jax.config import Config
from distill_jax.cross_tokenizer import sides
from distill_jax.cross_tokenizer.sides import Side, pair_tables
from distill_jax.cross_tokenizer.student_lengths import Rows, student_lengths
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.data import corpus
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.models.loading import ModelSource
from distill_jax.records.manifest import Manifest
from distill_jax.records.multi_teacher import MultiTeacherStore
from distill_jax.retarget import source


class TrainedStore(Protocol):
  """A store that is trained on, of any kind."""

  @property
  def manifest(self) -> Manifest: ...


def check_sizes(text: str, manifest: Manifest, named: str, teacher: ModelSource) -> None:
  """Checks that a teacher has enough tokens and positions for a text.

  Args:
    text: The subject of the error message, e.g. "The text FOLDER".
    manifest: The manifest of the text.
    named: The teacher in the error message, e.g. "teacher".
    teacher: The teacher.

  Raises:
    InputError: It has too few.
  """
  tokens, positions = manifest.vocab_size, manifest.seq_len
  shape = teacher.text_config
  if tokens > shape.vocab_size or positions > shape.max_position_embeddings:
    raise InputError(
      f"{text} has {tokens} tokens in sequences of {positions}, but the {named} has "
      f"{shape.vocab_size} tokens and {shape.max_position_embeddings} positions. Pack it for this "
      "teacher."
    )


def student_tokenizer(config: Config, student: ModelSource) -> Tokenizer | None:
  """Returns the student's tokenizer; None for a random student if no key names one."""
  if config.retarget.tokenizer:
    return sides.student_tokenizer(config.retarget.tokenizer, None)
  if not config.data.tokenizer and student.tokenizer is None:
    return None
  return corpus.tokenizer_of(config.data, student.pretrained)


def make_tables(config: Config, student: ModelSource, teacher: Side) -> PairTables:
  """Returns the tables of a teacher's tokens and the student's.

  Raises:
    InputError: The student's tokens cannot be aligned with the teacher's.
  """
  named, is_chat = config.retarget.tokenizer, source.holds_chats(config)
  ours = sides.student_side("retarget.tokenizer", named, student.pretrained, is_chat)
  return pair_tables(teacher, ours, config.retarget.roles)


def row_lengths(
  config: Config,
  tables: PairTables,
  stores: Sequence[MultiTeacherStore],
  trained: Sequence[TrainedStore],
) -> list[int]:
  """Returns the length of the student's rows of each store.

  Args:
    config: The config of the run.
    tables: The tables of both tokenizers.
    stores: The stores, in the teacher's tokens.
    trained: The stores that are trained on, if `stores` are held out; see `student_lengths`.
  """
  rows = {str(i): Rows(s, s.manifest.seq_len, str(s.folder)) for i, s in enumerate(stores)}
  lengths = [store.manifest.seq_len for store in trained]
  return list(student_lengths(tables, rows, config.retarget.seq_len, lengths).values())
