"""Summary of the verdicts on all segments, and the filters that compare all samples.

Memory: 8 bytes per prompt and 24 while they are compared. With comparing filters, also 20 bytes per
sample that the other filters kept and 12 per dropped one, besides what the filters take. Signatures
(512 bytes per sample with `near_duplicates`) and names (about 25 bytes) are in temporary files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distill_jax.filters import _verdicts
from distill_jax.filters._base import ComparingFilter
from distill_jax.filters._judge import Drop
from distill_jax.filters._verdicts import Counts

NAMES = ".names"  # not the name of a filter
DROP = np.dtype([("row", "i4"), ("other", "i4"), ("value", "f4")])


class Rows(NamedTuple):
  """The prompts of all segments, and their kept samples, numbered in order.

  Attributes:
    total: The number of lines.
    counts: The numbers of rejected lines.
    digest: A digest of the verdicts.
    all_prompts: A hash of each prompt, by segment.
    folder: The folder with a file of names and a file of signatures for each comparing filter.
    shapes: The shape and dtype of a signature, by filter; empty without samples.
    lines: The number of the line in its segment, int32 [N].
    prompts: A hash of the prompt, uint64 [N].
    names: The offset of the name in the file, int64 [N + 1].
    segments: The first row of each segment, and the number of rows.
  """

  total: int
  counts: Counts
  digest: str
  all_prompts: list[np.ndarray]
  folder: Path
  shapes: dict[str, tuple[tuple[int, ...], np.dtype]]
  lines: np.ndarray
  prompts: np.ndarray
  names: np.ndarray
  segments: np.ndarray


def collect(verdict_files: Sequence[str], folder: Path) -> Rows:
  """Reads files of verdicts.

  Args:
    verdict_files: A file per segment.
    folder: An empty local folder, for temporary files.
  """
  total, counts, digest, all_prompts = 0, Counts(), hashlib.sha256(), []
  lines, prompts, sizes = [np.zeros(0, np.int32)], [np.zeros(0, np.uint64)], [0]
  name_sizes = [np.zeros(1, np.int64)]
  shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
  for file in verdict_files:
    verdicts = _verdicts.read(file)
    total += verdicts.count
    counts = _verdicts.add_counts([counts, verdicts.counts])
    digest.update(verdicts.source.encode() + verdicts.patches)
    all_prompts.append(verdicts.prompts)
    lines.append(verdicts.kept_N)
    prompts.append(verdicts.kept_prompts_N)
    sizes.append(len(verdicts.kept_N))
    name_sizes.append(np.array([len(x) for x in verdicts.names.splitlines(True)], np.int64))
    _append(folder, NAMES, verdicts.names)
    for name, signatures in verdicts.signatures.items():
      _append(folder, name, signatures.tobytes())
      if len(signatures):
        shapes[name] = signatures.shape[1:], signatures.dtype
  return Rows(
    total=total,
    counts=counts,
    digest=digest.hexdigest(),
    all_prompts=all_prompts,
    folder=folder,
    shapes=shapes,
    lines=np.concatenate(lines),
    prompts=np.concatenate(prompts),
    names=np.cumsum(np.concatenate(name_sizes)),
    segments=np.cumsum(sizes),
  )


class Comparison:
  """The samples that comparing filters drop.

  Args:
    comparing: The filters by name, in order.
    rows: The samples.

  Attributes:
    counts: The numbers of dropped samples.
  """

  def __init__(self, comparing: Mapping[str, ComparingFilter], rows: Rows):
    self._comparing, self._rows = comparing, rows
    self._drops: dict[str, np.ndarray] = {}
    self.counts: Counts = {}
    alive = np.ones(len(rows.lines), bool)
    for name, (shape, dtype) in ((n, rows.shapes[n]) for n in comparing if n in rows.shapes):
      signatures = np.memmap(_file(rows.folder, name), dtype, "r", shape=(len(alive), *shape))
      found = comparing[name].compare(signatures, rows.prompts, np.flatnonzero(alive))
      drops = np.fromiter(found, DROP)
      alive[drops["row"]] = False
      self._drops[name] = drops
      if len(drops):
        whys = (comparing[name].reason("", float(v)).partition(": ")[0] for v in drops["value"])
        self.counts[name] = Counter(whys)

  def drops(self, segment: int) -> dict[int, Drop]:
    """Returns the filter and reason of each dropped line of a segment, by the line's number."""
    first, stop = self._rows.segments[segment : segment + 2]
    found = {}
    for name, drops in self._drops.items():
      start, end = np.searchsorted(drops["row"], [first, stop])
      for row, other, value in drops[start:end]:
        reason = self._comparing[name].reason(self._name(other), float(value))
        found[int(self._rows.lines[row])] = name, reason
    return found

  def _name(self, row: int) -> str:
    start, stop = (int(x) for x in self._rows.names[row : row + 2])
    with _file(self._rows.folder, NAMES).open("rb") as f:
      return json.loads(os.pread(f.fileno(), stop - start, start))


def repeated_prompt(all_prompts: Sequence[np.ndarray]) -> tuple[int, int] | None:
  """Returns (segment, hash) of the first prompt that occurs for a second time, or None.

  Args:
    all_prompts: A hash of each prompt, by segment.
  """
  everything = np.concatenate([np.zeros(0, np.uint64), *all_prompts])
  _, first = np.unique(everything, return_index=True)
  if len(first) == len(everything):
    return None
  place = np.setdiff1d(np.arange(len(everything)), first, assume_unique=True)[0]
  ends = np.cumsum([len(x) for x in all_prompts])
  return int(np.searchsorted(ends, place, "right")), int(everything[place])


def _append(folder: Path, name: str, data: bytes) -> None:
  with _file(folder, name).open("ab") as f:
    f.write(data)


def _file(folder: Path, name: str) -> Path:
  return folder / f"{name}.bin"
