"""What tasks share that read .jsonl files: their keys, their lines, and bad examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from distill_jax.data import corpus
from distill_jax.data.bad_input import BadInputPolicy, check_on_bad
from distill_jax.data.sources import DocumentSource, lines
from distill_jax.data.tokenizers import Tokenizer, load_tokenizer
from distill_jax.errors import InputError
from distill_jax.hub.pretrained import Pretrained
from distill_jax.runtime import json_io
from distill_jax.tasks._base import Task
from distill_jax.types import JsonObject


class BadExamples(BadInputPolicy):
  """Stops at the first example of a task that cannot be used, or skips and counts it."""

  def __init__(self, kind: str, on_bad: str):
    """Args:
    kind: the task's name in the registry.
    on_bad: the task's key.
    """
    check_on_bad(on_bad, f"the task {kind} has on_bad {on_bad!r}")
    super().__init__(f"{kind}'s on_bad", on_bad)
    self._kind = kind

  def finish(self, used: int) -> None:
    """Prints what was skipped.

    Raises:
      InputError: no example could be used.
    """
    self.report(self._kind, used, "examples")
    if not used:
      raise InputError(f"{self._kind}: none of its {self.counts.total()} examples can be used")


@dataclasses.dataclass(frozen=True)
class JsonlTask(Task):
  """A task whose examples are lines of JSON.

  Attributes:
    path: a .jsonl file or a folder of them.
    heldout_fraction: the share of examples that is held out, by a hash of each one's text.
    tokenizer: a file; "": the model's own.
    on_bad: "stop" at an example that cannot be used, or "skip" it and count.
  """

  path: str = ""
  heldout_fraction: float = 0.1
  tokenizer: str = ""
  on_bad: str = "stop"

  def __post_init__(self):
    self.bad_examples()  # refuses other values of on_bad

  def bad_examples(self) -> BadExamples:
    return BadExamples(self.kind, self.on_bad)

  def document_source(self, split: str, field: str) -> DocumentSource:
    """Returns where the lines of a split are, and what decides which lines are in it."""
    path = self.heldout if split == "heldout" and self.heldout else self.path
    fraction = 0.0 if self.heldout else self.heldout_fraction
    return DocumentSource("jsonl", path, split, field, fraction)

  def load_tokenizer(self, pretrained: Pretrained | None) -> Tokenizer:
    """Loads the tokenizer that the task names, or else that of the model that reads."""
    if self.tokenizer:
      return load_tokenizer(self.tokenizer)
    if pretrained is None or pretrained.tokenizer is None:
      raise InputError(
        f"the task {self.kind} has no tokenizer and the model brings none; name a file"
      )
    return corpus.of_files(pretrained.tokenizer, pretrained.source)


def read_objects(source: DocumentSource, bad: BadExamples) -> Iterator[tuple[JsonObject, str]]:
  """Yields the object on each line of a source's files, of both splits, and its place."""
  for line in lines(source):
    try:
      value = json_io.parse(line.raw)
    except InputError:
      bad.reject_subject(line.where, "is no JSON in UTF-8")
      continue
    if isinstance(value, dict):
      yield value, line.where
    else:
      bad.reject_subject(line.where, "is no JSON object")


class MediaLine(NamedTuple):
  """A media file and its text, neither of which is checked yet.

  Attributes:
    file: the file's name; "": the line names none.
    text: what the text's field holds, or the text file; None without.
    where: where the text is.
  """

  file: str
  text: Any
  where: str


def read_media(
  source: DocumentSource, field: str, list_media: Callable[[Path], list[Path]], bad: BadExamples
) -> Iterator[MediaLine]:
  """Yields the media files and texts that a source names.

  Args:
    source: its path is a .jsonl file, whose media files are named from its folder on; or a folder
      of media files, each beside a .txt file of its name.
    field: the field of a line that names the media file.
    list_media: returns the media files in such a folder, in order.
    bad: rejects lines that are not JSON.
  """
  path = Path(source.path)
  if path.is_dir():
    for file in list_media(path):
      text = file.with_suffix(".txt")
      yield MediaLine(str(file), _read_text(text), str(text))
    return
  for line, where in read_objects(source, bad):
    name = line.get(field)
    media = str(path.parent / name) if isinstance(name, str) and name else ""
    yield MediaLine(media, line.get(source.field), where)


def _read_text(file: Path) -> str | None:
  """Returns the text of a file; None if it is missing or not UTF-8."""
  try:
    return file.read_bytes().decode() if file.is_file() else None
  except UnicodeDecodeError:
    return None


def is_text(x: Any) -> TypeGuard[str]:
  """Returns whether a field holds text that is not blank and has a UTF-8."""
  return isinstance(x, str) and bool(x.strip()) and json_io.lone_surrogate(x) is None
