"""The computation of a teacher's targets on the devices, from a batch of rows to what is stored."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from distill_jax.cross_tokenizer.dense import DenseTables
from distill_jax.cross_tokenizer.dense_targets import TeacherText
from distill_jax.losses.features import FeatureSpec, flat_qkv
from distill_jax.nn import sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.records import (
  fields,
  projected_sampler,
  recording,
  student_rows,
  tap_features,
  taps,
)
from distill_jax.records.options import RecordsOptions
from distill_jax.records.sampler import SamplerSpec
from distill_jax.types import Batch, Model, Output


@dataclasses.dataclass(frozen=True)
class TeacherPass:
  """Computes the targets to store from a teacher's outputs on a batch, on the device.

  Attributes:
    options: The options of `records`, with any kind except "text".
    compute: The teacher's compute config.
    vocab_size: Number of tokens or classes of the records.
    first_class: First row of the teacher's head for them.
    feature_width: Width of a tapped vector before projection; see tap_features.feature_width.
    min_mass: See `dense.project`; for students with another tokenizer.
  """

  options: RecordsOptions
  compute: ComputeConfig
  vocab_size: int
  first_class: int = 0
  feature_width: int = 0
  min_mass: float = 0.0

  @functools.cached_property
  def jitted(self) -> jax.stages.Wrapped:
    """The jitted `targets`, for use under `jax.set_mesh`."""
    return jax.jit(self.targets, out_shardings=PartitionSpec(sharding.BATCH))

  @functools.cached_property
  def jitted_projection(self) -> jax.stages.Wrapped:
    """The jitted `projected`, for use under `jax.set_mesh`."""
    return jax.jit(self.projected, out_shardings=PartitionSpec(sharding.BATCH))

  def projected(
    self, model: Model, key: jax.Array, batch: Batch, index_B: jax.Array, tables: DenseTables
  ) -> dict[str, jax.Array]:
    """Returns the targets to store for a student with another tokenizer, and statistics.

    Args:
      model: The teacher.
      key: See `targets`.
      batch: The student's rows, with the teacher's text as the targets of "teacher".
      index_B: See `targets`.
      tables: The tables of both tokenizers.

    Returns:
      The targets by field, and projected_sampler.STATISTICS.
    """
    text = batch.targets[student_rows.TEACHER]
    assert isinstance(text, TeacherText)
    out: Output = model(text.inputs, self.compute)
    summary = projected_sampler.summarise(
      text.of_output(out, batch.labels_BT, tables, self.min_mass),
      recording.offsets(key, index_B, batch.labels_BT.shape[1]),
      SamplerSpec.of(self.options, self.vocab_size),
      chunk=self.options.chunk,
      seq_axis=sharding.SEQ,
    )
    masses = {name: summary[name] for name in projected_sampler.STATISTICS}
    return recording.by_field(summary) | masses

  def targets(
    self, model: Model, key: jax.Array, batch: Batch, index_B: jax.Array
  ) -> dict[str, jax.Array]:
    """Returns the targets to store, by field, with the batch axis first.

    Args:
      model: The teacher.
      key: Random key. The sampling offsets of a row depend only on it and the row's index.
      batch: The rows, without targets.
      index_B: int32 index of each row in the store.
    """
    c = self.options
    features = feature_spec(c)
    out: Output = model(batch.model_inputs, self.compute, features.taps)
    # Moves the rows of the head of other tasks to the end, where they count as padding.
    first = self.first_class
    head_VD = jnp.roll(out.head_VD, -first, 0) if first else out.head_VD
    targets = recording.stored_targets(
      SamplerSpec.of(c, self.vocab_size),
      key,
      index_B,
      batch.labels_BT,
      hidden_BTD=out.hidden_BTD,
      head_VD=head_VD,
      chunk=c.chunk,
      soft_cap=out.soft_cap,
      seq_axis=sharding.SEQ,
    )
    if c.taps:
      kept = features.extract(model, out, batch.model_inputs, self.compute)
      flat = [kept.hidden[i] if i in kept.hidden else flat_qkv(kept.qkv[i]) for i in c.taps]
      q_PBTD, scale_PBT = tap_features.quantise(jnp.stack(flat), self._taps_projection())
      targets[fields.TAPS.device] = jnp.moveaxis(q_PBTD, 0, 1)
      targets[fields.TAPS_SCALE.device] = jnp.moveaxis(scale_PBT, 0, 1)
    return targets

  def _taps_projection(self) -> np.ndarray | None:
    to = self.options.taps_width
    return taps.projection(recording.TAPS_SEED, self.feature_width, to) if to else None


def feature_spec(options: RecordsOptions) -> FeatureSpec:
  """Returns the spec of the teacher's features to record."""
  if options.tap_kind == "hidden":
    return FeatureSpec(hidden=options.taps)
  return FeatureSpec(qkv=options.taps)
