"""Counts the tokens of the data, and checks that teacher and student have the same tokenizer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from distill_jax.data import chat_dataset, corpus, sources
from distill_jax.data.options import DataOptions
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.models.loading import ModelSource
from distill_jax.recipe import beginning
from distill_jax.recipe.model_source import Models

SAMPLE = 200  # documents on which two tokenizers are compared


@dataclasses.dataclass(frozen=True)
class TokenCount:
  """The lengths of the documents to train on.

  Attributes:
    lengths: Tokens of each document that was read.
    scale: All documents per document that was read; 1 if all of them were.
    is_whole: True for chats: a document is not cut at the end of a sequence.
  """

  lengths: list[int]
  scale: float
  is_whole: bool

  @property
  def tokens(self) -> int:
    """Number of tokens of all documents, estimated if `scale` is above 1."""
    return round(sum(self.lengths) * self.scale)

  def sequences(self, seq_len: int) -> int:
    """Returns the number of packed sequences of `seq_len` tokens."""
    if not self.is_whole:
      return max(1, -(-self.tokens // seq_len))
    rows, used = 1, 0
    for length in self.lengths:
      if length <= seq_len and used + length > seq_len:
        rows, used = rows + 1, 0
      used += length if length <= seq_len else 0
    return max(1, round(rows * self.scale))


def count(data: DataOptions, tokenizer: Tokenizer, teacher: ModelSource) -> TokenCount:
  """Counts the tokens of the training split, or of its beginning if there is much of it."""
  found = beginning.read(corpus.source_of(data))
  if data.kind == "chat":
    lengths = list(_chat_lengths(found.documents, data, tokenizer, teacher))
    return TokenCount(lengths, found.scale, is_whole=True)
  added = len(tokenizer.begin) + (tokenizer.eos_id is not None)
  lengths = [len(ids) + added for ids in tokenizer.encode_batch(found.documents)]
  return TokenCount(lengths, found.scale, is_whole=False)


def _chat_lengths(
  lines: list[str], data: DataOptions, tokenizer: Tokenizer, teacher: ModelSource
) -> Iterator[int]:
  """Yields the number of tokens of every chat that can be used, however long."""
  template = corpus.template_of(data, teacher.pretrained)
  for line in lines:
    try:
      messages, tools = chat_dataset.parse(line)
      yield len(template.tokens_and_mask(tokenizer, messages, tools)[0])
    except InputError:  # skipped, and counted, when the data is recorded
      continue


def check_chat_template(given: str, data: DataOptions, models: Models) -> None:
  """Refuses chats for a teacher without a chat template."""
  if data.kind != "chat":
    return
  files = corpus.files_of(data, models.teacher.pretrained)
  if files is None or files.chat_template is None:
    raise InputError(
      f"--data is {given}, which holds chats, and the teacher {models.teacher.name} has no chat "
      "template. Name a teacher that was trained on chats, or give plain text."
    )


def shared_tokenizer(data: DataOptions, models: Models) -> tuple[Tokenizer, str]:
  """Returns the tokenizer of both models, and the value of data.tokenizer.

  Two tokenizers with different files are the same if they have the same vocabulary and give the
  same tokens for the data. Then data.tokenizer names one of the files.

  Args:
    data: The section `data` of the config; `data.tokenizer` replaces the models' own.
    models: The models.

  Raises:
    InputError: The tokenizers differ, or the teacher has none.
  """
  teacher, student = models.teacher, models.student
  if data.tokenizer or student.tokenizer is None:
    return corpus.tokenizer_of(data, teacher.pretrained), data.tokenizer
  ours = corpus.tokenizer_of(data, student.pretrained)
  if teacher.tokenizer is None:
    raise InputError(
      f"--teacher is {teacher.name}, which has no tokenizer. Add tokenizer.json to its folder, or "
      "name a tokenizer with --config.data.tokenizer=FILE."
    )
  theirs = corpus.tokenizer_of(data, teacher.pretrained)
  if ours.digest == theirs.digest:
    return theirs, ""
  if _same_vocabulary(ours, theirs) and _encode_equally(ours, theirs, data):
    for source in (teacher, student):
      if Path(source.name).is_dir():
        return corpus.tokenizer_of(data, source.pretrained), _file(source)
  raise InputError(
    f"The teacher {teacher.name} and the student {student.name} have different tokenizers, so "
    "`distill` cannot train on the teacher's token probabilities. Take a student with the "
    "teacher's tokenizer, or run the single commands, with `retarget` between `record` and `train` "
    "(`distill-jax help retarget`)."
  )


def _file(source: ModelSource) -> str:
  """Returns the tokenizer file in a model's folder."""
  names = ("tokenizer.json", "tokenizer.model")
  return next(str(Path(source.name) / n) for n in names if (Path(source.name) / n).exists())


def _same_vocabulary(a: Tokenizer, b: Tokenizer) -> bool:
  if a.vocab_size != b.vocab_size or a.eos_id != b.eos_id or a.begin != b.begin:
    return False
  ids = range(a.vocab_size)
  return all(a.decode([i]) == b.decode([i]) for i in ids if i < 2000 or i % 7 == 0)


def _encode_equally(a: Tokenizer, b: Tokenizer, sample: DataOptions) -> bool:
  texts = list(itertools.islice(sources.documents(corpus.source_of(sample)), SAMPLE))
  return a.encode_batch(texts) == b.encode_batch(texts)
