"""The places of all prompts, which are read from their files when a round needs them.

A place takes 8 bytes: 8 MB for a million prompts. Process 0 reads the files once, and keeps the
places in the workdir, so that a run that is resumed reads them again only if they have changed.
"""

from __future__ import annotations

import array
import functools
import hashlib
import io
import json
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import numpy as np

from distill_jax.data import jsonl
from distill_jax.errors import InputError, bad_value
from distill_jax.generation.prompts import Prompt, Prompts
from distill_jax.records.shard_writer import writing
from distill_jax.runtime import distributed, files
from distill_jax.types import JsonObject

TEACHER = "teacher"  # the name of config.teacher, which has the prompts without `route`
ROUTE = "route"  # the field of a prompt's line with the name of its teacher
SHIFT = 56  # the highest byte of a place is the teacher's number; the others are the offset
REJECTED = 255  # in the place of a teacher's number: the prompt cannot be used
BLOCK = 4096  # prompts that are searched at once

Unusable = Callable[[Prompts], set[int]]


class PromptIndex:
  """The prompts of a run, by teacher.

  Args:
    prompts: What reads the prompts.
    teachers: The names of the teachers.
    places_N: uint64, the number of its teacher and the offset of each prompt, over all files.
    digest: The sha256, in hex, of the prompts that can be used.
    unsaved: Writes the file of places, on process 0. None: the file has them.

  Attributes:
    counts: The number of prompts of each teacher.
    digest: See Args.
  """

  def __init__(
    self,
    prompts: Prompts,
    teachers: Sequence[str],
    places_N: np.ndarray,
    digest: str,
    unsaved: Callable[[], None] | None = None,
  ):
    self._prompts, self._places, self.digest = prompts, places_N, digest
    self._unsaved = unsaved
    self._found = _versions(prompts)
    self._ends = np.cumsum([size for _, size, _ in self._found])  # of the files, in bytes
    in_block = [
      np.bincount(_teachers(places_N[first : first + BLOCK]), minlength=REJECTED + 1)
      for first in range(0, len(places_N), BLOCK)
    ]
    through = np.cumsum(in_block, axis=0)  # [blocks, teachers]
    self._through = {name: through[:, i] for i, name in enumerate(teachers)}
    self.counts = {name: int(ends[-1]) for name, ends in self._through.items()}

  def save(self) -> None:
    """Keeps the places in the workdir, once the config has been accepted. All processes call it.

    Raises:
      InputError: The file cannot be written.
    """
    unsaved, self._unsaved = self._unsaved, None
    distributed.run_on_process_0(unsaved or (lambda: None))

  def number(self, teacher: str, i: int) -> int:
    """Returns the number, in the files, of the prompt with index `i` among those of a teacher."""
    through = self._through[teacher]
    block = int(np.searchsorted(through, i, side="right"))
    before = int(through[block - 1]) if block else 0
    first = block * BLOCK
    found = _teachers(self._places[first : first + BLOCK])
    return first + int(np.flatnonzero(found == [*self._through].index(teacher))[i - before])

  def read(self, numbers: Sequence[int]) -> list[Prompt]:
    """Returns some prompts, by their numbers in the files.

    Raises:
      InputError: A file has changed since its prompts were counted.
    """
    places = [self._place(number) for number in numbers]
    used = {file for file, _, _ in places}
    for i in used:
      name, *known = self._found[i]
      if (info := files.info(name)) is None or [*info] != known:
        raise _changed(name)
    data = files.read_ranges([(self._found[i][0], *bounds) for i, *bounds in places])
    return [self._parse(*args) for args in zip(numbers, places, data, strict=True)]

  def _place(self, number: int) -> tuple[int, int, int]:
    """Returns the index of a prompt's file, and the first byte and the end of its line in it."""
    start = _offset(self._places[number])
    file = int(np.searchsorted(self._ends, start, side="right"))
    end, size = int(self._ends[file]), int(self._found[file][1])
    stop = _offset(self._places[number + 1]) if number + 1 < len(self._places) else end
    return file, start - (end - size), min(stop, end) - (end - size)

  def _parse(self, number: int, place: tuple[int, int, int], data: bytes) -> Prompt:
    name = self._found[place[0]][0]
    line = next(jsonl.split_lines(io.BytesIO(data), name))
    prompt = self._prompts.parse(number, line)
    if prompt.rejected:
      raise _changed(name)
    return prompt


def open_index(
  prompts: Prompts,
  teachers: Sequence[str],
  file: str,
  settings: JsonObject,
  unusable: Unusable | None,
) -> PromptIndex:
  """Reads the places of all prompts, or those that an earlier run kept. All processes call it.

  Args:
    prompts: What reads the prompts.
    teachers: The names of the teachers that `route` may name, the one without `route` first.
    file: The path or URL of the file of places.
    settings: What the places depend on besides the files of prompts.
    unusable: Returns the numbers of prompts that cannot be used for a further reason. None: none.

  Raises:
    InputError: Prompts cannot be used, or are not those of the run in the workdir.
  """
  made: list[tuple[np.ndarray, str, Callable[[], None] | None]] = []
  distributed.run_on_process_0(
    lambda: made.append(_known(prompts, teachers, file, settings, unusable))
  )
  places, digest, unsaved = made[0] if made else (np.zeros(0, np.uint64), "", None)
  count = int(distributed.broadcast_from_process_0(np.array(len(places))))
  whole = places.view(np.int32) if made else np.zeros(2 * count, np.int32)  # jax rounds int64
  places = distributed.broadcast_from_process_0(whole).view(np.uint64)
  return PromptIndex(prompts, teachers, places, distributed.text_of_process_0(digest), unsaved)


def counts(prompts: Prompts, teachers: Collection[str]) -> Counter[str]:
  """Returns the number of prompts of each teacher, which takes one pass over the files.

  Args:
    prompts: What reads the prompts.
    teachers: The names of the teachers that `route` may name.

  Raises:
    InputError: Prompts cannot be used.
  """
  found: Counter[str] = Counter()

  def visit(prompt: Prompt, line: jsonl.Line) -> None:
    if not prompt.rejected:
      found[_route(prompt.about, teachers, line.where)] += 1

  prompts.summary(visit)
  return found


def _known(
  prompts: Prompts,
  teachers: Sequence[str],
  file: str,
  settings: JsonObject,
  unusable: Unusable | None,
) -> tuple[np.ndarray, str, Callable[[], None] | None]:
  """Returns the places and the digest, and what writes them unless the file has them."""
  about = {"settings": settings, "files": _versions(prompts)}
  before = _load(file)
  if before is not None and before[0] == json.loads(json.dumps(about)):
    return *before[1:], None
  places, digest = _scan(prompts, teachers, unusable)
  if before is not None and before[2] != digest:
    raise InputError(
      f"The prompts in {', '.join(prompts.files)} are not those with which the run began. Restore "
      "them, or choose another --workdir."
    )
  return places, digest, functools.partial(_save, file, about, places, digest)


def _scan(
  prompts: Prompts, teachers: Sequence[str], unusable: Unusable | None
) -> tuple[np.ndarray, str]:
  """Reads all prompts and returns their places and digest."""
  numbers = {name: i for i, name in enumerate(teachers)}
  starts, total = {}, 0
  for name, size, _ in _versions(prompts):
    starts[name], total = total, total + size
  places = array.array("Q")

  def visit(prompt: Prompt, line: jsonl.Line) -> None:
    teacher = REJECTED if prompt.rejected else numbers[_route(prompt.about, numbers, line.where)]
    places.append(teacher << SHIFT | starts[str(line.file)] + line.offset)

  digest = prompts.summary(visit).digest
  found = np.array(places, np.uint64)
  for number in unusable(prompts) if unusable else ():
    found[number] |= np.uint64(REJECTED << SHIFT)
  digest = hashlib.sha256(digest.encode() + (found >> np.uint64(SHIFT)).tobytes()).hexdigest()
  unused = np.flatnonzero(_teachers(found) == REJECTED)
  if len(unused) == len(found):
    raise InputError(f"No prompt in {', '.join(prompts.files)} can be used. Correct them.")
  if len(unused):
    print(
      f"{len(unused)} of {len(found)} prompts cannot be used and are skipped; the first is prompt "
      f"{unused[0]}, counted from 0.",
      file=sys.stderr,
    )
  return found, digest


def _route(about: JsonObject, teachers: Collection[str], where: str) -> str:
  """Returns the name of a prompt's teacher."""
  name = about.get(ROUTE) or TEACHER
  if not isinstance(name, str) or name not in teachers:
    expected = f"'' or the name of a teacher ({', '.join(teachers)})"
    raise bad_value(f"{where}: {ROUTE}", name, expected, "Correct it, or add it to `teachers`")
  return name


def _teachers(places_N: np.ndarray) -> np.ndarray:
  return (places_N >> np.uint64(SHIFT)).astype(np.int64)


def _offset(place: np.uint64) -> int:
  return int(place) & ((1 << SHIFT) - 1)


def _versions(prompts: Prompts) -> list[list]:
  """Returns the name, size and version of each file of prompts."""
  found = [(name, files.info(name)) for name in prompts.files]
  return [[name, *(info or (0, ""))] for name, info in found]


def _changed(name: str) -> InputError:
  return InputError(
    f"{name} has changed since its prompts were counted. Restore it and run the command again, or "
    "choose another --workdir."
  )


def _load(file: str) -> tuple[JsonObject, np.ndarray, str] | None:
  """Returns what is known of the prompts of an earlier run: about, places and digest."""
  if files.info(file) is None:
    return None
  try:
    with np.load(io.BytesIO(files.read(file))) as arrays:
      about = json.loads(arrays["about"].tobytes())
      return about, arrays["places"], about.pop("digest")
  except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as e:
    raise InputError(f"{file} is damaged ({e}). Delete it and run the command again.") from e


def _save(file: str, about: JsonObject, places: np.ndarray, digest: str) -> None:
  buffer, text = io.BytesIO(), json.dumps({**about, "digest": digest})
  np.savez(buffer, allow_pickle=False, about=np.frombuffer(text.encode(), np.uint8), places=places)
  with writing(file):
    files.write(file, buffer.getvalue())
