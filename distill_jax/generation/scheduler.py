"""Rows of a batch that are filled again as they finish, from a queue of samples."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from distill_jax.generation.engine import Device, Rows
from distill_jax.generation.stops import Stops

SampleKey = tuple[int, int]  # (prompt, sample)


@dataclasses.dataclass
class Sample:
  """One text: under way, then finished.

  Attributes:
    prompt, sample: its numbers.
    length: of the prompt, in tokens.
    tokens: what was generated, the token that ended it included.
    logps: of the tokens, under the model as it is.
    records: by name, for each token, what the device said of its distribution.
    reason: why it is finished: stop, eos, length or repetition; "" while it is not.
  """

  prompt: int
  sample: int
  length: int
  tokens: list[int] = dataclasses.field(default_factory=list)
  logps: list[float] = dataclasses.field(default_factory=list)
  records: dict[str, list[np.ndarray]] = dataclasses.field(
    default_factory=lambda: collections.defaultdict(list)
  )
  reason: str = ""

  def add(
    self, said: dict[str, np.ndarray], row: int, stops: Stops, eos: tuple[int, ...], limit: int
  ) -> None:
    """Takes the row's new tokens, up to its end.

    Raises:
      FloatingPointError: their probabilities are no numbers.
    """
    old, new = len(self.tokens), said["token"][:, row]
    count = int((new >= 0).sum())
    self.tokens += new[:count].tolist()
    if found := stops.first(self.tokens, old):
      n, self.reason = found
      del self.tokens[n:]
    elif self.tokens[-1] in eos:
      self.reason = "eos"
    elif len(self.tokens) == limit:
      self.reason = "length"
    count = len(self.tokens) - old
    logps = said["logp"][:count, row]
    if not np.isfinite(logps).all():
      raise FloatingPointError(
        f"the log-probability of token {old + int(np.argmin(np.isfinite(logps)))} of prompt "
        f"{self.prompt}, sample {self.sample} is not finite; the model's weights are damaged, or "
        "too large for its dtype"
      )
    self.logps += logps.tolist()
    for name, x in said.items():
      if name.startswith("record_"):
        self.records[name.removeprefix("record_")].extend(x[:count, row])


class Batch:
  """Decodes samples of prompts, `rows` of them at once.

  Args:
    fill: prompts that are read at once, `chunk` tokens at a time.
    size: positions of a row; a text ends where its row does, or after `longest` tokens.
  """

  def __init__(
    self,
    device: Device,
    prompts: Mapping[int, Sequence[int]],
    stops: Stops,
    eos: tuple[int, ...],
    *,
    rows: int,
    fill: int,
    chunk: int,
    size: int,
    longest: int,
  ):
    self._device, self._prompts, self._stops, self.eos = device, prompts, stops, eos
    self._fill, self._chunk, self._size, self._longest = fill, chunk, size, longest
    self._rows: list[Sample | None] = [None] * rows
    self._held: list[int] = []  # the prompts in the cache of prompts

  def run(self, wanted: Iterable[SampleKey]) -> Iterator[tuple[list[Sample], int]]:
    """(samples that have finished, tokens made) after each call of the device."""
    queue = collections.deque(wanted)
    while True:
      free = [i for i, s in enumerate(self._rows) if s is None]
      # Prompts are read `fill` at a time, at the price of one or more: worth waiting for.
      if queue and len(free) >= min(self._fill, len(queue)):
        self._refill(free, queue)
      if all(s is None for s in self._rows):
        return
      said = self._device.steps(self._state())
      done = []
      for i, s in enumerate(self._rows):
        if s is not None:
          s.add(said, i, self._stops, self.eos, self._limit(s))
          if s.reason:
            done.append(s)
            self._rows[i] = None
      yield done, int((said["token"] >= 0).sum())

  def _limit(self, s: Sample) -> int:
    return min(self._longest, self._size - s.length)

  def _state(self) -> Rows:
    def of(s: Sample | None) -> tuple[int, ...]:
      if s is None:
        return (0,) * 6
      token = s.tokens[-1] if s.tokens else self._prompts[s.prompt][-1]
      position, last = s.length + len(s.tokens) - 1, s.length + self._limit(s) - 1
      return token, position, last, 1, s.prompt, s.sample

    columns = np.array([of(s) for s in self._rows], np.int32).T
    token, position, last, alive, prompt, sample = columns
    return Rows(token, position, last, alive.astype(bool), prompt, sample)

  def _refill(self, free: list[int], queue: collections.deque[SampleKey]) -> None:
    """Takes samples off the queue; those of one prompt share its reading."""
    while free and queue:
      if queue[0][0] not in self._held:
        self._held = self._next(queue, len(free))
        self._read(self._held)
      sources, rows = [0] * self._fill, [len(self._rows)] * self._fill  # a row that is not there
      for i in range(self._fill):
        if not (free and queue and queue[0][0] in self._held):
          break
        prompt, sample = queue.popleft()
        sources[i], rows[i] = self._held.index(prompt), free.pop(0)
        self._rows[rows[i]] = Sample(prompt, sample, len(self._prompts[prompt]))
      self._device.insert(np.array(sources, np.int32), np.array(rows, np.int32))

  def _next(self, queue: collections.deque[SampleKey], n: int) -> list[int]:
    """The first `fill` prompts of the next n samples."""
    return list(dict.fromkeys(p for p, _ in itertools.islice(queue, n)))[: self._fill]

  def _read(self, numbers: list[int]) -> None:
    """Prompts into the cache of prompts, but for each one's last token: the next step reads it."""
    read = [self._prompts[n][:-1] for n in numbers]
    read += [[]] * (self._fill - len(read))
    for first in range(0, max(map(len, read)), self._chunk):
      tokens = np.zeros((self._fill, self._chunk), np.int32)
      counts = np.zeros(self._fill, np.int32)
      for row, ids in enumerate(read):
        some = ids[first : first + self._chunk]
        tokens[row, : len(some)], counts[row] = some, len(some)
      self._device.prefill(tokens, np.full(self._fill, first, np.int32), counts)
