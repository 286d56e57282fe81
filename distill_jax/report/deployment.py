"""The savings of a student in files that runtimes load: the content of deployment.json.

`tools/bench/deploy.py` writes the file, and the report and the model card show it. It has two
parts:

  files: teacher and student in each format, measured on one machine: bytes on disk, memory of the
    process, tokens per second in llama.cpp, and the loss of rounding. Teacher and student run in
    turns, so that the ratios hold on a machine whose speed varies.
  bounds: pairs of a teacher and a student with published shapes, computed by the formulas of
    `efficiency`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

from distill_jax.errors import InputError
from distill_jax.runtime import json_io
from distill_jax.types import JsonObject

FILE = "deployment.json"
TEACHER, STUDENT = "teacher", "student"
AGAIN = "run tools/bench/deploy.py again"


@dataclasses.dataclass(frozen=True)
class ModelFile:
  """The measurements of a model in one format.

  Attributes:
    model: TEACHER or STUDENT.
    format: The format, e.g. "Q8_0", or "int4" for a compressed-tensors folder.
    bytes: The size of the weight files.
    kl_to_float: KL(model in float32 || this file) in nats per token, on `Deployment.tokens` tokens;
      None if it was not measured.
    memory_bytes: The memory of the runtime's process after it has generated; None: not measured.
    tokens_per_second: Generated tokens per second of processor time; None if llama.cpp does not
      read the format.
    speedup: The ratio of `tokens_per_second` to the teacher's in the format `Deployment.reference`.
    speedup_in_format: The same ratio to the teacher's in this format; None for the teacher itself.
  """

  model: str
  format: str
  bytes: int
  kl_to_float: float | None = None
  memory_bytes: int | None = None
  tokens_per_second: float | None = None
  speedup: float | None = None
  speedup_in_format: float | None = None


@dataclasses.dataclass(frozen=True)
class Bound:
  """The savings of a student by formula: bytes of weights, and decoded tokens per second and chip.

  Attributes:
    teacher, student: The names of the models.
    teacher_bytes, student_bytes: The bytes of their published weights.
    files: Pairs of a format and the bytes of the student's tensors in it.
    speedups: Pairs of a batch size and the ratio of upper bounds on tokens per second and chip.
  """

  teacher: str
  student: str
  teacher_bytes: int
  student_bytes: int
  files: tuple[tuple[str, int], ...]
  speedups: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Deployment:
  """The content of deployment.json.

  Attributes:
    teacher, student: The names of the measured models.
    machine: The machine, e.g. "2 cores of x86_64".
    runtime: The runtime with its version.
    prompt, new: Tokens read, and tokens generated and timed.
    rounds: Rounds of the timing; the numbers are medians over them.
    text: The text on which the loss of rounding was measured.
    tokens: The tokens of that text.
    reference: The format of the teacher with which all files are compared.
    files: The files.
    chip: The chip of the bounds.
    context: The context of the bounds, in tokens.
    bounds: The bounds.
  """

  teacher: str
  student: str
  machine: str
  runtime: str
  prompt: int
  new: int
  rounds: int
  text: str
  tokens: int
  reference: str
  files: tuple[ModelFile, ...]
  chip: str
  context: int
  bounds: tuple[Bound, ...]

  def __post_init__(self) -> None:
    names = [(f.model, f.format) for f in self.files]
    if len(set(names)) < len(names):
      raise ValueError("A model has two files of a format.")
    if (TEACHER, self.reference) not in names:
      raise ValueError(f"The teacher has no file in the format {self.reference!r} of `reference`.")

  def bytes_ratio_to_teacher(self, file: ModelFile) -> float:
    """Returns the bytes of a file as a fraction of the teacher's file in the reference format."""
    (teacher,) = (f for f in self.files if (f.model, f.format) == (TEACHER, self.reference))
    return file.bytes / teacher.bytes

  def to_json(self) -> JsonObject:
    """Returns the content of the file, without what was not measured."""
    tree = dataclasses.asdict(self)
    tree["files"] = [{k: v for k, v in f.items() if v is not None} for f in tree["files"]]
    return tree


def read(path: str | os.PathLike[str]) -> Deployment:
  """Reads a deployment.json.

  Raises:
    InputError: The file is missing or broken.
  """
  tree = json_io.read_object(path, AGAIN)
  try:
    return _checked(Deployment, {**tree, "files": _files(tree), "bounds": _bounds(tree)})
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    problem = f"{type(error).__name__}: {error}".rstrip(".")
    raise InputError(
      f"{path} does not hold measurements as tools/bench/deploy.py writes them ({problem}). "
      "Run it again."
    ) from error


def _files(tree: JsonObject) -> tuple[ModelFile, ...]:
  files = tuple(_checked(ModelFile, row) for row in tree["files"])
  if wrong := {f.model for f in files} - {TEACHER, STUDENT}:
    raise ValueError(f"A file is of the model {min(wrong)!r}.")
  return files


def _bounds(tree: JsonObject) -> tuple[Bound, ...]:
  rows = []
  for row in tree["bounds"]:
    files = tuple((str(name), _positive(int, n)) for name, n in row["files"])
    speedups = tuple((_positive(int, n), _positive(float, x)) for n, x in row["speedups"])
    rows.append(_checked(Bound, {**row, "files": files, "speedups": speedups}))
  return tuple(rows)


def _checked(kind: Any, row: JsonObject) -> Any:
  """Returns a dataclass of a row whose numbers are finite and positive; a KL can be 0."""
  types = {f.name: f.type for f in dataclasses.fields(kind)}
  values = {}
  for key, x in row.items():
    wanted = str(types[key]).removesuffix(" | None")
    if wanted == "str" and not isinstance(x, str):
      raise TypeError(f"{key} is {x!r:.40}.")
    if wanted in ("int", "float") and not (key == "kl_to_float" and x == 0):
      x = _positive(int if wanted == "int" else float, x, key)
    values[key] = x
  return kind(**values)


def _positive(kind: type, x: Any, key: str = "A number") -> Any:
  if type(x) not in (int, kind) or not math.isfinite(x) or x <= 0:
    raise ValueError(f"{key} is {x!r:.40}.")
  return kind(x)
