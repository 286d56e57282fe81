"""The output files of `generate`, for local models and for servers.

samples/00000.jsonl, …: The samples in the order of (prompt, sample), one per line.
samples.rejected/00000.jsonl, …: The prompts and samples that cannot be generated, in the same
  order: {"id", "sample" (only of a sample), "reason"}.
responses/00000.jsonl, …: With server.top_logprobs, the responses of the servers.
generate.json: The result, which is written last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from distill_jax.data import jsonl
from distill_jax.errors import InputError
from distill_jax.generation.finished import ALL, Finished
from distill_jax.generation.journal import Reader, SampleJournal
from distill_jax.generation.prompts import Prompt
from distill_jax.generation.segments import REJECTED, SAMPLES, Segments
from distill_jax.runtime import files, json_io, storage
from distill_jax.types import JsonObject

SUMMARY = "generate.json"


def finished_sample(
  prompt: Prompt,
  sample: int,
  row: JsonObject,
  parts: dict[str, bytes] | None = None,
  length: int = 0,
) -> Finished:
  """Returns a finished sample for the journal.

  Args:
    prompt: The prompt.
    sample: The index of the sample.
    row: The fields of the sample's line that do not come from the prompt.
    parts: The other bytes to keep.
    length: See Finished.
  """
  head = {"id": prompt.number, "sample": sample, "prompt": prompt.content, "about": prompt.about}
  line = jsonl.to_line({**head, **row})
  kept = {SAMPLES: line, **(parts or {})}
  return Finished(prompt.number, sample, kept, row["reason"], row["token_count"], length)


def rejected_sample(prompt: int, sample: int, reason: str) -> Finished:
  """Returns a sample, or ALL of a prompt, that cannot be generated, for the journal."""
  which = {} if sample == ALL else {"sample": sample}
  return Finished(
    prompt, sample, {REJECTED: jsonl.to_line({"id": prompt, **which, "reason": reason})}
  )


def open_journal(
  folder: Path, origin: JsonObject, samples: int, more: tuple[Reader, ...] = ()
) -> SampleJournal:
  """Returns the journal of a workdir.

  Args:
    folder: The workdir.
    origin: A description of the prompts and the model.
    samples: The number of samples per prompt.
    more: Further readers of the log.
  """
  (folder / SAMPLES).mkdir(parents=True, exist_ok=True)  # marks a mirror as in use
  where = storage.location(folder)
  segments = Segments()
  journal = SampleJournal(where, origin, samples, (segments, *more))
  segments.check(where)
  return journal


def finished_result(folder: Path, origin: JsonObject) -> JsonObject | None:
  """Returns the result of a finished run with the same prompts and model, or None.

  Raises:
    InputError: If the folder has the result of other prompts or another model.
  """
  file = files.join(storage.location(folder), SUMMARY)
  if files.info(file) is None:
    return None
  result = json_io.parse_object(files.read(file), file, "Choose another --workdir")
  if result.pop("of") != origin:
    raise InputError(
      f"{folder} has samples of other prompts or another teacher. Choose another --workdir."
    )
  return result | {"tokens_per_second": 0.0}


def finish(
  folder: Path, origin: JsonObject, journal: SampleJournal, result: JsonObject
) -> JsonObject:
  """Writes the result, which is the last file of a run, removes the log, and returns the result."""
  counts = journal.counts
  result = {
    **result,
    "rejected": counts.rejected,
    "samples": counts.samples,
    "tokens": counts.tokens,
    **dict(sorted(counts.reasons.items())),
  }
  text = json.dumps({"of": origin, **result}, indent=1, sort_keys=True) + "\n"
  files.write(files.join(storage.location(folder), SUMMARY), text.encode())
  journal.remove()
  return result


def read(folder: Path | str, name: str = SAMPLES) -> Iterator[JsonObject]:
  """Yields the objects of all segments of a workdir, in order.

  Args:
    folder: The workdir.
    name: SAMPLES, REJECTED or RESPONSES.
  """
  where = files.join(storage.location(folder), name)
  for file in files.listing(where, "*.jsonl"):
    for line in jsonl.read_lines(files.join(where, file)):
      yield line.object()
