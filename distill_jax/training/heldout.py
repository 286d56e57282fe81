"""Evaluation on held-out records during training.

An evaluation computes the losses and metrics of the training step, without gradients, over all rows
of train.heldout. The schedules of the losses have the values of the last training step, and losses
are not balanced, so that all evaluations of a run can be compared.

The cost: a training step computes about three times what its forward pass does, so that an
evaluation of R rows costs as much as R / (3 * batch_size) steps, and more in the cases of
`forward_share`. A batch has as many rows as a microbatch of the step, so that an evaluation needs
less memory: the same parameters, batch and chunk of logits, but neither gradients nor activations
for them. Per process, one batch, the next one and those being read ahead (loader.BATCHES_AHEAD) are
in memory, whatever the size of the stores.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distill_jax.config import Config
from distill_jax.errors import InputError
from distill_jax.losses import BaseLoss
from distill_jax.models.loading import ModelSource
from distill_jax.models.trainables import Trainable
from distill_jax.nn import sharding
from distill_jax.records import collate
from distill_jax.runtime import distributed, json_io
from distill_jax.training import best, loader
from distill_jax.training.outputs import Teachers
from distill_jax.training.state import TrainInputs, abstract_state, with_tables
from distill_jax.training.step import Fixed, Step
from distill_jax.training.stores import OneStore, Stores, reader, recorded
from distill_jax.training.train_state import TrainState
from distill_jax.types import IN_BATCH_CLASSES, Batch, JsonObject, Mean, Model, PyTree

SHARE = 0.02  # of the computation that evaluation costs at most with train.eval_every=0
FILE = "heldout.json"  # in the folder of a run: the rows, the interval and the cost
Means = dict[str, Mean]
# (number of steps that are done, trained parameters, base model) -> metrics without the prefix; it
# neither changes nor deletes the arrays. Evaluation of benchmarks is in a higher layer.
Benchmarks = Callable[[int, PyTree, Model | None], dict[str, float]]


def evaluate(
  step: Step,
  at: int,
  trained: PyTree,
  batch: Batch,
  teachers: Teachers,
  base: Model | None = None,
) -> Means:
  """Returns "loss", the weighted sum of the losses, and the losses and metrics of a batch.

  Losses of texts that the student wrote are omitted for other texts, and then "loss" is, too.

  Args:
    step: The training step.
    at: The step number at which schedules are evaluated.
    trained: (trained part of the student, adapters of losses).
    batch: The batch.
    teachers: The online teachers, by name.
    base: The base model of low-rank adapters, or None.
  """
  losses = losses_of(step.losses, batch.rollout is not None)
  if is_part := len(losses) < len(step.losses):
    step = dataclasses.replace(step, losses=losses)
  weights = {name: fn.weight(at) for name, fn in losses.items()}
  total, means = step.loss(trained, batch, Fixed(teachers, at, 1.0, base), weights)
  whole = Mean(total, jnp.sum(batch.mask_BT, dtype=jnp.float32))
  return means if is_part else {"loss": whole} | means


def losses_of(losses: Mapping[str, BaseLoss], is_rollout: bool) -> dict[str, BaseLoss]:
  """Returns the losses that can be computed on texts.

  Args:
    losses: The losses of the config.
    is_rollout: Whether the student sampled the texts. On other texts, losses that need numbers of
      the sampling cannot be computed.
  """
  return {name: fn for name, fn in losses.items() if is_rollout or not fn.rollout_scalars}


def forward_share(config: Config, trainable: Trainable) -> float:
  """Returns the share of a step's computation that is its forward pass, at most.

  The backward pass computes twice as much for weights that are trained, and as much for the base of
  adapters. It may be short for a student with frozen layers, and teachers do not have one.
  """
  if config.train.online or config.teachers or trainable.frozen:
    return 1.0
  return 1 / 2 if trainable.has_base else 1 / 3


class Part(NamedTuple):
  """The rows of one store.

  Attributes:
    store: The store.
    rows: Number of rows of a batch.
    batches: Number of batches. The last one is padded with rows without labels; for contrastive
      tasks, whose rows are compared with each other, it is omitted if it is not full.
  """

  store: OneStore
  rows: int
  batches: int

  @classmethod
  def of(cls, config: Config, longest: int, store: OneStore) -> Part:
    """Returns the part of a store, with at most the tokens of a microbatch of training in a batch.

    A batch of longer sequences has as many of them as a microbatch.

    Args:
      config: The config of the run.
      longest: Length of the longest sequences that it trains on.
      store: The store.
    """
    micro = config.train.batch_size // config.optim.accumulate  # which devices can divide
    rows = micro * max(1, longest // store.manifest.seq_len)
    full, rest = divmod(len(store), rows)
    if store.manifest.vocab_size == IN_BATCH_CLASSES:
      rest = 0
    if not full + rest:
      raise InputError(
        f"A held-out store has {len(store)} rows; expected at least {rows}, which a contrastive "
        "task compares with each other. Hold out more."
      )
    return cls(store, rows, full + bool(rest))


class Evaluation:
  """The evaluation of a run.

  Args:
    config: The config of the run.
    step: The training step.
    stores: The stores it trains on.
    heldout: The held-out stores; () to evaluate never.
    mesh: The mesh.
    benchmarks: Runs the benchmarks in train.eval_benchmarks; None for none.

  Attributes:
    every: Number of steps between evaluations; 0 without held-out stores.
    cost: Number of training steps that compute as much as one evaluation.
  """

  def __init__(
    self,
    config: Config,
    step: Step,
    stores: Stores,
    heldout: Stores,
    mesh: Mesh,
    benchmarks: Benchmarks | None = None,
  ):
    self._config, self._step, self._stores, self._mesh = config, step, stores, mesh
    self._benchmarks = benchmarks
    c, longest = config.train, max(store.manifest.seq_len for store in stores)
    self._parts = [Part.of(config, longest, store) for store in heldout]
    computed = sum(p.batches * p.rows * p.store.manifest.seq_len for p in self._parts)
    self.cost = forward_share(config, step.trainable) * computed / (c.batch_size * longest)
    self.every = (c.eval_every or math.ceil(self.cost / SHARE)) if heldout else 0
    self._evaluate = jax.jit(
      functools.partial(evaluate, step, c.steps - 1), out_shardings=sharding.replicated(mesh)
    )

  def due(self, step: int) -> bool:
    """Returns whether to evaluate when this number of steps is done."""
    return bool(self.every) and (step % self.every == 0 or step == self._config.train.steps)

  def about(self) -> JsonObject:
    """Returns what is evaluated, how often, and the share of the computation that this costs."""
    return {
      "rows": sum(len(part.store) for part in self._parts),
      "eval_every": self.every,
      "steps_per_evaluation": self.cost,
      "share": self.cost / self.every,
    }

  def announce(self, workdir: Path) -> None:
    """Writes heldout.json into the folder of the run, and prints the interval."""
    if not self.every:
      return
    about = self.about()
    json_io.write_json_once(workdir / FILE, about)
    if distributed.is_process_0():
      print(
        f"train evaluates {about['rows']:,} held-out rows every {self.every:,} steps "
        f"({about['share']:.1%} of the computation) and after the last step.",
        file=sys.stderr,
      )

  def check_metrics(self, student: ModelSource, online: Mapping[str, ModelSource]) -> None:
    """Raises InputError if a key names a metric that the evaluation does not have.

    The evaluation is traced for it, but nothing is compiled or loaded.

    Args:
      student: The model to train.
      online: The online teachers, by name.
    """
    c = self._config
    keys = {
      "train.best_metric": c.train.best_metric,
      "optim.plateau_metric": c.optim.plateau_metric,
    }
    if not self._parts or not any(keys.values()):
      return
    state = abstract_state(self._step, self._stores, student)
    abstract = {name: source.abstract for name, source in online.items()}
    teachers = with_tables(abstract, c, self._stores)
    base = student.abstract if self._step.trainable.has_base else None
    trained, batch = (state.params, state.adapters), self._abstract_batch(self._parts[0])
    with jax.set_mesh(self._mesh):
      names = jax.eval_shape(self._evaluate, trained, batch, teachers, base)
    ran = c.train.eval_benchmarks if self._benchmarks else ()
    accuracies = [best.of_benchmark(name) for name in ran]
    for key, metric in keys.items():
      best.check_metric(key, metric, [*names, "perplexity", *accuracies])

  def _abstract_batch(self, part: Part) -> Batch:
    """Returns the shapes of a batch."""
    row = next(self._batches(part, np.zeros(1, int)))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((part.rows, *x.shape[1:]), x.dtype), row)

  def _batches(self, part: Part, held: np.ndarray) -> Iterator[Batch]:
    """Returns an iterator over the rows of batches that a process holds."""
    alike = [
      p.store for p in self._parts if p.store.manifest.seq_len == part.store.manifest.seq_len
    ]
    batches = loader.in_order(
      part.store,
      part.rows,
      held=held,
      first=[store.read_many([0])[0] for store in alike],
      targets=not self._config.train.online,
      read=reader(self._config, self._stores),
      recorded=recorded(self._config, [p.store for p in self._parts]),
    )
    return itertools.islice(batches, part.batches)

  def __call__(self, state: TrainState, inputs: TrainInputs) -> dict[str, float]:
    """Evaluates the student; returns the values by metric, the same on every process.

    Sums over batches are added in float64. The next batch is read and sent while one is computed,
    but computed after it: on CPUs, two programs that communicate at a time can block each other.

    Args:
      state: The training state.
      inputs: The teachers and the base model.
    """
    trained = (state.params, state.adapters)
    sums: Means = {}
    means: Means | None = None
    for part in self._parts:
      rows = sharding.rows(self._mesh, part.rows)
      for own in self._batches(part, rows.held):
        batch = collate.to_device(own, rows)
        sums = _add(sums, means)
        with jax.transfer_guard("disallow"):
          means = self._evaluate(trained, batch, inputs.teachers, inputs.base)
    values = _values(_add(sums, means))
    if self._benchmarks:
      values |= self._benchmarks(int(state.step), state.params, inputs.base)
    return {best.PREFIX + name: value for name, value in values.items()}


def _add(sums: Means, means: Means | None) -> Means:
  """Returns sums in float64, on the host, after waiting for `means` on all devices."""
  found = jax.device_get(jax.block_until_ready(means or {}))
  wide = jax.tree.map(np.float64, found)
  return jax.tree.map(np.add, sums, wide) if sums and wide else sums or wide


def _values(sums: Means) -> dict[str, float]:
  values = {name: float(mean.total) / max(float(mean.count), 1.0) for name, mean in sums.items()}
  return values | {
    "perplexity": math.exp(min(values["ce"], 700)),
    "tokens": float(sums.get("loss", sums["ce"]).count),
  }
