"""Teachers with other tokens than the student, on the student's texts.

The student's tokens are those that it sampled. The teacher reads its own tokens of the same text,
which are aligned when a row is read, and its distributions are projected to the student's tokens
(docs/cross-tokenizer.md). This holds for stored scores and for a teacher in the step.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping

from distill_jax.config import Config
from distill_jax.cross_tokenizer import sides
from distill_jax.cross_tokenizer.chains import Splits
from distill_jax.cross_tokenizer.dense import DenseTables
from distill_jax.cross_tokenizer.student_lengths import Source
from distill_jax.cross_tokenizer.student_texts import StudentTexts
from distill_jax.data import corpus
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError, bad_value
from distill_jax.losses import FeatureLoss
from distill_jax.models.loading import ModelSource
from distill_jax.on_policy.checks import compare_tokens
from distill_jax.on_policy.prompt_index import TEACHER
from distill_jax.records.manifest import Manifest
from distill_jax.records.multi_teacher import MultiTeacherStore
from distill_jax.records.recording import Corpus
from distill_jax.records.store import Store, open_store
from distill_jax.records.student_rows import StudentRows
from distill_jax.runtime import distributed
from distill_jax.training.aligned_store import AlignedStore

LENGTH_MULTIPLE = 128  # the length of the teacher's rows is a multiple of this
TOKEN_RATIO = 1.25  # tokens of the teacher per token of the student that rows have room for
CHECKED_TEXTS = 8  # first texts of a round, of which at least one must be aligned
MAX_WITHOUT_TARGET = 0.1  # fraction of their tokens above which a line is printed


def teacher_tokenizer(teacher: ModelSource, ours: Tokenizer) -> Tokenizer:
  """Returns the tokenizer of a teacher; a model without one reads the student's tokens."""
  files = teacher.tokenizer
  return ours if files is None else corpus.of_files(files, teacher.name)


class OtherTokens:
  """A teacher with other tokens than the student's.

  The tables of a pair take 2 to 6 seconds and 15 MB. A text is aligned in about the time that
  tokenizing it takes.

  Args:
    config: The config of the run.
    student: The student, without weights.
    teacher: The teacher, without weights.

  Raises:
    InputError: The tokens of one have no bytes, or the config has what only one tokenizer allows.
  """

  def __init__(self, config: Config, student: ModelSource, teacher: ModelSource):
    check_options(config, teacher.name)
    self._config, self._name, is_chat = config, teacher.name, prompts_are_chats(config)
    ours = corpus.tokenizer_of(config.data, student.pretrained)
    own = dataclasses.replace(config.data, tokenizer="")
    theirs = sides.teacher_side(own, teacher.pretrained, teacher_tokenizer(teacher, ours), is_chat)
    named = config.data.tokenizer
    side = sides.student_side("data.tokenizer", named, student.pretrained, is_chat)
    self._tables = sides.pair_tables(theirs, side, config.retarget.roles)
    self._splits = Splits.of(self._tables)
    longest = -(-config.generate.cache_len * TOKEN_RATIO // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    length = config.retarget.seq_len or longest
    self._length = min(int(length), teacher.text_config.max_position_embeddings)
    self._texts = StudentTexts(self._tables, theirs, side, self._length)

  @property
  def positions(self) -> int:
    """The number of positions of a row of the teacher."""
    return self._length

  @property
  def tokenizer(self) -> str:
    """The digest of the teacher's tokenizer."""
    return self._tables.teacher.digest

  @property
  def dense_tables(self) -> DenseTables:
    """The tables that are on the devices, as numpy arrays."""
    return DenseTables.of(self._tables, self._splits)

  def rows(self, texts: Store) -> StudentRows:
    """Returns the rows of a round's texts, with the teacher's tokens.

    Raises:
      InputError: None of a few texts can be aligned.
    """
    sample = texts.read_many(range(min(CHECKED_TEXTS, len(texts))))
    found = [self._texts.align(row)[0] for row in sample]
    reasons = ", ".join(sorted({reason for rows in found for reason in rows.skipped}))
    if all(rows.skipped for rows in found):
      raise InputError(
        f"None of the first {len(found)} texts of {texts.folder} can be aligned with the tokens "
        f"of the teacher {self._name}: {reasons}. Set retarget.chat for prompts in the form of a "
        "chat template, or use a teacher with the student's tokenizer."
      )
    lost, tokens = sum(r.cut_targets for r in found), sum(int(r["mask_T"].sum()) for r in sample)
    if lost > MAX_WITHOUT_TARGET * tokens and distributed.is_process_0():
      why = reasons or f"their text is not in the {self._length} tokens that the teacher reads"
      print(
        f"{lost} of the {tokens} tokens of the first {len(found)} texts of {texts.folder} have no "
        f"target of the teacher {self._name} ({why}).",
        file=sys.stderr,
      )
    return self._rows(texts, texts.manifest)

  def planned(self, texts: MultiTeacherStore) -> AlignedStore:
    """Returns the rows of texts that are not sampled yet, for a teacher in the step."""
    return AlignedStore(texts, self._rows(texts, texts.manifest))

  def _rows(self, texts: Source, m: Manifest) -> StudentRows:
    return StudentRows(texts, self._tables, self._splits, m.seq_len, self._length, self._texts)

  def corpus(self, texts: Store) -> Corpus:
    """Returns a round's texts as the rows to record; see `rows`."""
    m = texts.manifest
    retargeted = {
      "tokenizer": self.tokenizer,
      "store": "",
      "method": "exact",
      "min_mass": self._config.retarget.min_mass,
    }
    return Corpus(
      self.rows(texts),
      m.seq_len,
      m.vocab_size,
      m.tokenizer,
      m.digest,
      retargeted=retargeted,
      rollout=m.rollout,
    )


def find(config: Config, student: ModelSource, teacher: ModelSource) -> OtherTokens | None:
  """Returns what a teacher with other tokens needs; None for one with the student's.

  Raises:
    InputError: See OtherTokens.
  """
  ours = corpus.tokenizer_of(config.data, student.pretrained)
  different, _ = compare_tokens(ours, teacher_tokenizer(teacher, ours))
  return OtherTokens(config, student, teacher) if different else None


def of_teachers(
  config: Config, student: ModelSource, teachers: Mapping[str, ModelSource]
) -> dict[str, OtherTokens]:
  """Returns what the teachers in the step with other tokens need, by name; see `find`."""
  found = {name: find(config, student, teacher) for name, teacher in teachers.items()}
  others = {name: other for name, other in found.items() if other is not None}
  if TEACHER in others:  # held-out text is evaluated with this teacher alone
    check_heldout(config, others[TEACHER])
  return others


def check_heldout(config: Config, teacher: OtherTokens) -> None:
  """Raises InputError if held-out text is not in the tokens of the teacher in the step."""
  for path in config.train.heldout:
    if (found := open_store(path).manifest.tokenizer) != teacher.tokenizer:
      expected = f"stores in the tokens of the teacher, {teacher.tokenizer[:12]}"
      action = f"Pack the text of {path} ({found[:12]}) with its tokenizer"
      raise bad_value("train.heldout", config.train.heldout, expected, action)


def prompts_are_chats(config: Config) -> bool:
  """Returns whether prompts are in the form of a chat template."""
  return config.generate.chat or config.retarget.chat


def check_options(config: Config, teacher: str) -> None:
  """Raises InputError for options that need one tokenizer."""
  why = f"for the teacher {teacher}, whose tokens are not the student's"
  for name, fn in config.losses.items():
    if isinstance(fn, FeatureLoss):
      expected = f"a loss of logits {why}"
      raise bad_value(f"losses.{name}", type(fn).__module__, expected, "Remove the loss")
  for key, value in (("taps", ()), ("temperature", 1.0)):
    if (found := getattr(config.records, key)) != value:
      raise bad_value(f"records.{key}", found, f"{value!r} {why}", "Remove the key")
  if config.train.online and config.on_policy.records_fraction:
    expected = f"0 {why}: the steps on records need the teacher's tokens too"
    raise bad_value(
      "on_policy.records_fraction", config.on_policy.records_fraction, expected, "Remove the key"
    )
