"""The output files of `generate`, for local models and for servers."""

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
JournalRow = JsonObject  # a sample's line of the journal; its `prompt` is the prompt's index


def sample_key(row: JournalRow) -> SampleKey:
  """Returns the indices of a line's prompt and sample."""
  return row["prompt"], row["sample"]


def write_samples(folder: Path, rows: Iterable[JournalRow], prompts: Prompts) -> None:
  """Writes samples.jsonl, in which each sample includes its prompt.

  The field `tokens` is omitted if the server did not return tokens.
  """

  def published(row: JournalRow) -> JsonObject:
    prompt = prompts.prompts[row["prompt"]]
    rest = {k: v for k, v in row.items() if k not in ("prompt", "sample")}
    if not rest["tokens"]:
      del rest["tokens"]
    head = {"id": row["prompt"], "sample": row["sample"]}
    return {**head, "prompt": prompt.content, "about": prompt.about, **rest}

  jsonl.write(folder / SAMPLES, map(published, rows))


def write_rejected(folder: Path, prompts: Prompts, samples: Iterable[JsonObject] = ()) -> int:
  """Writes samples.rejected.jsonl and returns the number of its lines.

  Args:
    folder: The workdir.
    prompts: The prompts, including those that cannot be used.
    samples: {"id", "sample", "reason"} for each sample that a server refused.
  """
  rejected = [{"id": n, "reason": why} for n, why in prompts.rejected.items()]
  rejected += samples
  jsonl.write(folder / REJECTED, rejected)
  return len(rejected)


def count_reasons(rows: Iterable[JournalRow]) -> dict[str, int]:
  """Returns the number of samples for each reason why they ended."""
  return dict(sorted(collections.Counter(row["reason"] for row in rows).items()))


def finished_result(folder: Path, origin: JsonObject) -> JsonObject | None:
  """Returns the result of a finished run with the same prompts and model, or None.

  Raises:
    InputError: If the folder has the result of other prompts or another model.
  """
  file = folder / SUMMARY
  if not file.exists():
    return None
  result = json_io.read_object(file, "Choose another --workdir")
  if result.pop("of") != origin:
    raise InputError(
      f"{folder} has samples of other prompts or another teacher. Choose another --workdir."
    )
  return result | {"tokens_per_second": 0.0}


def finish(folder: Path, origin: JsonObject, result: JsonObject, journal: SampleJournal) -> None:
  """Writes the result, which is the last file of a run, and removes the journal."""
  json_io.write_json(folder / SUMMARY, {"of": origin, **result})
  journal.remove()
