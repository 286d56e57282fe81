"""A teacher on the devices, which records the rows of several corpora one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from distill_jax.config import Config
from distill_jax.cross_tokenizer.dense import DenseTables
from distill_jax.cross_tokenizer.statistics import Statistics
from distill_jax.models import runs
from distill_jax.models.loading import ModelSource
from distill_jax.nn.sharding import Rows
from distill_jax.records import (
  batch_plan,
  collate,
  projected_sampler,
  recording,
  student_rows,
  tap_features,
)
from distill_jax.records.fields import Record
from distill_jax.records.options import RecordsOptions
from distill_jax.records.recording import Corpus
from distill_jax.records.student_rows import StudentRows
from distill_jax.records.teacher_pass import TeacherPass
from distill_jax.types import Model

Part = TypeVar("Part")
Result = TypeVar("Result")
# Starts the computation on a batch of a plan. Returns the rows, without targets, that this process
# holds, and the targets of the global batch.
Dispatch = Callable[[np.ndarray], tuple[list[Record], Mapping[str, jax.Array]]]
# Receives the first index of some rows, and their statistics.
OnStatistics = Callable[[int, Statistics], None]


def feature_width(options: RecordsOptions, teacher: ModelSource) -> int:
  """Returns the size of the teacher's recorded feature vectors; 0 without taps."""
  return tap_features.feature_width(teacher.config, options.tap_kind) if options.taps else 0


class LoadedTeacher:
  """A teacher that computes the targets of any number of corpora.

  Its weights are loaded when the first row is recorded, and again after `release`. The compiled
  programs are kept, so teachers can take turns on the devices.

  Args:
    config: The config, with the seed and the options of `records`.
    teacher: The teacher.
    mesh: The device mesh.
    corpus: One of the corpora, which have the same classes. Their rows may have other lengths.
    read: See `collate`; None for text.
  """

  on_devices = True  # see job.Teacher

  def __init__(
    self,
    config: Config,
    teacher: ModelSource,
    mesh: Mesh,
    corpus: Corpus,
    read: collate.Read | None = None,
  ):
    options = config.records
    self._pass = TeacherPass(
      options,
      teacher.compute,
      corpus.classes,
      corpus.first_class,
      feature_width(options, teacher),
      config.retarget.min_mass,
    )
    self._source, self._mesh, self._keys = teacher, mesh, runs.keys(config.seed)
    self._student_rows = corpus.rows if isinstance(corpus.rows, StudentRows) else None
    self._read = read if self._student_rows is None else student_rows.read
    self._runs: dict[int, jax.stages.Wrapped] = {}  # by the number of positions of a chunk
    self._loaded: tuple[Model, tuple[DenseTables, ...]] | None = None

  def release(self) -> None:
    """Frees the memory of the weights."""
    self._loaded = None

  def _load(self) -> tuple[Model, tuple[DenseTables, ...]]:
    """Returns the model, and the tables for a student with another tokenizer."""
    if self._loaded is None:
      model, rows = self._source.load(self._mesh, self._keys["teacher"]).model, self._student_rows
      self._loaded = model, () if rows is None else (rows.on_devices(self._mesh),)
    return self._loaded

  def _dispatcher(self, corpus: Corpus, rows: Rows) -> Dispatch:
    """Returns a function that starts the computation on a batch of a corpus."""
    run, (model, tables) = self._jitted(rows.size), self._load()
    key = self._keys["records"]
    if corpus.rollout:  # the noise of rows with the same index differs between rounds
      key = jax.random.fold_in(key, corpus.rollout["round"])
    padding = collate.padding_like(corpus.rows[0])

    def dispatch(index_B: np.ndarray) -> tuple[list[Record], dict[str, jax.Array]]:
      own_B = index_B[rows.held]
      kept = iter(corpus.read(own_B[own_B != batch_plan.PADDING].tolist()))
      held = [padding if i == batch_plan.PADDING else next(kept) for i in own_B.tolist()]
      own = collate.collate(held, read=self._read), np.maximum(own_B, 0).astype(np.int32)
      batch, index_B = collate.to_device(own, rows)
      return held, run(model, key, batch, index_B, *tables)

    return dispatch

  def _jitted(self, rows: int) -> jax.stages.Wrapped:
    """Returns the jitted computation for batches of a size, with as many logits in memory."""
    options = self._pass.options
    chunk = max(1, options.chunk * options.batch_size // rows)
    if chunk not in self._runs:
      changed = dataclasses.replace(options, chunk=chunk)
      of_chunk = dataclasses.replace(self._pass, options=changed)
      is_plain = self._student_rows is None
      self._runs[chunk] = of_chunk.jitted if is_plain else of_chunk.jitted_projection
    return self._runs[chunk]

  def recorded(
    self,
    corpus: Corpus,
    plan: Iterable[np.ndarray],
    rows: Rows,
    on_statistics: OnStatistics | None = None,
  ) -> Iterator[tuple[np.ndarray, list[Record]]]:
    """Yields each batch of a plan with the records in it that this process writes.

    The teacher computes the next batch while one is read.

    Args:
      corpus: The corpus.
      plan: The batches, from `batch_plan.batches`.
      rows: The rows of a batch.
      on_statistics: Receives the first index, and the statistics, of the rows of a student with
        another tokenizer, before they are yielded.
    """
    for index_B, (held, targets) in _overlap(self._dispatcher(corpus, rows), plan):
      written = rows.written[index_B[rows.written] != batch_plan.PADDING]
      own = [held[i] for i in np.searchsorted(rows.held, written)]
      if on_statistics is not None and own:
        read = {k: collate.local_rows(targets[k], written) for k in projected_sampler.STATISTICS}
        on_statistics(int(index_B[written[0]]), student_rows.statistics(own, read))
      yield index_B, recording.local_records(own, targets, written)


def _overlap(fn: Callable[[Part], Result], parts: Iterable[Part]) -> Iterator[tuple[Part, Result]]:
  """Yields (part, fn(part)) after fn has been called on the next part.

  With a function that dispatches work to the devices, they compute a part while the caller
  processes the previous one.
  """
  before: tuple[Part, Result] | None = None
  for part in parts:
    dispatched = part, fn(part)
    if before is not None:
      yield before
    before = dispatched
  if before is not None:
    yield before
