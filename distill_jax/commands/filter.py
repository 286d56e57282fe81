"""`filter`: the samples that are worth training on, and the others with the reason why not."""

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
from distill_jax.errors import InputError
from distill_jax.filters import Filter, Judged, Sample, Unjudgeable
from distill_jax.runtime import atomic_io, distributed, json_io
from distill_jax.runtime.progress import Progress
from distill_jax.types import JsonObject

SAMPLES, KEPT, REJECTED, SUMMARY = "samples.jsonl", "kept.jsonl", "rejected.jsonl", "filter.json"
READING = "read"  # the name under which a line that is not a sample is counted


def run(config: Config, folder: Path) -> JsonObject:
  """Passes samples through `filters`, in filter.order, into kept.jsonl and rejected.jsonl.

  Every line of filter.samples is in one of them, in its order. A rejected one has `rejected`:
  {"by": the filter, "why": what is counted, "detail": of this one}. A sample that a filter
  cannot judge (`filters.Unjudgeable`), or a line that is not one, is rejected too where
  filter.on_bad is "skip". The files are whole or not there; the same command makes the same ones
  again.

  Returns:
    samples, kept, rejected, and rejected_by, the counts {filter: {why: n}}; so does filter.json.

  Raises:
    InputError: no samples, or samples in disorder; a filter refuses its config or the machine;
      filter.on_bad is "stop" and there is something that cannot be judged.
    Preempted: SIGTERM was received; nothing is written.
  """
  policy = BadInputPolicy("filter.on_bad", config.filter.on_bad)
  filters = _ordered(config)
  path = Path(config.filter.samples or folder)
  path = path / SAMPLES if path.is_dir() else path
  if not path.is_file():
    raise InputError(f"{path} is not there; name in filter.samples what `generate` has written")
  result: JsonObject = {}
  distributed.run_on_process_0(lambda: result.update(_filter(filters, policy, path, folder)))
  return result


def _ordered(config: Config) -> dict[str, Filter]:
  """Returns the filters, first to last. A ConfigDict has no order of its own."""
  if not config.filters:
    raise InputError("filters is empty; add one as filters.right = config.filter('math')")
  order = config.filter.order or tuple(config.filters)
  if sorted(order) != sorted(config.filters) or (len(order) > 1 and not config.filter.order):
    raise InputError(
      f"filter.order is {config.filter.order} and filters holds {', '.join(config.filters)}; name "
      "each once, first to last"
    )
  return {name: config.filters[name] for name in order}


def _filter(
  filters: dict[str, Filter], policy: BadInputPolicy, path: Path, folder: Path
) -> JsonObject:
  for name in (KEPT, REJECTED):
    if path.resolve() == (folder / name).resolve():
      raise InputError(f"filter.samples is {path}, which would be replaced; take another --workdir")
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
  (folder / SUMMARY).unlink(missing_ok=True)  # never of other files than those beside it
  for part, name in zip(parts, (KEPT, REJECTED), strict=True):
    part.replace(folder / name)
  atomic_io.fsync_dir(folder)
  json_io.write_json(folder / SUMMARY, {"of": str(path), **result})
  return result


class FilterRun:
  """One pass of samples through filters, which writes and counts those that are rejected."""

  def __init__(
    self,
    filters: dict[str, Filter],
    policy: BadInputPolicy,
    path: Path,
    rejected: BinaryIO,
    progress: Progress,
  ):
    """Args:
    filters: by name, first to last.
    policy: what to do with what cannot be judged.
    path: the file of the samples, for errors.
    rejected: where the rejected ones are written.
    progress: is told of each sample.
    """
    self._filters, self._policy, self._path = filters, policy, path
    self._rejected, self._progress = rejected, progress
    self._counts: dict[str, Counter[str]] = {name: Counter() for name in (READING, *filters)}
    self._kept = 0

  def kept(self, samples: Iterator[Sample]) -> Iterator[Sample]:
    """Yields the samples that pass all filters; one filter's stream runs into the next."""
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
      name: of the filter, or READING.
      reason: see `Filter.select`.
      sample: is written with the reason.
      where: its place in the file, for errors.

    Raises:
      InputError: it cannot be judged, and the policy is to stop.
    """
    if isinstance(reason, Unjudgeable):
      by = "" if name == READING else f"filter {name!r} cannot judge it: "
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
  """Yields the samples of a file, with `of`, the number of samples of their prompt."""
  seen: set[int | str] = set()
  for prompt, group in itertools.groupby(_read(path, filter_run), key=lambda s: s["id"]):
    if prompt in seen:
      raise InputError(
        f"{path}: the samples of prompt {prompt} are not together; sort the lines by their id"
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
  """Returns a sample; or {"line": the text} and why that is not one."""
  line = {"line": raw.rstrip(b"\r\n").decode(errors="backslashreplace")}
  try:
    sample = json_io.parse(raw)
  except InputError as e:
    return Judged(line, Unjudgeable(f"not JSON: {e.__cause__}"))
  if not isinstance(sample, dict):
    kind = type(sample).__name__
    return Judged(line, Unjudgeable(f"no sample: it is {kind}, and a sample is an object"))
  for field, kinds in (("id", int | str), ("sample", int), ("text", str)):
    if not isinstance(sample.get(field), kinds):
      return Judged(line, Unjudgeable(f"no sample: {field!r} is {sample.get(field)!r:.60}"))
  return Judged(sample, None)
