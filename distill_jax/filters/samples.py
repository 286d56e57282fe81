"""Helpers for filters: fields of samples, grouping by prompt, and judging in parallel."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from distill_jax.types import JsonObject

Sample = JsonObject
THINK_END = "</think>"


class Unjudgeable(str):
  """The reason why a sample cannot be judged, e.g. a missing answer key."""


class Judged(NamedTuple):
  """A sample and the reason to reject it, or None to keep it."""

  sample: Sample
  reason: str | None


def prompt_field(sample: Sample, field: str) -> Any:
  """Returns a field of the prompt's line, else of the sample, else None."""
  about = sample.get("about")
  if isinstance(about, dict) and field in about:
    return about[field]
  return sample.get(field)


def text_field(sample: Sample, field: str) -> str | Unjudgeable:
  """Returns a field (see `prompt_field`) as text; a number is converted to text."""
  value = prompt_field(sample, field)
  if isinstance(value, int | float) and not isinstance(value, bool):
    return str(value)
  if isinstance(value, str):
    return value
  return Unjudgeable(f"no {field}: it is {value!r:.60}, but must be text")


def number_field(sample: Sample, field: str) -> float | Unjudgeable:
  """Returns a numeric field of the sample."""
  value = sample.get(field)
  if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
    return float(value)
  return Unjudgeable(f"no {field}: it is {value!r:.60}, but must be a number")


def prompt_text(sample: Sample) -> str:
  """Returns the prompt as text; the contents of chat messages are joined by newlines."""
  prompt = sample.get("prompt")
  if isinstance(prompt, str):
    return prompt
  messages = prompt if isinstance(prompt, list) else []
  contents = [m.get("content") for m in messages if isinstance(m, dict)]
  return "\n".join(s for s in contents if isinstance(s, str))


def answer_part(text: str) -> str:
  """Returns the part of a text after its reasoning (after the last "</think>")."""
  return text.rpartition(THINK_END)[2]


def by_prompt(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
  """Yields the samples of each prompt as a list."""
  for _, group in itertools.groupby(samples, key=lambda s: s["id"]):
    yield list(group)


def judge_in_parallel(
  reject_reason: Callable[[Sample], str | None], samples: Iterable[Sample], workers: int
) -> Iterator[Judged]:
  """Judges samples in parallel and yields them in order.

  Args:
    reject_reason: Returns the reason to reject a sample, or None. Runs in a thread.
    samples: The samples.
    workers: The number of threads.
  """
  pool = ThreadPoolExecutor(workers)
  waiting: deque[tuple[Sample, Future[str | None]]] = deque()
  try:
    for sample in samples:
      waiting.append((sample, pool.submit(reject_reason, sample)))
      if len(waiting) > 2 * workers:
        first, reason = waiting.popleft()
        yield Judged(first, reason.result())
    while waiting:
      first, reason = waiting.popleft()
      yield Judged(first, reason.result())
  finally:
    pool.shutdown(cancel_futures=True)
