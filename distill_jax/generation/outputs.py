"""The files that `generate` leaves in a workdir, wherever the model runs."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from pathlib import Path

from distill_jax.data import jsonl
from distill_jax.errors import InputError
from distill_jax.generation.journal import SampleJournal
from distill_jax.generation.prompts import Prompts
from distill_jax.generation.scheduler import SampleKey
from distill_jax.runtime import json_io
from distill_jax.types import JsonObject

SAMPLES, REJECTED, SUMMARY = "samples.jsonl", "samples.rejected.jsonl", "generate.json"
JournalRow = JsonObject  # a sample as the journal keeps it: `prompt` is the prompt's number


def sample_key(row: JournalRow) -> SampleKey:
  return row["prompt"], row["sample"]


def write_samples(folder: Path, rows: Iterable[JournalRow], prompts: Prompts) -> None:
  """Writes samples.jsonl: each sample beside its prompt, without fields that a server left out."""

  def published(row: JournalRow) -> JsonObject:
    prompt = prompts.prompts[row["prompt"]]
    rest = {k: v for k, v in row.items() if k not in ("prompt", "sample")}
    if not rest["tokens"]:
      del rest["tokens"]
    head = {"id": row["prompt"], "sample": row["sample"]}
    return {**head, "prompt": prompt.content, "about": prompt.about, **rest}

  jsonl.write(folder / SAMPLES, map(published, rows))


def write_rejected(folder: Path, prompts: Prompts, samples: Iterable[JsonObject] = ()) -> int:
  """Writes samples.rejected.jsonl: prompts that cannot be used, and samples that were refused.

  Returns: how many there are.
  """
  rejected = [{"id": n, "reason": why} for n, why in prompts.rejected.items()]
  rejected += samples
  jsonl.write(folder / REJECTED, rejected)
  return len(rejected)


def count_reasons(rows: Iterable[JournalRow]) -> dict[str, int]:
  """How many samples ended for which reason."""
  return dict(sorted(collections.Counter(row["reason"] for row in rows).items()))


def finished_result(folder: Path, origin: JsonObject) -> JsonObject | None:
  """The result of an earlier run of the same prompts and model that came to its end; or None."""
  file = folder / SUMMARY
  if not file.exists():
    return None
  result = json_io.read_object(file, "choose another --workdir")
  if result.pop("of") != origin:
    raise InputError(
      f"{folder} holds samples of other prompts or another teacher; choose another --workdir"
    )
  return result | {"tokens_per_second": 0.0}


def finish(folder: Path, origin: JsonObject, result: JsonObject, journal: SampleJournal) -> None:
  """Writes the result, the last file of a run, and removes the journal."""
  json_io.write_json(folder / SUMMARY, {"of": origin, **result})
  journal.remove()
