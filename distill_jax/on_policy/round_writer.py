"""Writing of the texts of a round, by process 0, while the devices sample the next ones.

A shard is written when its last text is finished, also if the round is then stopped. Texts are
started in the order of their rows. So memory holds the texts of generate.batch_size rows, those
that end while the longest of them is sampled, and the shards that they begin: 8 bytes per token.
Rewards are computed when a shard is written.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distill_jax.filters import Sample, SampleFilter
from distill_jax.generation.prompts import Prompt
from distill_jax.generation.scheduler import GeneratedSample
from distill_jax.generation.stops import Stops
from distill_jax.on_policy import rewards, round_counts
from distill_jax.records import fields
from distill_jax.records import manifest as manifest_lib
from distill_jax.records.fields import Record
from distill_jax.records.manifest import Manifest
from distill_jax.records.shard_writer import writing
from distill_jax.records.store import Writer
from distill_jax.runtime import distributed, files, json_io, storage
from distill_jax.types import JsonObject

ROLLOUTS, COUNTS = "rollouts", "counts"  # folders in that of a teacher
MAX_WAITING = 2  # finished shards that wait for the one that is being written, at most


class Row(NamedTuple):
  """The place of a text.

  Attributes:
    teacher: The name of the teacher.
    at: The row in the teacher's store.
    prompt: The prompt.
  """

  teacher: str
  at: int
  prompt: Prompt


class Text(NamedTuple):
  """A finished text.

  Attributes:
    row: Its place.
    sample: The index of the sample.
    tokens: int32, the sampled tokens, with the one that ended the text.
    text_tokens: Their number without the one that ended the text.
    logps: float32, their log-probabilities.
    reason: Why the text ended.
  """

  row: Row
  sample: int
  tokens: np.ndarray
  text_tokens: int
  logps: np.ndarray
  reason: str

  @classmethod
  def of(cls, s: GeneratedSample) -> Text:
    """Returns the text of a finished sample, whose task is about its Row."""
    tokens, logps = np.array(s.tokens, np.int32), np.array(s.logps, np.float32)
    return cls(s.task.about, s.task.sample, tokens, len(s.text_tokens), logps, s.reason)


@dataclasses.dataclass
class _Shard:
  """A shard that is begun: its rows, and its finished texts by row."""

  rows: range
  texts: dict[int, Text] = dataclasses.field(default_factory=dict)


class RoundWriter:
  """Writes the stores of a round. Use it as a context manager.

  Args:
    folder: The folder of the round.
    manifests: The manifest of each teacher's store.
    stops: What turns tokens into text, for rewards.
    judge: The filter whose verdicts are the rewards; None for no rewards.
  """

  def __init__(
    self,
    folder: Path,
    manifests: Mapping[str, Manifest],
    stops: Stops,
    judge: SampleFilter | None,
  ):
    self._folder, self._stops, self._judge = folder, stops, judge
    self._thread = ThreadPoolExecutor(1)
    self._writing: collections.deque[Future[None]] = collections.deque()
    self._failure: BaseException | None = None  # the first one of another thread
    self._begun: dict[tuple[str, int], _Shard] = {}  # by teacher and first row
    self._since = time.monotonic()
    self._writers: dict[str, Writer] = {}
    with contextlib.ExitStack() as stack:
      for name, manifest in manifests.items():
        path = folder / name / ROLLOUTS
        same = manifest_lib.with_shards_of(storage.location(path), manifest)
        self._writers[name] = stack.enter_context(Writer(path, same))
      self._open = stack.pop_all()

  def missing(self) -> dict[str, list[range]]:
    """Returns the rows of the shards of each teacher that are not finished."""
    return {name: writer.missing() for name, writer in self._writers.items()}

  def start(self) -> None:
    """Begins to measure the time of sampling."""
    self._since = time.monotonic()

  def add(self, samples: Iterable[GeneratedSample]) -> None:
    """Takes finished samples, and starts to write the shards that are complete.

    Raises:
      InputError: In a run of one process: an earlier shard failed, as in `finish`.
    """
    for s in samples:
      text = Text.of(s)
      shard = self._shard_of(text.row)
      shard.texts[text.row.at] = text
      if len(shard.texts) == len(shard.rows):
        del self._begun[text.row.teacher, shard.rows.start]
        self._start_writing(text.row.teacher, shard)

  def _shard_of(self, row: Row) -> _Shard:
    manifest = self._writers[row.teacher].manifest
    size = manifest.sequences_per_shard  # a store of a round is never extended
    rows = manifest.ranges[row.at // size]
    return self._begun.setdefault((row.teacher, rows.start), _Shard(rows))

  def _start_writing(self, teacher: str, shard: _Shard) -> None:
    while self._writing and (len(self._writing) > MAX_WAITING or self._writing[0].done()):
      self._wait_for_first()
    if self._failure is not None and distributed.process_count() == 1:
      raise self._failure  # others would wait for this process, so they learn of it in `finish`
    now = time.monotonic()
    seconds, self._since = now - self._since, now
    texts = [shard.texts[i] for i in shard.rows]
    self._writing.append(self._thread.submit(self._write, teacher, shard.rows, texts, seconds))

  def _wait_for_first(self) -> None:
    error = self._writing.popleft().exception()
    self._failure = self._failure or error

  def _write(self, teacher: str, rows: range, texts: Sequence[Text], seconds: float) -> None:
    writer, judge = self._writers[teacher], self._judge
    given = [] if judge is None else rewards.of_texts(judge, map(self._sample, texts))
    counts = round_counts.count(
      [t.reason for t in texts], [len(t.tokens) for t in texts], given, seconds
    )
    file = self._counts_of(teacher, rows)
    with writing(file):
      files.write(file, json.dumps(counts).encode())
    pairs = itertools.zip_longest(texts, given)
    records = (record(t, writer.manifest.seq_len, reward) for t, reward in pairs)
    writer.write_shard(rows, records)  # last, so that a finished shard is counted

  def _counts_of(self, teacher: str, rows: range) -> str:
    number = self._writers[teacher].manifest.ranges.index(rows)
    return files.join(storage.location(self._folder / teacher), f"{COUNTS}/{number:05d}.json")

  def _sample(self, t: Text) -> Sample:
    prompt = t.row.prompt
    return {
      "id": prompt.number,
      "sample": t.sample,
      "prompt": prompt.content,
      "about": prompt.about,
      "text": self._stops.text(t.tokens[: t.text_tokens].tolist()),
      "token_count": len(t.tokens),
      "reason": t.reason,
      "of": 1,
    }

  def finish(self) -> JsonObject:
    """Completes the stores, and returns the counts of each teacher's texts.

    Raises:
      InputError: A shard could not be written, or a text cannot be judged.
    """
    while self._writing:
      self._wait_for_first()
    if self._failure is not None:
      raise self._failure
    counts = {}
    for name, writer in self._writers.items():
      if len(writer.manifest.shards) < len(writer.manifest.ranges):
        done = writer.complete()
        assert done is not None, "a shard is missing"
      parts = [self._counts_of(name, rows) for rows in writer.manifest.ranges]
      counts[name] = round_counts.join(_read_counts(part) for part in parts)
    return counts

  def __enter__(self) -> RoundWriter:
    return self

  def __exit__(self, *_: object) -> None:
    self._thread.shutdown()  # writes the shards that wait
    self._open.close()


def record(t: Text, seq_len: int, reward: float | None) -> Record:
  """Returns the row of a text: prompt, text and padding.

  Args:
    t: The text.
    seq_len: The number of tokens of a row.
    reward: The reward; None without rewards.
  """
  first, count = len(t.row.prompt.ids), len(t.tokens)
  row: Record = {
    "tokens_T": np.zeros(seq_len, np.int32),
    "segments_T": np.zeros(seq_len, np.int32),
    "mask_T": np.zeros(seq_len, bool),
    fields.BEHAVIOUR_LOGP.record: np.zeros(seq_len, np.float32),
  }
  row["tokens_T"][: first + count] = [*t.row.prompt.ids, *t.tokens]
  row["segments_T"][: first + count] = 1
  labels = slice(first - 1, first - 1 + count)  # the positions that predict the text
  row["mask_T"][labels] = True
  row[fields.BEHAVIOUR_LOGP.record][labels] = t.logps
  if reward is not None:
    row[fields.REWARD.record] = np.where(row["mask_T"], np.float32(reward), np.float32(0))
  return row


def _read_counts(file: str) -> JsonObject:
  return json_io.parse_object(files.read(file), file, "Delete the folder of the round")
