"""Judging of answers in parallel."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from distill_jax.filters._base import SampleFilter
from distill_jax.filters.samples import Judged, Sample


def judge_in_parallel(judge: SampleFilter, samples: Iterable[Sample]) -> Iterator[Judged]:
  """Judges samples in one thread per core and yields them in order.

  Threads suffice, because the judges that take long, `math` and `code`, work in other processes.
  """
  judge.prepare()
  workers = os.cpu_count() or 1
  pool = ThreadPoolExecutor(workers)
  waiting: deque[tuple[Sample, Future[str | None]]] = deque()
  try:
    for sample in samples:
      waiting.append((sample, pool.submit(judge.reject_reason, sample)))
      if len(waiting) > 2 * workers:
        first, reason = waiting.popleft()
        yield Judged(first, reason.result())
    while waiting:
      first, reason = waiting.popleft()
      yield Judged(first, reason.result())
  finally:
    pool.shutdown(cancel_futures=True)
