"""A teacher that is measured once, and students made of it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from distill_jax import registry
from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.errors import InputError
from distill_jax.hub.export import check_new, export_model
from distill_jax.hub.weights import float_dtype
from distill_jax.models import loading
from distill_jax.nn import params, sharding
from distill_jax.pruning import choose, cut, experts, factorise, measure, shapes, table, windows
from distill_jax.pruning.options import ShrinkOptions
from distill_jax.records import collate
from distill_jax.runtime import storage
from distill_jax.runtime.progress import Progress
from distill_jax.types import Batch


class Teacher:
  """config.teacher with its calibration and held-out text.

  Attributes:
    family, shape: its own.
    mesh, how: where and how all is computed.
  """

  def __init__(self, config: Config):
    self.config = config
    self.family, self.shape = loading.family_and_config(config.teacher)
    self.mesh, self.compute = (
      sharding.make_mesh(**vars(config.mesh)),
      loading.compute_config(config.teacher),
    )
    sharding.check_batch("evaluate.batch_size", config.evaluate.batch_size, self.mesh)
    pretrained = loading.pretrained(config.teacher)
    self.tokenizer = corpus.tokenizer_of(config.data, pretrained)
    rows, longest = self.shape.vocab_size, self.shape.max_position_embeddings
    corpus.check(config.data, self.tokenizer, rows, longest)
    of = lambda split, n: dataclasses.replace(config.data, split=split, sequences=n)
    size = config.evaluate.batch_size
    text = [of("train", config.shrink.sequences), of("heldout", config.evaluate.sequences)]
    read = [list(corpus.sequences(data, self.tokenizer, pretrained)) for data in text]
    where = sharding.batch_sharding(self.mesh)
    self.calibration, self.heldout = (
      [collate.to_device(b, where) for b in _batches(some, size)] for some in read
    )
    self.labels = sum(int(row["mask_T"].sum()) for row in read[1])
    self._importance: dict[bool, cut.Measured] = {}
    self._gone: list[int] = []  # layers, in the order in which they can go

  @functools.cached_property
  def built(self) -> loading.LoadedModel:
    """Its weights, which are read when they are asked for."""
    with jax.set_mesh(self.mesh):
      return loading.build(
        self.config.teacher, self.mesh, loading.keys(self.config.seed)["teacher"]
      )

  @functools.cached_property
  def ce(self) -> float:
    """Its cross-entropy on held-out text, nats a token."""
    return self.cross_entropy(self.built.model)

  def cross_entropy(self, model: Any) -> float:
    """Of any model, on the same text."""
    with jax.set_mesh(self.mesh):
      return measure.loss(self._run, model, self.heldout)

  @functools.cached_property
  def _run(self) -> measure.Runner:
    return measure.runner(self.compute, self.config.shrink.chunk, self.tokenizer.vocab_size)

  def importance(self, within_experts: bool) -> cut.Measured:
    """What matters in it, by the calibration text."""
    if within_experts not in self._importance:
      with Progress("measure", sum(b.mask_BT.size for b in self.calibration)) as progress:
        self._importance[within_experts] = measure.importance(
          self.built.model, self.calibration, self.compute, within_experts, progress.add
        )
    return self._importance[within_experts]

  def layers(self, n: int, by: str) -> tuple[int, ...]:
    """The layers of a student that has n."""
    L = self.shape.num_hidden_layers
    if by in ("even", "ends") or n == L:
      return choose.even(n, L) if by == "even" or n == L else choose.ends(n, L)
    if by == "influence":
      found = self.importance(False)
      stacks = [
        found[name]["influence"] for name, _, _ in self.built.model.layer_stacks(self.shape)
      ]
      return choose.influential(n, np.concatenate(stacks))
    if (more := L - n - len(self._gone)) > 0:
      with Progress("leave out", more, "layers") as progress:
        for i in itertools.islice(self._removals, more):
          self._gone.append(i)
          progress.add(1)
    return tuple(i for i in range(L) if i not in self._gone[: L - n])

  @functools.cached_property
  def _removals(self) -> Iterator[int]:
    """By the loss on the first batch of the calibration text."""
    one = self.calibration[:1]
    loss = lambda without: measure.loss(self._run, self.built.model, one, without)
    return choose.removals(self.shape.num_hidden_layers, loss)

  def make(
    self, s: ShrinkOptions, target: str | os.PathLike[str], random: bool = True
  ) -> dict[str, Any]:
    """Writes the student that `s` asks for as a Hugging Face folder; see shrink.shrink.

    Args:
      random: whether its shape with random weights is scored too.

    Raises:
      InputError: a shape that the family cannot have, or a folder that exists.
    """
    wide = shapes.narrowed(s, self.family, self.shape)
    if not storage.is_remote(target):
      check_new(target)
    abstract = shapes.abstract(self.family, wide)
    factorise.targets(abstract, s.factorise)
    sharding.shardings(abstract, self.mesh, self.compute.rules)  # does it divide?
    if s.window:
      L = self.shape.num_hidden_layers
      windows.windowed(s, wide.keep_layers(choose.even(s.layers or L, L)))
    with jax.set_mesh(self.mesh):
      layers = self.layers(s.layers or self.shape.num_hidden_layers, s.layers_by)
      whole = layers == tuple(range(self.shape.num_hidden_layers))
      config = wide if whole else wide.keep_layers(layers)
      student, kept, factors = self._cut(s, config, layers)
      if s.window:
        config = windows.windowed(s, config)
        student = windows.see(student, config, self.mesh, self.compute.rules)
      result = {
        "dir": str(target),
        "kept": table.kept(s, self.shape, config, kept),
        "factorised": factors,
        "models": self._scores(config, student, random),
        "heldout_labels": self.labels,
        "corpus": f"{self.config.data.kind} {self.config.data.path}",
      }
      pretrained, c = self.built.pretrained, self.config
      with storage.new_folder(target) as work:
        export_model(
          student,
          work,
          tokenizer=corpus.files_of(c.data, pretrained),
          generation=pretrained.generation if pretrained else {},
          card=table.card(c, result),
          dtype=c.shrink.dtype,
          shard_bytes=c.shrink.shard_bytes,
        )
    return result

  def untrained(self, config: Any) -> Any:
    """A model of that shape with random weights."""
    family = shapes.family_of(config)
    make = registry.load("models", family).Model
    where = sharding.shardings(shapes.abstract(family, config), self.mesh, self.compute.rules)
    key = loading.keys(self.config.seed)["student"]
    return jax.jit(lambda key: make(config, key), out_shardings=where)(key)

  def _cut(
    self, s: ShrinkOptions, config: Any, layers: tuple[int, ...]
  ) -> tuple[Any, cut.Kept, Any]:
    measured = self.importance(bool(s.expert_intermediate))
    kept = cut.keep(s, self.family, self.shape, config, layers, measured)
    model, rules = self.built.model, self.compute.rules
    if s.experts_by == "merge":
      model = experts.merge(model, kept, measured)
    student = cut.cut(model, self.family, config, kept, self.mesh, rules)
    itemsize = float_dtype(self.config.shrink.dtype).itemsize
    student, factors = factorise.factorise(student, s.factorise, itemsize)
    return student, kept, factors

  def _scores(self, config: Any, student: Any, random: bool) -> dict[str, dict[str, float]]:
    models = {"teacher": self.built.model, "student": student}
    if random:
      models["random"] = self.untrained(config)
    ce = {n: self.ce if n == "teacher" else self.cross_entropy(m) for n, m in models.items()}
    itemsize = float_dtype(self.config.shrink.dtype).itemsize
    counts = {name: params.count(m) for name, m in models.items()}
    return {n: {"parameters": c, "bytes": c * itemsize, "ce": ce[n]} for n, c in counts.items()}


def _batches(rows: list[dict[str, np.ndarray]], size: int) -> Iterator[Batch]:
  """This process's rows of batches of one size; the last is filled up with padding alone."""
  if not rows:
    raise InputError("data gives no sequence to measure on; name a corpus that holds some")
  empty = {name: np.zeros_like(x) for name, x in rows[0].items()}
  for i in range(0, len(rows), size):
    some = rows[i : i + size]
    whole = some + [empty] * (size - len(some))
    yield collate.collate(whole[jax.process_index() :: jax.process_count()])
