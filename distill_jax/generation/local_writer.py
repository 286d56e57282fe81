"""Writing of the samples of a local model, while the devices generate the next ones."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from distill_jax.data.tokenizers import Tokenizer
from distill_jax.generation import outputs
from distill_jax.generation.finished import ALL, Finished
from distill_jax.generation.job import GenerationJob
from distill_jax.generation.prompts import Prompt
from distill_jax.generation.scheduler import GeneratedSample
from distill_jax.generation.stops import Stops
from distill_jax.generation.to_records import PART, GeneratedStore, StoreWriter
from distill_jax.types import JsonObject

WRITE_EVERY_S = 1.0  # least time between the starts of two writes of finished samples, in seconds
MAX_WAITING = 1024  # finished samples that wait for the write in progress, at most


class LocalWriter:
  """Writes the samples of the first process in a thread, while the devices generate the next ones.

  Args:
    job: The job.
    folder: The workdir.
    origin: See SampleJournal.
    tokenizer: The tokenizer.
    stops: The end conditions of texts.
    store: A store that receives the texts too, or None.

  Attributes:
    journal: The journal.
  """

  def __init__(
    self,
    job: GenerationJob,
    folder: Path,
    origin: JsonObject,
    tokenizer: Tokenizer,
    stops: Stops,
    store: GeneratedStore | None,
  ):
    self._folder, self._origin, self._stops = folder, origin, stops
    self._store = StoreWriter(store, tokenizer) if store else None
    readers = (self._store,) if self._store else ()
    self.journal = outputs.open_journal(folder, origin, job.samples, readers)
    self._thread = ThreadPoolExecutor(1)
    self._writing: Future[None] | None = None
    self._started = 0.0  # when the last write began
    self._waiting: list[Finished] = []

  def add(self, samples: Sequence[GeneratedSample]) -> None:
    """Encodes samples and starts writing them, at most once per WRITE_EVERY_S."""
    self._waiting += map(self._finished, samples)
    is_due = time.monotonic() - self._started >= WRITE_EVERY_S
    is_free = self._writing is None or self._writing.done()
    if (is_due and is_free) or len(self._waiting) >= MAX_WAITING:
      self._write()

  def reject(self, prompt: Prompt) -> None:
    """Adds a prompt that cannot be used."""
    self._waiting.append(outputs.rejected_sample(prompt.number, ALL, prompt.rejected))
    self.add(())

  def _write(self) -> None:
    self.wait()
    waiting, self._waiting = self._waiting, []
    self._started = time.monotonic()
    self._writing = self._thread.submit(self.journal.add, waiting)

  def wait(self) -> None:
    """Waits for the write in progress."""
    if self._writing is not None:
      self._writing.result()
      self._writing = None

  def flush(self) -> None:
    """Writes all samples, and returns when they are stored."""
    self._write()
    self.wait()

  def _finished(self, s: GeneratedSample) -> Finished:
    prompt: Prompt = s.task.about
    row: JsonObject = {
      "text": self._stops.text(s.text_tokens),
      "token_count": len(s.tokens),
      "reason": s.reason,
      "logprob": sum(s.logps),
      "logprob_mean": sum(s.logps) / len(s.logps),
    }
    if self._store is None:
      return outputs.finished_sample(prompt, s.task.sample, row)
    record = self._store.encode(prompt.ids, s.tokens, s.records)
    length = len(prompt.ids) + len(s.tokens)
    return outputs.finished_sample(prompt, s.task.sample, row, {PART: record}, length)

  def finish(self, result: JsonObject) -> JsonObject:
    """Writes the output files and returns the result."""
    self.journal.finish()
    if self._store is not None:
      result = result | self._store.result
    return outputs.finish(self._folder, self._origin, self.journal, result)

  def close(self) -> None:
    """Waits for the write in progress and releases the store."""
    self._thread.shutdown()
    if self._store is not None:
      self._store.close()
