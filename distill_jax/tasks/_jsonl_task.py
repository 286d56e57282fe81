"""Base class of tasks that read .jsonl files, and helpers for reading them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from distill_jax.data import corpus, jsonl, sources
from distill_jax.data.bad_input import ON_BAD, BadInputPolicy
from distill_jax.data.sources import DocumentSource
from distill_jax.data.tokenizers import Tokenizer, load_tokenizer
from distill_jax.errors import InputError, bad_value
from distill_jax.hub.pretrained import Pretrained
from distill_jax.runtime import files, json_io
from distill_jax.tasks._base import Task
from distill_jax.types import JsonObject


class BadExamples(BadInputPolicy):
  """Policy for examples of a task that cannot be used: stop at the first, or skip and count them.

  Args:
    kind: Name of the task in the registry.
    on_bad: The task's key `on_bad`.

  Raises:
    InputError: `on_bad` is neither "stop" nor "skip".
  """

  def __init__(self, kind: str, on_bad: str):
    if on_bad not in ON_BAD:
      raise bad_value("on_bad", on_bad, "'stop' or 'skip'", "Correct it")
    super().__init__(f"{kind}.on_bad", on_bad)
    self._kind = kind

  def finish(self, used: int) -> None:
    """Prints the number of skipped examples and the reasons.

    Args:
      used: Number of examples that could be used.

    Raises:
      InputError: No example could be used.
    """
    self.report(self._kind, used, "examples")
    if not used:
      raise InputError(
        f"The task {self._kind} has no usable example: all {self.counts.total()} were skipped. "
        "Correct the data."
      )


@dataclasses.dataclass(frozen=True)
class JsonlTask(Task):
  """A task whose examples are lines of JSON."""

  path: str = ""
  """A .jsonl file, or a folder of .jsonl files, as a path or URL (of texts only)."""
  heldout_fraction: float = 0.1
  """Fraction of the examples that is held out, chosen by a hash of each example."""
  tokenizer: str = ""
  """Path of a tokenizer; "" for the model's tokenizer."""
  on_bad: str = "stop"
  """Policy for examples that cannot be used: "stop" with an error, or "skip" and count them."""

  def __post_init__(self):
    self.bad_examples()  # checks on_bad

  def bad_examples(self) -> BadExamples:
    """Returns a new policy for examples that cannot be used."""
    return BadExamples(self.kind, self.on_bad)

  def document_source(self, split: str, field: str) -> DocumentSource:
    """Returns the source of a split's lines.

    Args:
      split: "train" or "heldout".
      field: Name of the field with the text.
    """
    path = self.heldout if split == "heldout" and self.heldout else self.path
    fraction = 0.0 if self.heldout else self.heldout_fraction
    return DocumentSource("jsonl", path, split, field, fraction)

  def load_tokenizer(self, pretrained: Pretrained | None) -> Tokenizer:
    """Loads the tokenizer of the key `tokenizer`, else that of the model.

    Raises:
      InputError: There is neither.
    """
    if self.tokenizer:
      return load_tokenizer(self.tokenizer)
    if pretrained is None or pretrained.tokenizer is None:
      raise bad_value(
        f"{self.kind}.tokenizer",
        self.tokenizer,
        "a file, because the model has no tokenizer",
        "Set it",
      )
    return corpus.of_files(pretrained.tokenizer, pretrained.source)


def read_objects(source: DocumentSource, bad: BadExamples) -> Iterator[tuple[JsonObject, str]]:
  """Yields (JSON object, place) for each line of a source's files, for both splits."""
  for line in jsonl.read_lines(*sources.find(source)):
    try:
      value = json_io.parse(line.raw)
    except InputError:
      bad.reject_subject(line.where, "is not JSON in UTF-8")
      continue
    if isinstance(value, dict):
      yield value, line.where
    else:
      bad.reject_subject(line.where, "is not a JSON object")


class MediaLine(NamedTuple):
  """A media file and its text, both unchecked.

  Attributes:
    file: Path of the media file; "" if the line does not name one.
    text: Value of the text field, or contents of the text file; None if missing.
    where: Place of the text, for errors.
  """

  file: str
  text: Any
  where: str


def read_media(
  source: DocumentSource, field: str, list_media: Callable[[Path], list[Path]], bad: BadExamples
) -> Iterator[MediaLine]:
  """Yields the media files and texts of a source.

  Args:
    source: Its path is a .jsonl file, which names media files relative to its own folder; or a
      folder of media files, where the text of x.wav is in x.txt.
    field: Name of the .jsonl field with the media file's name.
    list_media: Returns the media files of a folder, in order.
    bad: Policy for lines that are not JSON.
  """
  if files.is_remote(source.path):
    expected = "a local path, because images and sounds are not read from URLs"
    raise bad_value("path", source.path, expected, "Copy the data to a disk")
  path = Path(source.path)
  if path.is_dir():
    for file in list_media(path):
      text = file.with_suffix(".txt")
      yield MediaLine(str(file), _read_text(text), str(text))
    return
  for line, where in read_objects(source, bad):
    name = line.get(field)
    media = str(media_folder(path) / name) if isinstance(name, str) and name else ""
    yield MediaLine(media, line.get(source.field), where)


def media_folder(path: Path) -> Path:
  """Returns the folder of the media files of a source's path."""
  return path if path.is_dir() else path.parent


def _read_text(file: Path) -> str | None:
  """Returns the text of a file; None if it is missing or not UTF-8."""
  try:
    return file.read_bytes().decode() if file.is_file() else None
  except UnicodeDecodeError:
    return None


def is_text(x: Any) -> TypeGuard[str]:
  """Returns True for a string that is not blank and can be encoded in UTF-8."""
  return isinstance(x, str) and bool(x.strip()) and json_io.lone_surrogate(x) is None
