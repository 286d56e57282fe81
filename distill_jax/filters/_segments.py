"""The files of samples as segments, and ranges of bytes that are cut between prompts.

A range from byte `start` to byte `stop` of a file has the prompts whose first lines begin there,
roughly: it begins after the prompt of the first sample at or after `start`, and ends after the
prompt of the first sample at or after `stop`. So neighbouring ranges meet at any place of a file,
and a range is read without the rest of its file.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from distill_jax.errors import InputError, bad_value
from distill_jax.filters.samples import Sample, Unjudgeable
from distill_jax.runtime import files, json_io

SEGMENT_BYTES = 64 * 2**20  # larger files are several segments
AHEAD_BYTES = 2**18  # bytes to read after a range, for the rest of its last prompt


class Range(NamedTuple):
  """A range of a file of samples.

  Attributes:
    path: The file, a path or URL.
    start: The first byte.
    stop: The byte after the last one.
    size: The size of the file.
  """

  path: str
  start: int
  stop: int
  size: int


class Segment(NamedTuple):
  """A range of samples that is filtered into one file.

  Attributes:
    number: The number in the names of the output files.
    range: The range.
    version: The version of the file, see `files.FileInfo`.
  """

  number: int
  range: Range
  version: str

  @property
  def file(self) -> str:
    """The name of the output files."""
    return f"{self.number:05}.jsonl"


class Line(NamedTuple):
  """A line of a file of samples.

  Attributes:
    offset: The offset of its first byte in the file.
    sample: The sample, or {"line": the text} for a line that is not a sample.
    fault: The reason why the line is not a sample, or None.
  """

  offset: int
  sample: Sample
  fault: Unjudgeable | None


def find(samples: str) -> list[Segment]:
  """Returns the segments of filter.samples.

  Args:
    samples: A .jsonl file, a folder of them, or a workdir of `generate`; a path or URL.

  Raises:
    InputError: There is no such file.
  """
  found = _listed(samples)
  if not found:
    expected = "an existing file of samples, a folder of .jsonl files, or a workdir of generate"
    raise bad_value("filter.samples", samples, expected, "Run generate first, or correct the path")
  segments: list[Segment] = []
  for path, info in found.items():
    for piece in pieces(Range(path, 0, info.size, info.size), SEGMENT_BYTES):
      segments.append(Segment(len(segments), piece, info.version))
  return segments


def _listed(samples: str) -> dict[str, files.FileInfo]:
  """Returns the files of filter.samples by path or URL."""
  for path in (samples, files.join(samples, "samples.jsonl")):
    if (info := files.info(path)) is not None:
      return {path: info}
  for folder in (files.join(samples, "samples"), samples):
    if found := files.listing(folder, "*.jsonl"):
      return {files.join(folder, name): info for name, info in found.items()}
  return {}


def pieces(whole: Range, size: int) -> list[Range]:
  """Returns the pieces of a range; each has at least `size` bytes if the range has."""
  count = max(1, (whole.stop - whole.start) // size)
  cuts = [whole.start + i * size for i in range(count)] + [whole.stop]
  return [whole._replace(start=a, stop=b) for a, b in itertools.pairwise(cuts)]


def prompts(where: Range) -> Iterator[list[Line]]:
  """Yields the lines of each prompt of a range. Lines that are not samples belong to the prompt
  before.

  Blank lines are skipped.
  """
  group: list[Line] = []
  current = None
  for line in _lines(where):
    if line.fault is None and line.sample["id"] != current:
      if current is not None:
        yield group
        group = []
      current = line.sample["id"]
    group.append(line)
  if group:
    yield group


def _lines(where: Range) -> Iterator[Line]:
  first = last = None  # the prompts of the first samples at or after `start` and `stop`
  inside = where.start == 0
  for offset, raw in _raw_lines(where):
    if not raw.strip():
      continue
    line = _parse(offset, raw)
    if line.fault is None:
      prompt = line.sample["id"]
      if offset >= where.stop:
        last = prompt if last is None else last
        if prompt != last:
          return
      if not inside:
        first = prompt if first is None else first
        inside = prompt != first
    if inside:
      yield line


def _raw_lines(where: Range) -> Iterator[tuple[int, bytes]]:
  """Yields the offset and the bytes of the lines that begin at or after the start of a range.

  It continues after the range, to the end of the file.
  """
  at = max(where.start - 1, 0)  # the byte before tells whether a line begins at the start
  partial = where.start > 0
  buffer, read_to, ahead = b"", at, AHEAD_BYTES
  stop = min(where.stop + ahead, where.size)
  while read_to < where.size:
    (data,) = files.read_ranges([(where.path, read_to, stop)])
    read_to, ahead = stop, 2 * ahead
    stop = min(stop + ahead, where.size)
    *complete, buffer = (buffer + data).split(b"\n")
    for raw in complete:
      if not partial:
        yield at, raw
      partial = False
      at += len(raw) + 1
  if buffer and not partial:
    yield at, buffer


def _parse(offset: int, raw: bytes) -> Line:
  if offset == 0:
    raw = raw.removeprefix(codecs.BOM_UTF8)
  try:
    sample = json_io.parse(raw)
  except InputError as e:
    return _fault(offset, raw, f"not JSON: {e.__cause__}")
  if not isinstance(sample, dict):
    kind = type(sample).__name__
    return _fault(offset, raw, f"not a sample: expected a JSON object, found {kind}")
  for field, kinds in (("id", int | str), ("sample", int), ("text", str)):
    if not isinstance(sample.get(field), kinds):
      return _fault(offset, raw, f"not a sample: {field!r} is {sample.get(field)!r:.60}")
  return Line(offset, sample, None)


def _fault(offset: int, raw: bytes, fault: str) -> Line:
  text = raw.rstrip(b"\r").decode(errors="backslashreplace")
  return Line(offset, {"line": text}, Unjudgeable(fault))
