"""Judging of samples, and writing of the kept and the rejected ones. Both run in worker
processes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from distill_jax.data import jsonl
from distill_jax.data.bad_input import BadInputPolicy
from distill_jax.errors import InputError
from distill_jax.filters import _segments, _verdicts
from distill_jax.filters._base import ComparingFilter, Filter
from distill_jax.filters._segments import Line, Range, Segment
from distill_jax.filters._verdicts import Counts, Verdicts
from distill_jax.filters.samples import Sample, Unjudgeable
from distill_jax.runtime import files

OUTPUTS = ("kept", "rejected")  # folders with a file for each segment
READING = "read"  # counts lines that are not samples, next to the names of the filters
Drop = tuple[str, str]  # the name of a filter, and its reason


@dataclasses.dataclass(frozen=True)
class Chain:
  """The filters of a run.

  Attributes:
    filters: The filters by name, in order, that judge a prompt at a time.
    comparing: The filters that compare all samples; they are applied after the others.
    on_bad: filter.on_bad.
  """

  filters: Mapping[str, Filter]
  comparing: Mapping[str, ComparingFilter]
  on_bad: str


class Outcome(NamedTuple):
  """The outcome for one line.

  Attributes:
    sample: The sample with the fields that filters add, or {"line": the text}.
    added: Those fields.
    drop: The filter that rejects it with the reason, or None.
  """

  sample: Sample
  added: Sample
  drop: Drop | None


def judge(chain: Chain, where: Range) -> Verdicts:
  """Judges the samples of a range.

  Raises:
    InputError: A sample cannot be judged, and filter.on_bad is "stop".
  """
  outcomes: list[Outcome] = []
  prompts = []
  for lines in _segments.prompts(where):
    outcomes += _judge_prompt(chain, where.path, lines)
    prompts += [prompt_hash(line.sample) for line in lines if line.fault is None][:1]
  counts: Counts = {}
  for outcome in outcomes:
    if outcome.drop is not None:
      name, reason = outcome.drop
      counts.setdefault(name, Counter())[reason.partition(": ")[0]] += 1
  kept = (
    [i for i, outcome in enumerate(outcomes) if outcome.drop is None] if chain.comparing else []
  )
  samples = [outcomes[i].sample for i in kept]
  return Verdicts(
    source="",
    counts=counts,
    count=len(outcomes),
    patches=b"".join(map(_patch, outcomes)),
    prompts=np.array(prompts, np.uint64),
    kept_N=np.array(kept, np.int32),
    kept_prompts_N=np.array([prompt_hash(sample) for sample in samples], np.uint64),
    names=b"".join(_name(sample) for sample in samples),
    signatures={
      name: np.array([one_filter.signature(sample) for sample in samples])
      for name, one_filter in chain.comparing.items()
    },
  )


def _judge_prompt(chain: Chain, path: str, lines: list[Line]) -> list[Outcome]:
  policy = BadInputPolicy("filter.on_bad", chain.on_bad)
  drops: dict[int, Drop] = {}
  alive = [i for i, line in enumerate(lines) if line.fault is None]
  found = {i: lines[i].sample | {"of": len(alive)} for i in alive}
  for i, line in enumerate(lines):
    if line.fault is not None:
      if policy.stop:
        policy.reject(f"{path}, line {_line_number(path, line.offset)}", line.fault)
      drops[i] = READING, line.fault
  for name, one_filter in chain.filters.items():
    if not alive:
      break
    judged = list(one_filter.select([found[i] for i in alive]))
    for i, (sample, reason) in zip(alive, judged, strict=True):
      found[i] = sample
      if isinstance(reason, Unjudgeable):
        where = f"{path}, prompt {sample['id']}, sample {sample['sample']}"
        policy.reject(where, f"filter {name!r} cannot judge the sample: {reason}")
      if reason is not None:
        drops[i] = name, reason
    alive = [i for i in alive if i not in drops]
  outcomes = []
  for i, line in enumerate(lines):
    sample = found.get(i, line.sample)
    added = {k: v for k, v in sample.items() if k not in line.sample or v is not line.sample[k]}
    outcomes.append(Outcome(sample, added, drops.get(i)))
  return outcomes


def _patch(outcome: Outcome) -> bytes:
  drop = {} if outcome.drop is None else {"rejected": _reason(*outcome.drop)}
  return jsonl.to_line({"add": outcome.added} | drop)


def write(
  chain: Chain, segment: Segment, verdicts_file: str, root: str, drops: dict[int, Drop]
) -> None:
  """Writes the kept and the rejected samples of a segment.

  Args:
    chain: The filters.
    segment: The segment.
    verdicts_file: The file with the verdicts of `judge`.
    root: The folder of the run, a path or URL.
    drops: Lines, by number, that comparing filters reject.
  """
  patches = _verdicts.read(verdicts_file).patches.splitlines()
  kept_file, rejected_file = (files.join(root, f"{name}/{segment.file}") for name in OUTPUTS)
  with files.open_write(rejected_file) as rejected, files.open_write(kept_file) as kept:
    lines = (line for group in _segments.prompts(segment.range) for line in group)
    for number, (line, patch) in enumerate(zip(lines, patches, strict=True)):
      verdict: dict[str, Any] = json.loads(patch)
      row = line.sample | verdict["add"]
      if number in drops:
        verdict["rejected"] = _reason(*drops[number])
      if "rejected" in verdict:
        rejected.write(jsonl.to_line(row | {"rejected": verdict["rejected"]}))
      else:
        kept.write(jsonl.to_line(row))
    check_unchanged(segment)


def check_unchanged(segment: Segment) -> None:
  """Raises InputError if the file of a segment has changed since it was listed."""
  found = files.info(segment.range.path)
  if found is None or (found.size, found.version) != (segment.range.size, segment.version):
    raise InputError(f"{segment.range.path} has changed while it was filtered. Run filter again.")


def prompt_hash(sample: Sample) -> int:
  """Returns a hash of a sample's prompt, a 64-bit number."""
  raw = json.dumps(sample["id"]).encode()
  return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def _name(sample: Sample) -> bytes:
  """Returns a sample's name as a line; see `Verdicts.names`."""
  return jsonl.to_line(f"prompt {sample['id']}, sample {sample['sample']}")


def _reason(name: str, reason: str) -> dict[str, str]:
  why, _, detail = reason.partition(": ")
  return {"by": name, "why": why, "detail": detail}


def _line_number(path: str, offset: int) -> int:
  """Returns the number of the line that begins at an offset. The file is read up to there."""
  newlines = 0
  with files.open_read(path) as f:
    while offset > 0 and (data := f.read(min(offset, 2**20))):
      newlines, offset = newlines + data.count(b"\n"), offset - len(data)
  return newlines + 1
