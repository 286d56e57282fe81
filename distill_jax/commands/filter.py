"""`filter`: the samples that are worth learning from, and the others with the reason why not."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from distill_jax.config import Config
from distill_jax.errors import InputError
from distill_jax.filters.samples import Bad, Judged, Sample
from distill_jax.runtime import atomic_io, distributed, json_io
from distill_jax.runtime.progress import Progress

SAMPLES, KEPT, REJECTED, SUMMARY = "samples.jsonl", "kept.jsonl", "rejected.jsonl", "filter.json"
READING = "read"  # the name under which a line that is no sample is counted
ON_BAD = ("stop", "skip")


def run(config: Config, folder: Path) -> dict[str, Any]:
  """Passes samples through `filters`, in filter.order, into kept.jsonl and rejected.jsonl.

  Every line of filter.samples is in one of them, in its order. A rejected one has `rejected`:
  {"by": the filter, "why": what is counted, "detail": of this one}. A sample that a filter
  cannot judge (`_sample.Bad`), or a line that is none, is rejected too where filter.on_bad is
  "skip". The files are whole or not there; the same command makes the same ones again.

  Returns: samples, kept, rejected, and rejected_by, the counts {filter: {why: n}}; so does
    filter.json.

  Raises:
    InputError: no samples, or samples in disorder; a filter refuses its config or the machine;
      filter.on_bad is "stop" and there is something that cannot be judged.
    Preempted: SIGTERM came; nothing is written.
  """
  if config.filter.on_bad not in ON_BAD:
    raise InputError(f"filter.on_bad is {config.filter.on_bad!r}; it can be one of {ON_BAD}")
  _ordered(config)
  path = Path(config.filter.samples or folder)
  path = path / SAMPLES if path.is_dir() else path
  if not path.is_file():
    raise InputError(f"{path} is not there; name in filter.samples what `generate` has written")
  result: dict[str, Any] = {}
  distributed.run_on_process_0(lambda: result.update(_run(config, path, folder)))
  return result


def _ordered(config: Config) -> dict[str, Any]:
  """The filters, first to last. A ConfigDict has no order of its own."""
  if not config.filters:
    raise InputError("filters is empty; add one as filters.right = config.filter('math')")
  order = config.filter.order or tuple(config.filters)
  if sorted(order) != sorted(config.filters) or (len(order) > 1 and not config.filter.order):
    raise InputError(
      f"filter.order is {config.filter.order} and filters holds {', '.join(config.filters)}; name "
      "each once, first to last"
    )
  return {name: config.filters[name] for name in order}


def _run(config: Config, path: Path, folder: Path) -> dict[str, Any]:
  for name in (KEPT, REJECTED):
    if path.resolve() == (folder / name).resolve():
      raise InputError(f"filter.samples is {path}, which would be replaced; take another --workdir")
  folder.mkdir(parents=True, exist_ok=True)
  parts = [folder / f".{name}.part" for name in (KEPT, REJECTED)]
  lines = _count(path)
  with (
    parts[0].open("wb") as kept,
    parts[1].open("wb") as rejected,
    distributed.Preemption() as stop,
    Progress("filter", lines, "samples") as progress,
  ):
    fate = _Fate(config, path, rejected, progress)
    for n, sample in enumerate(fate.kept(_read(path, fate))):
      kept.write(_line(sample))
      fate.count_kept()
      if stop.reached(n):
        raise distributed.Preemption.stop("filter", "nothing is written")
    for f in (kept, rejected):
      f.flush()
      os.fsync(f.fileno())
  result = fate.result()
  assert result["samples"] == lines, f"{lines} lines and {result['samples']} fates"
  (folder / SUMMARY).unlink(missing_ok=True)  # never of other files than those beside it
  for part, name in zip(parts, (KEPT, REJECTED), strict=True):
    part.replace(folder / name)
  atomic_io.fsync_dir(folder)
  json_io.write_json(folder / SUMMARY, {"of": str(path), **result})
  return result


class _Fate:
  """What becomes of each sample, written and counted."""

  def __init__(self, config: Config, path: Path, rejected: Any, progress: Progress):
    self._filters, self._on_bad, self._path = _ordered(config), config.filter.on_bad, path
    self._rejected, self._progress = rejected, progress
    self._by: dict[str, Counter[str]] = {name: Counter() for name in (READING, *self._filters)}
    self._kept = 0

  def kept(self, samples: Iterator[Sample]) -> Iterator[Sample]:
    """Those that pass all filters; one stream runs into the next."""
    for name, judge in self._filters.items():
      samples = self._stage(name, judge, samples)
    return samples

  def _stage(self, name: str, judge: Any, samples: Iterable[Sample]) -> Iterator[Sample]:
    judged: Iterable[Judged] = (
      judge.select(samples) if hasattr(judge, "select") else ((s, judge.keep(s)) for s in samples)
    )
    for sample, why in judged:
      if why is None:
        yield sample
      else:
        self.reject(name, why, sample, f"prompt {sample['id']}, sample {sample['sample']}")

  def reject(self, name: str, why: str, sample: Sample, where: str) -> None:
    if isinstance(why, Bad) and self._on_bad == "stop":
      judge = "" if name == READING else f"filter {name!r} cannot judge it: "
      raise InputError(f"{self._path}, {where}: {judge}{why}; mend it, or set filter.on_bad=skip")
    kind, _, detail = why.partition(": ")
    self._by[name][kind] += 1
    self._rejected.write(_line(sample | {"rejected": {"by": name, "why": kind, "detail": detail}}))
    self._tell()

  def count_kept(self) -> None:
    self._kept += 1
    self._tell()

  def _tell(self) -> None:
    self._progress.add(1, kept=self._kept)

  def result(self) -> dict[str, Any]:
    rejected = sum(counts.total() for counts in self._by.values())
    by = {name: dict(counts.most_common()) for name, counts in self._by.items() if counts}
    return {
      "samples": self._kept + rejected,
      "kept": self._kept,
      "rejected": rejected,
      "rejected_by": by,
    }


def _read(path: Path, fate: _Fate) -> Iterator[Sample]:
  """The samples, with `of`, how many their prompt has."""
  seen: set[Any] = set()
  for number, group in itertools.groupby(_samples(path, fate), key=lambda s: s["id"]):
    if number in seen:
      raise InputError(
        f"{path}: the samples of prompt {number} are not together; sort the lines by their id"
      )
    seen.add(number)
    together = list(group)
    yield from (sample | {"of": len(together)} for sample in together)


def _samples(path: Path, fate: _Fate) -> Iterator[Sample]:
  with path.open("rb") as lines:
    for n, raw in enumerate(lines, 1):
      if not raw.strip():
        continue
      sample, why = _parse(raw)
      if why is None:
        yield sample
      else:
        fate.reject(READING, why, sample, f"line {n}")


def _parse(raw: bytes) -> Judged:
  """A sample; or {"line": what stands there} and why that is none."""
  line = {"line": raw.rstrip(b"\r\n").decode(errors="backslashreplace")}
  try:
    sample = json.loads(raw)
  except (ValueError, RecursionError) as e:
    return line, Bad(f"not JSON: {e}")
  if not isinstance(sample, dict):
    return line, Bad(f"no sample: it is {type(sample).__name__}, and a sample is an object")
  for field, kind in (("id", int | str), ("sample", int), ("text", str)):
    if not isinstance(sample.get(field), kind):
      return line, Bad(f"no sample: {field!r} is {sample.get(field)!r:.60}")
  return sample, None


def _line(sample: Sample) -> bytes:
  try:
    return json.dumps(sample, ensure_ascii=False).encode() + b"\n"
  except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell and UTF-8 cannot
    return json.dumps(sample).encode() + b"\n"


def _count(path: Path) -> int:
  with path.open("rb") as lines:
    return sum(bool(line.strip()) for line in lines)
