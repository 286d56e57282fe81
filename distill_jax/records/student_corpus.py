"""The corpus of `record` for a student with another tokenizer (records.student_tokenizer)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from distill_jax.config import Config
from distill_jax.cross_tokenizer.chains import Splits
from distill_jax.cross_tokenizer.pair import pair_tables, side
from distill_jax.cross_tokenizer.roles import stop_set
from distill_jax.cross_tokenizer.rows import align_rows
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.data import corpus, tokenizers
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import bad_value
from distill_jax.hub.locate import locate
from distill_jax.hub.tokenizer import TokenizerFiles, read_tokenizer
from distill_jax.models.loading import ModelSource
from distill_jax.records import recorder
from distill_jax.records.packed_rows import PackedRows
from distill_jax.records.recorder import Corpus
from distill_jax.records.student_rows import Source, StudentRows
from distill_jax.runtime import files

SAMPLE = 256  # rows from whose lengths the length of the student's rows is chosen
MULTIPLE = 128  # of the length of the student's rows


def check(config: Config) -> None:
  """Raises InputError if records.student_tokenizer is set and other keys do not allow it."""
  c = config.records
  if not c.student_tokenizer:
    return
  why = "with records.student_tokenizer"
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
  if config.data.buckets and config.retarget.seq_len:
    expected = "0 with data.buckets, whose stores have several lengths"
    raise bad_value("retarget.seq_len", config.retarget.seq_len, expected, "Remove the key")
  if not 0 <= config.retarget.min_mass <= 1:
    expected = "a number from 0 to 1"
    raise bad_value("retarget.min_mass", config.retarget.min_mass, expected, "Correct it")


def corpora(
  config: Config, teacher: ModelSource, rows_of: Mapping[int, PackedRows], tokenizer: Tokenizer
) -> dict[str, Corpus]:
  """Returns the rows of the student by the folder of their length, as `open_corpora` does.

  Args:
    config: The config.
    teacher: The teacher.
    rows_of: The teacher's rows by length.
    tokenizer: The tokenizer of these rows.
  """
  student, found = named_tokenizer(config.records.student_tokenizer)
  tables = open_tables(config, teacher, tokenizer, student, found)
  splits = Splits.of(tables)
  out = {}
  for length, rows in rows_of.items():
    positions = config.retarget.seq_len or length_of(rows, tables, length)
    out[config.data.folder_of_length[length]] = Corpus(
      rows=StudentRows(rows, tables, splits, positions, length),
      positions=positions,
      classes=student.vocab_size,
      tokenizer=student.digest,
      digest=recorder.text_digest(rows[0]),
      heldout_fraction=config.data.fraction_of_split,
      retargeted={
        "tokenizer": tokenizer.digest,
        "store": "",
        "method": "exact",
        "min_mass": config.retarget.min_mass,
      },
    )
  return out


def named_tokenizer(name: str) -> tuple[Tokenizer, TokenizerFiles | None]:
  """Returns the tokenizer of a file or folder, a path, URL or Hub id, and the files next to it.

  Documents end with the vocabulary's end of a document, as with the tokenizer of a model.
  """
  folder, file = tokenizers.locate(locate(name))
  where = files.join(folder, file)
  return Tokenizer(files.read(where), where, None, None), read_tokenizer(folder)


def open_tables(
  config: Config,
  teacher: ModelSource,
  tokenizer: Tokenizer,
  student: Tokenizer,
  found: TokenizerFiles | None,
) -> PairTables:
  """Returns the tables of a teacher's and a student's tokenizer.

  Args:
    config: The config, with the pairs of tokens in retarget.roles.
    teacher: The teacher. Its tokens that end a text are those of its configs.
    tokenizer: Its tokenizer, or that of data.tokenizer.
    student: The student's tokenizer.
    found: Its files, with the chat template that aligns chats (data.kind="chat").

  Raises:
    InputError: A tokenizer has no bytes or no chat template for chats.
  """
  files_of_teacher = corpus.files_of(config.data, teacher.pretrained)
  configs = [] if config.data.tokenizer else [teacher.generation]
  configs += [files_of_teacher.config] if files_of_teacher else []
  is_chat = config.data.kind == "chat"
  theirs = side(tokenizer, files_of_teacher, stop_set(tokenizer, *configs), is_chat)
  ours = side(student, found, (), is_chat)
  return pair_tables(theirs, ours, config.retarget.roles)


def length_of(rows: Source, tables: PairTables, teacher_length: int) -> int:
  """Returns the smallest multiple of MULTIPLE that holds all of some rows of a text.

  With equal tokenizers it is the length of the teacher's rows.
  """
  if tables.same:
    return teacher_length
  indices = np.unique(np.linspace(0, len(rows) - 1, SAMPLE).astype(int)).tolist()
  longest = max(align_rows(tables, rows.read_many(indices), 1).lengths)
  return max(-(-longest // MULTIPLE), 1) * MULTIPLE
