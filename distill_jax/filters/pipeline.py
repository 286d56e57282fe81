"""Filtering of samples: segment by segment, in several processes, and resumable.

A run has two passes over its segments. The first judges the samples with the filters that need one
prompt at a time, and writes the verdicts on each segment into WORKDIR/verdicts. Then the filters
that compare all samples read these files. The second pass writes the kept and the rejected samples
of each segment. Outputs do not depend on the number of processes, or on interruptions.

A process holds one block of samples in memory, at most MAX_BLOCK bytes and a prompt, however large
the files are. The samples are read twice.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from distill_jax import filters as filters_package
from distill_jax import registry
from distill_jax.errors import InputError, Unavailable, bad_value
from distill_jax.filters import _compare, _judge, _segments, _verdicts
from distill_jax.filters._base import ComparingFilter, Filter
from distill_jax.filters._judge import OUTPUTS, Chain
from distill_jax.filters._segments import Segment
from distill_jax.filters.options import FilterOptions
from distill_jax.runtime import distributed, files, json_io, slices
from distill_jax.runtime.progress import Progress
from distill_jax.runtime.worker_pool import Pool
from distill_jax.types import JsonObject

VERDICTS, COMPARED, SUMMARY = "verdicts", "compared.json", "filter.json"
MIN_BLOCK, MAX_BLOCK = 2**16, 2**22  # bytes of samples that a process judges at a time


class Run:
  """One call of the command `filter`.

  Args:
    filters: All filters by name, in order.
    options: The config section `filter`.
    samples: The samples to read, a path or URL.
    folder: The local folder of the run.
    root: The folder for the outputs, a path or URL.
  """

  def __init__(
    self,
    filters: Mapping[str, Filter | ComparingFilter],
    options: FilterOptions,
    samples: str,
    folder: Path,
    root: str,
  ):
    self._chain = _chain(filters, options.on_bad)
    identities = [one_filter.prepare() for one_filter in filters.values()]
    self._filters = _digest(repr(self._chain), *identities)
    self._samples, self._folder, self._root = samples, folder, root
    self._segments = _segments.find(samples)
    self._slice = options.slice
    index, count = slices.parse("filter.slice", options.slice)
    self._mine = [s for s in self._segments if s.number % count == index]
    self._workers = options.workers or len(os.sched_getaffinity(0))

  def __call__(self) -> JsonObject:
    """Filters the samples; see `commands.filter.run`."""
    source = _digest(*map(self._source, self._segments))
    if (finished := self._finished(source)) is not None:
      return finished
    for path in (str(self._folder / SUMMARY), self._path(SUMMARY)):
      files.remove(path)
    temporary = self._folder / f".filter-{self._slice.replace('/', '-')}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
      with distributed.Preemption() as stop:
        self._judge(stop)
        rows = _compare.collect([self._verdicts_of(s) for s in self._mine], temporary)
        self._check_prompts(rows)
        counts = rows.counts
        if not (self._slice and self._chain.comparing):
          comparison = _compare.Comparison(self._chain.comparing, rows)
          counts = _verdicts.add_counts([counts, comparison.counts])
          self._write(stop, rows, comparison)
    finally:
      shutil.rmtree(temporary, ignore_errors=True)
    rejected = sum(by.total() for by in counts.values())
    order = (_judge.READING, *self._chain.filters, *self._chain.comparing)
    result: JsonObject = {
      "samples": rows.total,
      "kept": rows.total - rejected,
      "rejected": rejected,
      "rejected_by": {name: dict(counts[name].most_common()) for name in order if name in counts},
    }
    if self._slice:
      return {"slice": self._slice, **result}
    self._finish({"of": self._samples, **result, "source": source})
    return result

  def _finished(self, source: str) -> JsonObject | None:
    """Returns the result of an earlier call that finished with the same samples, or None."""
    summary = self._folder / SUMMARY
    if not summary.is_file():
      return None
    found = json_io.read_object(summary, "Delete it and run filter again")
    if found.get("source") != source or not self._has_outputs():
      return None
    return {key: found[key] for key in ("samples", "kept", "rejected", "rejected_by")}

  def _has_outputs(self) -> bool:
    names = {segment.file for segment in self._segments}
    return all(names <= files.listing(self._path(folder)).keys() for folder in OUTPUTS)

  def _judge(self, stop: distributed.Preemption) -> None:
    """Writes the verdicts on the segments of this call that lack them."""
    folder = self._path(VERDICTS)
    found = {files.join(folder, name) for name in files.listing(folder)}
    todo = [s for s in self._mine if self._verdicts_of(s) not in found or not self._is_judged(s)]
    total, size = _bytes(self._mine), _bytes(todo)
    block = min(MAX_BLOCK, max(MIN_BLOCK, size // (4 * self._workers)))
    tasks = [(s, piece) for s in todo for piece in _segments.pieces(s.range, block)]
    parts = []
    with (
      Progress("filter", total, "bytes", start=total - size) as progress,
      self._pool(stop, len(tasks)) as pool,
    ):
      results = pool.map(_judge.judge, ((piece,) for _, piece in tasks))
      for (segment, piece), (_, part) in zip(tasks, results, strict=True):
        parts.append(part)
        progress.add(piece.stop - piece.start)
        if piece.stop == segment.range.stop:
          self._write_verdicts(segment, _verdicts.join(self._source(segment), parts))
          parts = []

  def _write_verdicts(self, segment: Segment, verdicts: _verdicts.Verdicts) -> None:
    if (again := _compare.repeated_prompt([verdicts.prompts])) is not None:
      raise _not_together(segment, again[1])
    _judge.check_unchanged(segment)
    if files.info(self._path(SUMMARY)) is not None:  # it was removed when this call began
      raise Unavailable(
        f"Another run has filtered the samples at {self._root}. Run the same command again."
      )
    for name in OUTPUTS:
      files.remove(self._path(name, segment.file))
    verdicts.write(self._verdicts_of(segment))

  def _is_judged(self, segment: Segment) -> bool:
    try:
      return _verdicts.read(self._verdicts_of(segment)).source == self._source(segment)
    except InputError:  # damaged
      return False

  def _check_prompts(self, rows: _compare.Rows) -> None:
    if (again := _compare.repeated_prompt(rows.all_prompts)) is not None:
      raise _not_together(self._mine[again[0]], again[1])

  def _write(
    self, stop: distributed.Preemption, rows: _compare.Rows, comparison: _compare.Comparison
  ) -> None:
    """Writes the outputs of the segments of this call that lack them."""
    if self._chain.comparing:
      compared = self._path(VERDICTS, COMPARED)
      if files.info(compared) is None or files.read(compared).decode() != rows.digest:
        for name in OUTPUTS:
          files.remove_tree(self._path(name))
        files.write(compared, rows.digest.encode())
    written = files.listing(self._path(OUTPUTS[-1]))
    todo = [(i, s) for i, s in enumerate(self._mine) if s.file not in written]
    total = _bytes(self._mine)
    with (
      Progress("write", total, "bytes", start=total - _bytes(s for _, s in todo)) as progress,
      self._pool(stop, len(todo)) as pool,
    ):
      tasks = ((s, self._verdicts_of(s), self._root, comparison.drops(i)) for i, s in todo)
      for (segment, *_), _ in pool.map(_judge.write, tasks):
        progress.add(segment.range.stop - segment.range.start)

  def _finish(self, summary: JsonObject) -> None:
    """Removes the outputs of an earlier call with more segments, and writes the summary."""
    names = {segment.file for segment in self._segments}
    for folder in OUTPUTS:
      for name in set(files.listing(self._path(folder), "*.jsonl")) - names:
        files.remove(self._path(folder, name))
    json_io.write_json(self._folder / SUMMARY, summary)
    if self._root != str(self._folder):
      files.upload(self._folder / SUMMARY, self._path(SUMMARY))
    files.remove_tree(self._path(VERDICTS))

  def _pool(self, stop: distributed.Preemption, tasks: int) -> Pool:
    kept = "the segments that it has finished are kept"
    stopped = distributed.Preemption.stop("filter", kept)
    folders = functools.partial(registry.use_folders, "filters", [*filters_package.__path__])
    workers = min(self._workers, tasks)
    return Pool(workers, self._chain, stop.reached, stopped, "filter", folders)

  def _path(self, *names: str) -> str:
    return files.join(self._root, "/".join(names))

  def _verdicts_of(self, segment: Segment) -> str:
    return self._path(VERDICTS, f"{segment.number:05}.npz")

  def _source(self, segment: Segment) -> str:
    return _digest(repr(segment), self._filters)


def _chain(filters: Mapping[str, Filter | ComparingFilter], on_bad: str) -> Chain:
  names = list(filters)
  comparing = {name: f for name, f in filters.items() if isinstance(f, ComparingFilter)}
  if names[len(names) - len(comparing) :] != list(comparing):
    order = tuple(name for name in names if name not in comparing) + tuple(comparing)
    expected = f"filters that compare all samples last ({', '.join(comparing)})"
    raise bad_value("filter.order", tuple(names), expected, f"Set it to {order}")
  others = {name: f for name, f in filters.items() if isinstance(f, Filter)}
  return Chain(others, comparing, on_bad)


def _not_together(segment: Segment, prompt: int) -> InputError:
  """Returns the error for a prompt, given by its hash, that is in two places."""
  groups = _segments.prompts(segment.range)
  lines = (line for group in groups for line in group if line.fault is None)
  name = next(line.sample["id"] for line in lines if _judge.prompt_hash(line.sample) == prompt)
  return InputError(
    f"{segment.range.path}: the samples of prompt {name} are not together. Sort the lines by id."
  )


def _bytes(segments: Iterable[Segment]) -> int:
  return sum(segment.range.stop - segment.range.start for segment in segments)


def _digest(*texts: str) -> str:
  return hashlib.sha256("\n".join(texts).encode(errors="surrogateescape")).hexdigest()
