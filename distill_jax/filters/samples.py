"""What the filters share: fields of a sample, its groups, and several judged at once."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

Sample = dict[str, Any]
Judged = tuple[Sample, str | None]
THINK_END = "</think>"


class Bad(str):
  """Why a sample cannot be judged."""


def given(sample: Sample, field: str) -> Any:
  """A field of the prompt's own line, else of the sample; None where there is none."""
  about = sample.get("about")
  if isinstance(about, dict) and field in about:
    return about[field]
  return sample.get(field)


def string(sample: Sample, field: str) -> str | Bad:
  """A field that is text; numbers are taken as they are written."""
  value = given(sample, field)
  if isinstance(value, int | float) and not isinstance(value, bool):
    return str(value)
  if isinstance(value, str):
    return value
  return Bad(f"no {field}: it is {value!r:.60} and ought to be text")


def number(sample: Sample, field: str) -> float | Bad:
  value = sample.get(field)
  if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
    return float(value)
  return Bad(f"no {field}: it is {value!r:.60} and ought to be a number")


def prompt_text(sample: Sample) -> str:
  """The prompt, or what is said in its messages, a line each."""
  prompt = sample.get("prompt")
  if isinstance(prompt, str):
    return prompt
  messages = prompt if isinstance(prompt, list) else []
  said = [m.get("content") for m in messages if isinstance(m, dict)]
  return "\n".join(s for s in said if isinstance(s, str))


def answer_part(text: str) -> str:
  """What comes after the reasoning."""
  return text.rpartition(THINK_END)[2]


def groups(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
  """The samples of each prompt."""
  for _, group in itertools.groupby(samples, key=lambda s: s["id"]):
    yield list(group)


def ordered(
  judge: Callable[[Sample], str | None], samples: Iterable[Sample], workers: int
) -> Iterator[Judged]:
  """Judges `workers` samples at once; they come back in order."""
  pool, waiting = ThreadPoolExecutor(workers), deque[tuple[Sample, Future[str | None]]]()
  try:
    for sample in samples:
      waiting.append((sample, pool.submit(judge, sample)))
      if len(waiting) > 2 * workers:
        done, verdict = waiting.popleft()
        yield done, verdict.result()
    while waiting:
      done, verdict = waiting.popleft()
      yield done, verdict.result()
  finally:
    pool.shutdown(cancel_futures=True)
