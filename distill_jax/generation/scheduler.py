"""Continuous batching: rows of a batch are refilled from a queue of samples when they finish."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distill_jax.generation.engine import Engine, RowState
from distill_jax.generation.finished import SampleKey
from distill_jax.generation.options import DecodingOptions
from distill_jax.generation.stops import Stops

RECORD = "record_"  # prefix of recorded fields in the engine's outputs


class Task(NamedTuple):
  """A sample to generate.

  Attributes:
    prompt: The index of the prompt.
    sample: The index of the sample.
    ids: The tokens of the prompt.
    about: What the caller wants to find in the finished sample.
  """

  prompt: int
  sample: int
  ids: Sequence[int]
  about: Any = None


@dataclasses.dataclass
class GeneratedSample:
  """A text that is being generated or is finished.

  Attributes:
    task: What is generated.
    tokens: The generated tokens, including the one that ended the text.
    logps: The tokens' log-probabilities under the model, without temperature and truncation.
    records: The recorded arrays of each token, by field.
    reason: The reason why the text ended, "stop", "eos", "length" or "repetition"; "" before that.
  """

  task: Task
  tokens: list[int] = dataclasses.field(default_factory=list)
  logps: list[float] = dataclasses.field(default_factory=list)
  records: dict[str, list[np.ndarray]] = dataclasses.field(
    default_factory=lambda: collections.defaultdict(list)
  )
  reason: str = ""

  @property
  def key(self) -> SampleKey:
    """The indices of the prompt and the sample."""
    return self.task.prompt, self.task.sample

  @property
  def text_tokens(self) -> list[int]:
    """The tokens without the token that ended the text."""
    return self.tokens[:-1] if self.reason == "eos" else self.tokens

  def add(
    self,
    outputs: Mapping[str, np.ndarray],
    row: int,
    stops: Stops,
    eos: tuple[int, ...],
    max_tokens: int,
  ) -> None:
    """Adds the new tokens of a row of the engine's outputs, up to the end of the text.

    Args:
      outputs: The outputs of `engine.decode_steps`.
      row: The index of the row.
      stops: The end conditions of texts.
      eos: Tokens that end a text.
      max_tokens: The maximum number of tokens.

    Raises:
      FloatingPointError: If a token's log-probability is not finite.
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
        f"The log-probability of token {old + int(np.argmin(np.isfinite(logps)))} of prompt "
        f"{self.task.prompt}, sample {self.task.sample} is not finite. The model's weights are "
        "damaged, or too large for its dtype."
      )
    self.logps += logps.tolist()
    for name, x in outputs.items():
      if name.startswith(RECORD):
        self.records[name.removeprefix(RECORD)].extend(x[:count, row])


class Scheduler:
  """Decodes samples, options.batch_size of them at once.

  A text ends at an end condition, after `max_new_tokens`, or at the end of its row of the cache.

  Args:
    engine: The engine.
    stops: The end conditions of texts.
    eos: Tokens that end a text.
    options: The decoding settings.
    max_new_tokens: The maximum number of generated tokens per text.
  """

  def __init__(
    self,
    engine: Engine,
    stops: Stops,
    eos: tuple[int, ...],
    options: DecodingOptions,
    max_new_tokens: int,
  ):
    self._engine, self._stops, self._eos = engine, stops, eos
    self._cache_len, self._max_new_tokens = options.cache_len, max_new_tokens
    self._prefill_rows, self._prefill_chunk = options.prefill_rows, options.prefill_chunk
    self._rows: list[GeneratedSample | None] = [None] * options.batch_size
    self._prefilled: list[int] = []  # indices of the prompts in the engine's prompt cache

  def run(self, tasks: Iterable[Task]) -> Iterator[tuple[list[GeneratedSample], int]]:
    """Yields the newly finished samples and the number of new tokens after each engine call.

    Args:
      tasks: The samples to generate; only as many are read as rows of a batch can wait.
    """
    waiting, queue = iter(tasks), collections.deque[Task]()
    while True:
      queue.extend(itertools.islice(waiting, len(self._rows) - len(queue)))
      free = [i for i, s in enumerate(self._rows) if s is None]
      # A prefill costs the same for 1 and for `prefill_rows` prompts, so wait for enough free rows.
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
    return min(self._max_new_tokens, self._cache_len - len(s.task.ids))

  def _state(self) -> RowState:
    rows = RowState(*(np.zeros(len(self._rows), np.int32) for _ in dataclasses.fields(RowState)))
    alive_B = np.array([s is not None for s in self._rows])
    for i, s in enumerate(self._rows):
      if s is not None:
        length = len(s.task.ids)
        rows.token_B[i] = s.tokens[-1] if s.tokens else s.task.ids[-1]
        rows.position_B[i] = length + len(s.tokens) - 1
        rows.last_B[i] = length + self._max_tokens(s) - 1
        rows.prompt_B[i], rows.sample_B[i] = s.key
    return rows.replace(alive_B=alive_B)

  def _refill(self, free: list[int], queue: collections.deque[Task]) -> None:
    """Moves samples from the queue into free rows. Samples of one prompt share its prefill."""
    while free and queue:
      if queue[0].prompt not in self._prefilled:
        prompts = self._next_prompts(queue, len(free))
        self._prefilled = list(prompts)
        self._prefill([*prompts.values()])
      self._insert(self._next_samples(free, queue))

  def _next_prompts(self, queue: collections.deque[Task], n: int) -> dict[int, Sequence[int]]:
    """Returns the tokens of the first `prefill_rows` different prompts of the next n samples."""
    prompts = {task.prompt: task.ids for task in itertools.islice(queue, n)}
    return dict(itertools.islice(prompts.items(), self._prefill_rows))

  def _next_samples(self, free: list[int], queue: collections.deque[Task]) -> dict[int, Task]:
    """Returns the next samples of prefilled prompts by row, at most `prefill_rows` of them."""
    begin: dict[int, Task] = {}
    while free and queue and queue[0].prompt in self._prefilled and len(begin) < self._prefill_rows:
      begin[free.pop(0)] = queue.popleft()
    return begin

  def _insert(self, begin: Mapping[int, Task]) -> None:
    """Starts samples by copying their prompts from the prompt cache into their rows."""
    no_row = len(self._rows)
    from_P = np.zeros(self._prefill_rows, np.int32)
    to_P = np.full(self._prefill_rows, no_row, np.int32)
    for i, (row, task) in enumerate(begin.items()):
      from_P[i], to_P[i] = self._prefilled.index(task.prompt), row
      self._rows[row] = GeneratedSample(task)
    longest = max(len(task.ids) for task in begin.values())
    self._engine.insert(from_P, to_P, longest - 1)

  def _prefill(self, asked: Sequence[Sequence[int]]) -> None:
    """Prefills prompts without their last tokens, which the first decode step reads."""
    P, C = self._prefill_rows, self._prefill_chunk
    prompts = [ids[:-1] for ids in asked]
    for first in range(0, max(map(len, prompts)), C):
      tokens_PC, count_P = np.zeros((P, C), np.int32), np.zeros(P, np.int32)
      for row, ids in enumerate(prompts):
        piece = ids[first : first + C]
        tokens_PC[row, : len(piece)], count_P[row] = piece, len(piece)
      self._engine.prefill(tokens_PC, np.full(P, first, np.int32), count_P)
