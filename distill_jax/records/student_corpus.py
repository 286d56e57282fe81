"""The corpus of `record` for a student with another tokenizer (records.student_tokenizer)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from distill_jax.config import Config
from distill_jax.cross_tokenizer import sides
from distill_jax.cross_tokenizer.chains import Splits
from distill_jax.cross_tokenizer.student_lengths import Rows, student_lengths
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.data import corpus
from distill_jax.errors import bad_value
from distill_jax.models.loading import ModelSource
from distill_jax.records.packed_rows import PackedRows
from distill_jax.records.recording import Corpus
from distill_jax.records.student_rows import StudentRows

KEY = "records.student_tokenizer"


def check(config: Config) -> None:
  """Raises InputError if records.student_tokenizer is set and other keys do not allow it."""
  c = config.records
  if not c.student_tokenizer:
    return
  why = f"with {KEY}"
  if config.tasks:
    expected = f"no tasks {why}, because only text is aligned"
    raise bad_value("tasks", list(config.tasks), expected, "Remove one of the two keys")
  if c.taps:
    expected = f"() {why}, because features belong to the teacher's tokens"
    raise bad_value("records.taps", c.taps, expected, "Remove one of the two keys")
  if c.temperature != 1:
    expected = f"1 {why}, because a chain of tokens needs the teacher's own probabilities"
    raise bad_value("records.temperature", c.temperature, expected, "Set it to 1")
  if c.kind == "text":
    expected = f"a kind with targets {why}"
    action = "Run `pack` with data.tokenizer to store the text alone"
    raise bad_value("records.kind", c.kind, expected, action)
  if c.logprobs:
    expected = f"'' {why}, which needs whole distributions"
    action = "Import the dump without it"
    raise bad_value("records.logprobs", c.logprobs, expected, action)
  if config.data.trust:
    expected = f"() {why}, because label smoothing belongs to the teacher's tokens"
    raise bad_value("data.trust", config.data.trust, expected, "Remove one of the two keys")


def make_tables(config: Config, teacher: ModelSource) -> PairTables:
  """Returns the tables of the teacher's tokens and those of records.student_tokenizer.

  Args:
    config: The config.
    teacher: The teacher. Its tokens that end a text are those of its generation config, too.

  Raises:
    InputError: A tokenizer has no bytes, or no chat template for chats.
  """
  named, is_chat = config.records.student_tokenizer, config.data.kind == "chat"
  own = corpus.tokenizer_of(config.data, teacher.pretrained)
  theirs = sides.teacher_side(config.data, teacher.pretrained, own, is_chat)
  ours = sides.student_side(KEY, named, None, is_chat)
  return sides.pair_tables(theirs, ours, config.retarget.roles)


def corpora(
  config: Config, teacher: ModelSource, stores: Mapping[str, Mapping[str, Corpus]]
) -> dict[str, dict[str, Corpus]]:
  """Returns the student's rows of the teacher's packed text.

  Args:
    config: The config.
    teacher: The teacher; see `make_tables`.
    stores: The teacher's rows by split, and by the folder of their length.

  Raises:
    InputError: See `make_tables`, or the lengths do not fit.
  """
  tables = make_tables(config, teacher)
  splits = Splits.of(tables)
  rows = {
    f"{split}/{length}": Rows(_packed(c), c.positions, "the packed text")
    for split, by_length in stores.items()
    for length, c in by_length.items()
  }
  length_of = student_lengths(tables, rows, config.retarget.seq_len)
  return {
    split: {
      length: dataclasses.replace(
        c,
        rows=StudentRows(_packed(c), tables, splits, length_of[f"{split}/{length}"], c.positions),
        positions=length_of[f"{split}/{length}"],
        classes=tables.student.size,
        tokenizer=tables.student.digest,
        retargeted={
          "tokenizer": tables.teacher.digest,
          "store": "",
          "method": "exact",
          "min_mass": config.retarget.min_mass,
        },
      )
      for length, c in by_length.items()
    }
    for split, by_length in stores.items()
  }


def _packed(text: Corpus) -> PackedRows:
  assert isinstance(text.rows, PackedRows)
  return text.rows
