r"""What the sets share: their files, the fields of a row, and how questions are put."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distill_jax.errors import InputError
from distill_jax.hub.locate import locate

# DeepSeek-R1's instruction for mathematics (its model card's "Usage Recommendations").
REASON = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".csv")

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Choice:
  """A question whose answer is one of `choices`: which of them best goes on from `context`.

  Attributes:
    lengths: of the choices in characters, for acc_norm, without what joins them to the context.
    label: which is right, from 0 on.
  """

  context: str
  choices: tuple[str, ...]
  lengths: tuple[int, ...]
  label: int


@dataclasses.dataclass(frozen=True)
class GenerativeBenchmark:
  """The keys of every set that is answered in words.

  Attributes:
    path: the file, a folder of files, or package:NAME/FILE; "": in the package that has it.
    limit: the first so many questions; 0: all.
    samples: of each question; 0: evaluate.samples.
    prompt: what the model reads: {question} is the question. With generate.chat it is what a
      user says; without, "{question}" alone or a few worked examples suit.
    stop: strings that end an answer; (): generate.stop.
  """

  path: str = ""
  limit: int = 0
  samples: int = 0
  prompt: str = REASON
  stop: tuple[str, ...] = ()

  def __post_init__(self):
    if "{question}" not in self.prompt:
      raise InputError(f"a set's prompt is {self.prompt!r:.60}; it needs a {{question}} in it")
    if self.limit < 0 or self.samples < 0:
      raise InputError(f"a set's limit is {self.limit} and samples {self.samples}; 0 or more each")

  def ask(self, question: str) -> str:
    return self.prompt.replace("{question}", question)


def find(path: str, *packaged: str, other: str = "") -> list[Path]:
  """The files of a set.

  Args:
    path: as a config gives it.
    packaged: "NAME/FILE" inside installed packages, for an empty path.
    other: where such a file comes from, if no package is known to have one.
  """
  if path.startswith("hub:"):
    raise InputError(f"{path} would be downloaded; download its file and name that in path")
  if not path and not packaged:
    raise InputError(f"the set's path is empty and no package is known to hold it; {other}")
  try:
    found = [locate(p) for p in ([path] if path else [f"package:{p}" for p in packaged])]
  except InputError as e:
    raise InputError(f"{e}, or name the set's file in its path") from e
  if found[0].is_dir():
    inside = sorted(p for p in found[0].iterdir() if p.name.endswith(ENDINGS))
    if not inside:
      raise InputError(
        f"{path} holds no file that ends in {', '.join(ENDINGS)}; name the set's file"
      )
    return inside
  return found


def rows(file: Path) -> Iterator[tuple[str, bytes | Row]]:
  """(where it stands, a row) for each row of a file; of .jsonl the raw line."""
  if not file.name.endswith(ENDINGS):
    raise InputError(f"{file} is none of {', '.join(ENDINGS)}; convert it to JSON lines")
  try:
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
  except (OSError, EOFError) as e:
    raise InputError(f"{file} cannot be read ({e}); fetch it again") from e
  if file.name.endswith((".jsonl", ".jsonl.gz")):
    for n, raw in enumerate(data.splitlines(), 1):
      if raw.strip():
        yield f"{file}, line {n}", raw
    return
  try:
    text = data.decode("utf-8-sig")
    all_of = (
      list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
      if file.suffix == ".csv"
      else json.loads(text)
    )
  except (ValueError, csv.Error, RecursionError) as e:
    raise InputError(f"{file} is damaged ({e}); fetch it again") from e
  if not isinstance(all_of, list):
    raise InputError(f"{file} holds a JSON {type(all_of).__name__}; it ought to be a list of rows")
  for n, row in enumerate(all_of, 1):
    yield f"{file}, row {n}", row


def parse(raw: bytes | Row) -> Row:
  try:
    row = json.loads(raw.decode()) if isinstance(raw, bytes) else raw
  except (ValueError, RecursionError) as e:
    raise InputError(f"it is not JSON ({e})") from e
  if not isinstance(row, dict):
    raise InputError(f"it is a JSON {type(row).__name__}, and a row is an object")
  return row


def field(row: Row, *names: str) -> Any:
  """The first of these fields that is there. What others hold is in no message."""
  for name in names:
    if row.get(name) is not None:
      return row[name]
  raise InputError(
    f"there is no field {' or '.join(map(repr, names))}, but {', '.join(map(repr, row)) or 'none'}"
  )


def text(row: Row, *names: str) -> str:
  """A field that is text with something in it; numbers are taken as they are written."""
  value = field(row, *names)
  if isinstance(value, int | float) and not isinstance(value, bool):
    value = str(value)
  if not isinstance(value, str) or not value.strip():
    raise InputError(f"field {' or '.join(map(repr, names))} is empty or no text")
  return value


def choice(context: str, choices: Any, label: Any, joined: str = " ") -> Choice:
  """A Choice from what files hold: a list of texts, or {"text": [...], "label": [...]}.

  `label` is a place from 0 on, a letter, or one of the labels beside the texts.
  """
  names: Any = None
  if isinstance(choices, dict):
    choices, names = choices.get("text"), choices.get("label")
  if (
    not isinstance(choices, list)
    or len(choices) < 2
    or not all(isinstance(c, str) and c.strip() for c in choices)
  ):
    raise InputError("the choices are no list of at least two texts")
  at = -1
  if isinstance(names, list) and label in names:
    at = names.index(label)
  elif isinstance(label, str) and len(label.strip()) == 1 and label.strip() in LETTERS:
    at = LETTERS.index(label.strip())
  elif not isinstance(label, bool) and str(label).strip().isdecimal():
    at = int(label)
  if not 0 <= at < len(choices):
    raise InputError(f"the answer key {label!r:.40} is none of the {len(choices)} choices")
  lengths = tuple(map(len, choices))
  return Choice(context, tuple(joined + c for c in choices), lengths, at)
