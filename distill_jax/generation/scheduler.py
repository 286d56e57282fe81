"""Rows of a batch that are filled again as they finish, from a queue of samples."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from distill_jax.generation.engine import Engine, RowState
from distill_jax.generation.options import DecodingOptions
from distill_jax.generation.stops import Stops

SampleKey = tuple[int, int]  # (prompt, sample): their numbers
RECORD = "record_"  # begins the names of recorded fields in the engine's outputs


@dataclasses.dataclass
class GeneratedSample:
  """One text, in progress or finished.

  Attributes:
    prompt, sample: its numbers.
    length: of the prompt, in tokens.
    tokens: the generated tokens, with the one that ended the text.
    logps: of these tokens, under the model as it is.
    records: by field, what was recorded of each token's distribution.
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

  @property
  def key(self) -> SampleKey:
    return self.prompt, self.sample

  @property
  def text_tokens(self) -> list[int]:
    """The tokens without the one that ends a document."""
    return self.tokens[:-1] if self.reason == "eos" else self.tokens

  def add(
    self,
    outputs: Mapping[str, np.ndarray],
    row: int,
    stops: Stops,
    eos: tuple[int, ...],
    max_tokens: int,
  ) -> None:
    """Takes the new tokens of a row of the engine's outputs, up to the end of the text.

    Raises:
      FloatingPointError: a token's log-probability is not finite.
    """
    old, new_tokens = len(self.tokens), outputs["token"][:, row]
    self.tokens += new_tokens[: int((new_tokens >= 0).sum())].tolist()
    if end := stops.first(self.tokens, old):
      n, self.reason = end
      del self.tokens[n:]
    elif self.tokens[-1] in eos:
      self.reason = "eos"
    elif len(self.tokens) == max_tokens:
      self.reason = "length"
    count = len(self.tokens) - old
    logps = outputs["logp"][:count, row]
    if not np.isfinite(logps).all():
      raise FloatingPointError(
        f"the log-probability of token {old + int(np.argmin(np.isfinite(logps)))} of prompt "
        f"{self.prompt}, sample {self.sample} is not finite; the model's weights are damaged, or "
        "too large for its dtype"
      )
    self.logps += logps.tolist()
    for name, x in outputs.items():
      if name.startswith(RECORD):
        self.records[name.removeprefix(RECORD)].extend(x[:count, row])


class Scheduler:
  """Decodes samples of prompts, options.batch_size of them at once.

  A text ends at the last position of its row, options.cache_len, or after `max_new_tokens`.
  """

  def __init__(
    self,
    engine: Engine,
    prompts: Mapping[int, Sequence[int]],
    stops: Stops,
    eos: tuple[int, ...],
    options: DecodingOptions,
    max_new_tokens: int,
  ):
    self._engine, self._prompts, self._stops, self._eos = engine, prompts, stops, eos
    self._cache_len, self._max_new_tokens = options.cache_len, max_new_tokens
    self._prefill_rows, self._prefill_chunk = options.prefill_rows, options.prefill_chunk
    self._rows: list[GeneratedSample | None] = [None] * options.batch_size
    self._prefilled: list[int] = []  # the prompts in the engine's cache of prompts

  def run(self, keys: Iterable[SampleKey]) -> Iterator[tuple[list[GeneratedSample], int]]:
    """Yields (the samples that have finished, tokens made) after each call of the engine."""
    queue = collections.deque(keys)
    while True:
      free = [i for i, s in enumerate(self._rows) if s is None]
      # A prefill costs the same for one prompt as for `prefill_rows`: worth waiting for.
      if queue and len(free) >= min(self._prefill_rows, len(queue)):
        self._refill(free, queue)
      if all(s is None for s in self._rows):
        return
      outputs = self._engine.decode(self._state())
      finished = []
      for i, s in enumerate(self._rows):
        if s is not None:
          s.add(outputs, i, self._stops, self._eos, self._max_tokens(s))
          if s.reason:
            finished.append(s)
            self._rows[i] = None
      yield finished, int((outputs["token"] >= 0).sum())

  def _max_tokens(self, s: GeneratedSample) -> int:
    return min(self._max_new_tokens, self._cache_len - s.length)

  def _state(self) -> RowState:
    rows = RowState(*(np.zeros(len(self._rows), np.int32) for _ in dataclasses.fields(RowState)))
    alive_B = np.array([s is not None for s in self._rows])
    for i, s in enumerate(self._rows):
      if s is not None:
        rows.token_B[i] = s.tokens[-1] if s.tokens else self._prompts[s.prompt][-1]
        rows.position_B[i] = s.length + len(s.tokens) - 1
        rows.last_B[i] = s.length + self._max_tokens(s) - 1
        rows.prompt_B[i], rows.sample_B[i] = s.key
    return rows.replace(alive_B=alive_B)

  def _refill(self, free: list[int], queue: collections.deque[SampleKey]) -> None:
    """Moves samples from the queue into free rows; those of one prompt share its prefill."""
    while free and queue:
      if queue[0][0] not in self._prefilled:
        self._prefilled = self._next_prompts(queue, len(free))
        self._prefill(self._prefilled)
      self._insert(self._next_samples(free, queue))

  def _next_prompts(self, queue: collections.deque[SampleKey], n: int) -> list[int]:
    """The first `prefill_rows` prompts of the next n samples."""
    prompts = dict.fromkeys(prompt for prompt, _ in itertools.islice(queue, n))
    return list(prompts)[: self._prefill_rows]

  def _next_samples(
    self, free: list[int], queue: collections.deque[SampleKey]
  ) -> dict[int, SampleKey]:
    """By row, the samples of prefilled prompts that begin next, at most `prefill_rows` of them."""
    begin: dict[int, SampleKey] = {}
    while free and queue and queue[0][0] in self._prefilled and len(begin) < self._prefill_rows:
      begin[free.pop(0)] = queue.popleft()
    return begin

  def _insert(self, begin: Mapping[int, SampleKey]) -> None:
    """Begins samples: each one's prompt is copied from the cache of prompts into its row."""
    no_row = len(self._rows)
    from_P = np.zeros(self._prefill_rows, np.int32)
    to_P = np.full(self._prefill_rows, no_row, np.int32)
    for i, (row, (prompt, sample)) in enumerate(begin.items()):
      from_P[i], to_P[i] = self._prefilled.index(prompt), row
      self._rows[row] = GeneratedSample(prompt, sample, len(self._prompts[prompt]))
    self._engine.insert(from_P, to_P)

  def _prefill(self, numbers: Sequence[int]) -> None:
    """Reads prompts but for each one's last token, which the first decode step reads."""
    P, C = self._prefill_rows, self._prefill_chunk
    prompts = [self._prompts[n][:-1] for n in numbers]
    for first in range(0, max(map(len, prompts)), C):
      tokens_PC, count_P = np.zeros((P, C), np.int32), np.zeros(P, np.int32)
      for row, ids in enumerate(prompts):
        piece = ids[first : first + C]
        tokens_PC[row, : len(piece)], count_P[row] = piece, len(piece)
      self._engine.prefill(tokens_PC, np.full(P, first, np.int32), count_P)
