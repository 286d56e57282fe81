"""Filters generated samples, e.g. keeps those with the correct answer.

Reads: filter.samples, a samples.jsonl file that `generate` wrote or its folder (default: the
workdir).

Writes: in the workdir: kept.jsonl, with the samples that pass all `filters`; rejected.jsonl, with
the others and the reason for each; and filter.json, with the counts.

Config: filter, filters.

Example:
  distill-jax filter --config=configs/grade_school.py --workdir=runs/grade_school/filtered
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from distill_jax.config import Config
from distill_jax.data import jsonl
from distill_jax.data.bad_input import BadInputPolicy
from distill_jax.errors import InputError, bad_value
from distill_jax.filters import Filter, Judged, Sample, Unjudgeable
from distill_jax.runtime import atomic_io, distributed, json_io
from distill_jax.runtime.progress import Progress
from distill_jax.types import JsonObject

SAMPLES, KEPT, REJECTED, SUMMARY = "samples.jsonl", "kept.jsonl", "rejected.jsonl", "filter.json"
READING = "read"  # counts lines that are not samples, next to the names of the filters


def run(config: Config, folder: Path) -> JsonObject:
  """Passes samples through `filters`, in filter.order, and writes kept.jsonl and rejected.jsonl.

  Every line of filter.samples is written to one of the two, in the same order. A rejected sample
  has a field `rejected`: {"by": the filter, "why": the kind of reason, "detail": the reason for
  this sample}. With filter.on_bad="skip", lines that are not samples and samples that a filter
  cannot judge (`filters.Unjudgeable`) are rejected, too. The files appear only when they are
  complete, and running the command again writes the same files.

  Returns:
    samples, kept, rejected, and rejected_by, the counts {filter: {why: n}}. filter.json has the
    same.

  Raises:
    InputError: The file is missing, or the samples of a prompt are not together; a filter cannot
      use its config or this machine; or filter.on_bad is "stop" and a sample cannot be judged.
    Preempted: SIGTERM was received; nothing is written.
  """
  policy = BadInputPolicy("filter.on_bad", config.filter.on_bad)
  filters = _ordered(config)
  path = Path(config.filter.samples or folder)
  path = path / SAMPLES if path.is_dir() else path
  if not path.is_file():
    expected = "an existing file of samples"
    raise bad_value("filter.samples", path, expected, "Run generate first, or correct the path")
  result: JsonObject = {}
  distributed.run_on_process_0(lambda: result.update(_filter(filters, policy, path, folder)))
  return result


def _ordered(config: Config) -> dict[str, Filter]:
  """Returns the filters in filter.order, because the keys of a ConfigDict are not ordered."""
  if not config.filters:
    action = "Add a filter, e.g. c.filters.right = config.filter('math')"
    raise InputError(f"filters is empty; expected at least one filter. {action}.")
  order = config.filter.order or tuple(config.filters)
  if sorted(order) != sorted(config.filters) or (len(order) > 1 and not config.filter.order):
    expected = (
      f"each name in filters once, in the order to apply them ({', '.join(config.filters)})"
    )
    raise bad_value("filter.order", config.filter.order, expected, "Correct it")
  return {name: config.filters[name] for name in order}


def _filter(
  filters: dict[str, Filter], policy: BadInputPolicy, path: Path, folder: Path
) -> JsonObject:
  for name in (KEPT, REJECTED):
    if path.resolve() == (folder / name).resolve():
      action = "Choose another --workdir"
      raise bad_value("filter.samples", path, "a file that this command does not replace", action)
  folder.mkdir(parents=True, exist_ok=True)
  parts = [folder / f".{name}.part" for name in (KEPT, REJECTED)]
  n_lines = sum(1 for _ in jsonl.read_lines(path, skip_bom=True))
  with (
    parts[0].open("wb") as kept,
    parts[1].open("wb") as rejected,
    distributed.Preemption() as stop,
    Progress("filter", n_lines, "samples") as progress,
  ):
    filter_run = FilterRun(filters, policy, path, rejected, progress)
    for n, sample in enumerate(filter_run.kept(_grouped(path, filter_run))):
      kept.write(jsonl.to_line(sample))
      filter_run.count_kept()
      if stop.reached(n):
        raise distributed.Preemption.stop("filter", "nothing is written")
    for f in (kept, rejected):
      f.flush()
      os.fsync(f.fileno())
  result = filter_run.result()
  assert result["samples"] == n_lines, f"{n_lines} lines, {result['samples']} kept or rejected"
  (folder / SUMMARY).unlink(missing_ok=True)  # it must not describe other files than these
  for part, name in zip(parts, (KEPT, REJECTED), strict=True):
    part.replace(folder / name)
  atomic_io.fsync_dir(folder)
  json_io.write_json(folder / SUMMARY, {"of": str(path), **result})
  return result


class FilterRun:
  """One pass of samples through the filters, which writes and counts rejected samples.

  Args:
    filters: the filters by name, in order.
    policy: the action for samples that cannot be judged.
    path: the file of the samples, for errors.
    rejected: the file for rejected samples.
    progress: the progress line.
  """

  def __init__(
    self,
    filters: dict[str, Filter],
    policy: BadInputPolicy,
    path: Path,
    rejected: BinaryIO,
    progress: Progress,
  ):

    self._filters, self._policy, self._path = filters, policy, path
    self._rejected, self._progress = rejected, progress
    self._counts: dict[str, Counter[str]] = {name: Counter() for name in (READING, *filters)}
    self._kept = 0

  def kept(self, samples: Iterator[Sample]) -> Iterator[Sample]:
    """Yields the samples that pass all filters; each filter reads the output of the one before."""
    for name, one_filter in self._filters.items():
      samples = self._passing(name, one_filter, samples)
    return samples

  def _passing(self, name: str, one_filter: Filter, samples: Iterator[Sample]) -> Iterator[Sample]:
    for sample, reason in one_filter.select(samples):
      if reason is None:
        yield sample
      else:
        self.reject(name, reason, sample, f"prompt {sample['id']}, sample {sample['sample']}")

  def reject(self, name: str, reason: str, sample: Sample, where: str) -> None:
    """Rejects a sample.

    Args:
      name: the name of the filter, or READING.
      reason: the reason; see `Filter.select`.
      sample: the sample, which is written with the reason.
      where: the position in the file, for errors.

    Raises:
      InputError: The sample cannot be judged, and the policy is to stop.
    """
    if isinstance(reason, Unjudgeable):
      by = "" if name == READING else f"filter {name!r} cannot judge the sample: "
      self._policy.reject(f"{self._path}, {where}", f"{by}{reason}")
    why, _, detail = reason.partition(": ")
    self._counts[name][why] += 1
    line = sample | {"rejected": {"by": name, "why": why, "detail": detail}}
    self._rejected.write(jsonl.to_line(line))
    self._progress.add(1, kept=self._kept)

  def count_kept(self) -> None:
    self._kept += 1
    self._progress.add(1, kept=self._kept)

  def result(self) -> JsonObject:
    rejected = sum(counts.total() for counts in self._counts.values())
    by = {name: dict(counts.most_common()) for name, counts in self._counts.items() if counts}
    return {
      "samples": self._kept + rejected,
      "kept": self._kept,
      "rejected": rejected,
      "rejected_by": by,
    }


def _grouped(path: Path, filter_run: FilterRun) -> Iterator[Sample]:
  """Yields the samples of a file, each with `of`, the number of samples for its prompt."""
  seen: set[int | str] = set()
  for prompt, group in itertools.groupby(_read(path, filter_run), key=lambda s: s["id"]):
    if prompt in seen:
      raise InputError(
        f"{path}: the samples of prompt {prompt} are not together. Sort the lines by id."
      )
    seen.add(prompt)
    together = list(group)
    yield from (sample | {"of": len(together)} for sample in together)


def _read(path: Path, filter_run: FilterRun) -> Iterator[Sample]:
  for line in jsonl.read_lines(path, skip_bom=True):
    sample, reason = _parse(line.raw)
    if reason is None:
      yield sample
    else:
      filter_run.reject(READING, reason, sample, f"line {line.number}")


def _parse(raw: bytes) -> Judged:
  """Returns the sample of a line, or {"line": the text} with the reason why it is not a sample."""
  line = {"line": raw.rstrip(b"\r\n").decode(errors="backslashreplace")}
  try:
    sample = json_io.parse(raw)
  except InputError as e:
    return Judged(line, Unjudgeable(f"not JSON: {e.__cause__}"))
  if not isinstance(sample, dict):
    kind = type(sample).__name__
    return Judged(line, Unjudgeable(f"not a sample: expected a JSON object, found {kind}"))
  for field, kinds in (("id", int | str), ("sample", int), ("text", str)):
    if not isinstance(sample.get(field), kinds):
      return Judged(line, Unjudgeable(f"not a sample: {field!r} is {sample.get(field)!r:.60}"))
  return Judged(sample, None)
