"""The files that `generate` leaves in a workdir, whoever the teacher is."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distill_jax.errors import InputError
from distill_jax.generation.journal import SampleJournal
from distill_jax.generation.prompts import Prompts
from distill_jax.generation.scheduler import SampleKey
from distill_jax.runtime import atomic_io, json_io

SAMPLES, REJECTED, SUMMARY = "samples.jsonl", "samples.rejected.jsonl", "generate.json"
Row = dict[str, Any]  # a sample as finished.py keeps it: `prompt` is the prompt's number


def number(row: Row) -> SampleKey:
  return row["prompt"], row["sample"]


def write(folder: Path, rows: Iterable[Row], prompts: Prompts) -> None:
  """samples.jsonl: each sample tells what it answers; what a server did not say is left out."""

  def whole(row: Row) -> Row:
    prompt, about = prompts.said[row["prompt"]]
    rest = {k: v for k, v in row.items() if k not in ("prompt", "sample")}
    if not rest["tokens"]:
      del rest["tokens"]
    return {"id": row["prompt"], "sample": row["sample"], "prompt": prompt, "about": about, **rest}

  atomic_io.atomic_write(folder / SAMPLES, _lines(whole(row) for row in rows))


def write_rejected(folder: Path, prompts: Prompts, more: Iterable[Row] = ()) -> int:
  """samples.rejected.jsonl: prompts that cannot be used, and `more`. Returns how many."""
  rejected = [{"id": n, "reason": why} for n, why in prompts.rejected.items()]
  atomic_io.atomic_write(folder / REJECTED, _lines(rejected := [*rejected, *more]))
  return len(rejected)


def reasons(rows: Iterable[Row]) -> dict[str, int]:
  """How many samples ended for which reason."""
  return dict(sorted(collections.Counter(row["reason"] for row in rows).items()))


def before(folder: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
  """What an earlier run made of the same prompts: one, if it came to its end."""
  file = folder / SUMMARY
  if not file.exists():
    return []
  said = json.loads(file.read_text())
  if said.pop("of") != about:
    raise InputError(
      f"{folder} holds samples of other prompts or another teacher; choose another --workdir"
    )
  return [said | {"tokens_per_second": 0.0}]


def finish(
  folder: Path, about: dict[str, Any], result: dict[str, Any], finished: SampleJournal
) -> None:
  """The last thing that a run does."""
  json_io.write_json(folder / SUMMARY, {"of": about, **result})
  finished.remove()


def _lines(objects: Iterable[Any]) -> str:
  return "".join(json.dumps(o, ensure_ascii=False) + "\n" for o in objects)
