"""A teacher whose importance is measured once, and the students cut from it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import jax
import numpy as np

from distill_jax import registry
from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.errors import InputError
from distill_jax.hub.export import export_model
from distill_jax.hub.export_folder import check_new
from distill_jax.hub.weights import float_dtype
from distill_jax.models import DecoderConfig, DecoderModel, loading, runs
from distill_jax.nn import params, sharding
from distill_jax.pruning import choose, cut, experts, factorise, measure, shapes, table, windows
from distill_jax.pruning.options import ShrinkOptions
from distill_jax.records import collate
from distill_jax.runtime import json_io
from distill_jax.runtime.progress import Progress
from distill_jax.types import Batch, JsonObject, Model


class MeasuredTeacher:
  """The teacher of a config with its calibration and held-out text. Weights are read on first use.

  Args:
    config: the config, with the teacher, the text, and the settings of the measurements.
    source: the opened config.teacher; None to open it here.

  Attributes:
    config: the config.
    source: the opened teacher.
    mesh: the mesh.
    tokenizer: the tokenizer of the text.
    heldout: batches on which cross-entropy is measured.
    labels: the number of labels in `heldout`.
  """

  def __init__(self, config: Config, source: loading.ModelSource | None = None):
    self.config, self._size = config, config.evaluate.batch_size
    self.source = source or loading.open_source(config.teacher, config.seed)
    self.mesh = config.mesh.whole_rows().make()
    sharding.check_batch("evaluate.batch_size", self._size, self.mesh)
    self.tokenizer = corpus.tokenizer_of(config.data, self.source.pretrained)
    shape = self.source.text_config
    corpus.check(config.data, self.tokenizer, shape.vocab_size, shape.max_position_embeddings)
    heldout = self._sequences("heldout", config.evaluate.sequences)
    self.heldout = self._batches(heldout)
    self.labels = sum(int(row["mask_T"].sum()) for row in heldout)
    self._importance: dict[bool, measure.Importance] = {}
    self._removed: list[int] = []  # layers in the order of removal

  def _sequences(self, split: str, n: int) -> list[dict[str, np.ndarray]]:
    data = dataclasses.replace(self.config.data, split=split, sequences=n)
    return list(corpus.sequences(data, self.tokenizer, self.source.pretrained))

  def _batches(self, rows: Sequence[dict[str, np.ndarray]]) -> list[Batch]:
    if not rows:
      raise InputError("`data` has no sequences to measure on. Choose a larger corpus.")
    held = sharding.rows(self.mesh, self._size)
    return [collate.to_device(b, held) for b in collate.padded_batches(rows, held)]

  @functools.cached_property
  def calibration(self) -> list[Batch]:
    """Batches on which importance is measured."""
    return self._batches(self._sequences("train", self.config.shrink.sequences))

  @functools.cached_property
  def loaded(self) -> loading.LoadedModel:
    """The teacher with its weights."""
    with jax.set_mesh(self.mesh):
      return self.source.load(self.mesh, runs.keys(self.config.seed)["teacher"])

  @functools.cached_property
  def ce(self) -> float:
    """The teacher's cross-entropy on held-out text, in nats per token."""
    return self.cross_entropy(self.loaded.decoder)

  def cross_entropy(self, model: DecoderModel) -> float:
    """Returns the cross-entropy of a model on the held-out text, in nats per token."""
    with jax.set_mesh(self.mesh):
      return measure.loss(self._loss_fn, model, self.heldout)

  @functools.cached_property
  def _loss_fn(self) -> measure.LossFn:
    chunk = self.config.shrink.chunk
    return measure.make_loss(self.source.compute, chunk, self.tokenizer.vocab_size)

  def importance(self, within_experts: bool) -> measure.Importance:
    """Returns the importance of the teacher's parts; see measure.importance."""
    if within_experts not in self._importance:
      with Progress("measure", sum(b.mask_BT.size for b in self.calibration)) as progress:
        self._importance[within_experts] = measure.importance(
          self.loaded.decoder, self.calibration, self.source.compute, within_experts, progress.add
        )
    return self._importance[within_experts]

  def layers(self, n: int, by: str) -> tuple[int, ...]:
    """Returns the numbers of n layers to keep; `by` is one of shapes.CHOICES["layers_by"]."""
    L = self.source.decoder_config.num_hidden_layers
    if by == "even" or n == L:
      return choose.even(n, L)
    if by == "ends":
      return choose.ends(n, L)
    if by == "influence":
      measured = self.importance(False)
      stacks = self.loaded.decoder.layer_stacks(self.source.decoder_config)
      influence_L = np.concatenate([measured[name]["influence"] for name, _, _ in stacks])
      return choose.influential(n, influence_L)
    if (more := L - n - len(self._removed)) > 0:
      with Progress("remove", more, "layers") as progress:
        for i in itertools.islice(self._removal_order, more):
          self._removed.append(i)
          progress.add(1)
    return tuple(i for i in range(L) if i not in self._removed[: L - n])

  @functools.cached_property
  def _removal_order(self) -> Iterator[int]:
    """Layers in the order of removal, by loss on the first calibration batch."""
    return choose.removal_order(self.source.decoder_config.num_hidden_layers, self._loss_without)

  def _loss_without(self, layers: Sequence[int]) -> float:
    return measure.loss(self._loss_fn, self.loaded.decoder, self.calibration[:1], layers)

  def make(
    self,
    options: ShrinkOptions,
    target: str | os.PathLike[str],
    file: Path | None = None,
    random: bool = True,
  ) -> JsonObject:
    """Cuts a student and writes it as a Hugging Face folder.

    Args:
      options: the student's sizes.
      target: the folder.
      file: the file for the result, which is written before the folder; see `result_of`.
      random: whether to measure the same architecture with random weights too.

    Returns:
      The contents of shrink.json; see commands/shrink.py.

    Raises:
      InputError: the family does not support the sizes, or the folder exists.
    """
    narrowed = self._check(options)
    check_new(target)
    teacher, compute = self.source.decoder_config, self.source.compute
    with jax.set_mesh(self.mesh):
      layers = self.layers(options.layers or teacher.num_hidden_layers, options.layers_by)
      all_layers = layers == tuple(range(teacher.num_hidden_layers))
      config = narrowed if all_layers else narrowed.keep_layers(layers)
      student, kept = self._cut(options, config, layers)
      student, factors = factorise.factorise(student, options.factorise, self._itemsize)
      if options.window:
        config = windows.windowed(options, config)
        student = windows.with_windows(student, config, self.mesh, compute.rules)
      result = {
        "dir": str(target),
        "kept": table.kept_summary(options, teacher, config, kept),
        "factorised": factors,
        "models": self._scores(config, student, random),
        "heldout_labels": self.labels,
        "corpus": f"{self.config.data.kind} {self.config.data.path}",
      }
      if file is not None:
        json_io.write_json_once(file, result)
      export_model(
        cast(Model, student),
        target,
        tokenizer=corpus.files_of(self.config.data, self.source.pretrained),
        generation=self.source.generation,
        card=table.card(self.config.teacher, result),
        dtype=self.config.shrink.dtype,
        shard_bytes=self.config.shrink.shard_bytes,
      )
    return result

  def _check(self, options: ShrinkOptions) -> DecoderConfig:
    """Returns the narrower Config with all layers.

    Raises:
      InputError: the family or the mesh does not support the sizes.
    """
    teacher = self.source.decoder_config
    narrowed = shapes.narrowed(options, self.source.family, teacher)
    abstract = shapes.abstract(self.source.family, narrowed)
    factorise.targets(abstract, options.factorise)
    sharding.shardings(abstract, self.mesh, self.source.compute.rules)  # checks divisibility
    if options.window:
      L = teacher.num_hidden_layers
      windows.windowed(options, narrowed.keep_layers(choose.even(options.layers or L, L)))
    return narrowed

  def untrained(self, config: DecoderConfig) -> DecoderModel:
    """Returns a model with random weights."""
    family = shapes.family_of(config)
    make = registry.load("models", family).Model
    abstract = shapes.abstract(family, config)
    out_shardings = sharding.shardings(abstract, self.mesh, self.source.compute.rules)
    key = runs.keys(self.config.seed)["student"]
    return jax.jit(lambda key: make(config, key), out_shardings=out_shardings)(key)

  def _cut(
    self, options: ShrinkOptions, config: DecoderConfig, layers: tuple[int, ...]
  ) -> tuple[DecoderModel, cut.KeptIndices]:
    family, model = self.source.family, self.loaded.decoder
    measured = self.importance(bool(options.expert_intermediate))
    kept = cut.keep(options, family, self.source.decoder_config, config, layers, measured)
    if options.experts_by == "merge":
      model = experts.merge(model, kept, measured)
    return cut.cut(model, family, config, kept, self.mesh, self.source.compute.rules), kept

  @property
  def _itemsize(self) -> int:
    return float_dtype(self.config.shrink.dtype).itemsize

  def _scores(
    self, config: DecoderConfig, student: DecoderModel, random: bool
  ) -> dict[str, dict[str, float]]:
    """Returns the numbers of parameters and bytes and the cross-entropy, by model."""
    models = {"teacher": self.loaded.decoder, "student": student}
    if random:
      models["random"] = self.untrained(config)
    scores = {}
    for name, model in models.items():
      count = params.count(model)
      ce = self.ce if name == "teacher" else self.cross_entropy(model)
      scores[name] = {"parameters": count, "bytes": count * self._itemsize, "ce": ce}
    return scores
