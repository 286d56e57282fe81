"""Targets and features of teachers on a batch, and labels for each output of the student."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct

from distill_jax.cross_tokenizer.dense import DenseTables
from distill_jax.cross_tokenizer.dense_targets import TeacherText
from distill_jax.losses import DenseTargets, features
from distill_jax.losses.features import Features, FeatureSpec
from distill_jax.nn.layers import ComputeConfig
from distill_jax.records.student_rows import TEACHER
from distill_jax.types import (
  Batch,
  FamilyConfig,
  Model,
  ModelInputs,
  Output,
  PyTree,
  Recorded,
  Targets,
)

NO_FEATURES = FeatureSpec()


class OtherTokenizer(struct.PyTreeNode):
  """An online teacher whose tokenizer is not the student's.

  Attributes:
    model: The teacher.
    tables: The tables of both tokenizers.
    min_mass: See dense.project.
  """

  model: Model
  tables: DenseTables
  min_mass: float = struct.field(pytree_node=False)


Teachers = Mapping[str, Model | OtherTokenizer]  # online teachers, by name


def all_teacher_outputs(
  batch: Batch,
  teachers: Teachers,
  compute: ComputeConfig,
  specs: Mapping[str, FeatureSpec],
  recorded: Recorded,
  recorded_config: FamilyConfig | None,
) -> tuple[dict[str, Targets], dict[str, Features]]:
  """Returns targets and features of every teacher of a batch, from its records or its model.

  Args:
    batch: The batch, with the targets of recorded teachers.
    teachers: The online teachers, by name.
    compute: The teachers' compute config.
    specs: The features to extract from online teachers, by name; of those without one, none.
    recorded: Metadata of the targets of the recorded teacher `TEACHER`. Features of further
      recorded teachers are not used.
    recorded_config: See `recorded_features`.
  """
  targets, teacher_features = dict(batch.targets), {}
  for name, t in targets.items():
    if t.taps_BPTD is not None:
      targets[name] = t.replace(taps_BPTD=None)
      if name == TEACHER:
        teacher_features[name] = recorded_features(t.taps_BPTD, recorded, recorded_config)
  for name, model in teachers.items():
    spec = specs.get(name, NO_FEATURES)
    targets[name], teacher_features[name] = teacher_outputs(model, name, batch, compute, spec)
  return targets, teacher_features


def teacher_outputs(
  teacher: Model | OtherTokenizer,
  name: str,
  batch: Batch,
  compute: ComputeConfig,
  spec: FeatureSpec,
) -> tuple[DenseTargets, Features]:
  """Runs an online teacher on a batch, or on the teacher's own tokens of its text.

  Args:
    teacher: The teacher.
    name: Its name in the batch.
    batch: The batch.
    compute: The teacher's compute config.
    spec: The features to extract; none of a teacher with another tokenizer.

  Returns:
    See `run_teacher`.
  """
  if not isinstance(teacher, OtherTokenizer):
    return run_teacher(teacher, batch.model_inputs, compute, spec)
  text = batch.targets[name]
  assert isinstance(text, TeacherText) and not spec.taps
  with jax.named_scope("teacher"):
    out = teacher.model(text.inputs, compute)
    targets = text.of_output(out, batch.labels_BT, teacher.tables, teacher.min_mass)
    return jax.lax.stop_gradient(targets), Features({}, {})


def run_teacher(
  model: Model, inputs: ModelInputs, compute: ComputeConfig, spec: FeatureSpec = NO_FEATURES
) -> tuple[DenseTargets, Features]:
  """Runs an online teacher, without gradient.

  Args:
    model: The teacher.
    inputs: Inputs of the batch.
    compute: The teacher's compute config.
    spec: The features to extract.

  Returns:
    Its targets, without logits, and its features.
  """
  with jax.named_scope("teacher"):
    out = model(inputs, compute, spec.taps)
    targets = DenseTargets(
      hidden_BTD=out.hidden_BTD,
      head_VD=out.head_VD,
      soft_cap=out.soft_cap,
      contrastive=out.contrastive,
    )
    return jax.lax.stop_gradient((targets, spec.extract(model, out, inputs, compute)))


def recorded_features(
  taps_BPTD: jax.Array, recorded: Recorded, teacher_config: FamilyConfig | None
) -> Features:
  """Returns the features of a recorded teacher.

  Args:
    taps_BPTD: Recorded features of P layers.
    recorded: The layers and the kind of the features.
    teacher_config: The teacher's architecture config, for queries, keys and values.
  """
  by_layer = {layer: taps_BPTD[:, i] for i, layer in enumerate(recorded.taps)}
  if recorded.tap_kind == "hidden":
    return Features(by_layer, {})
  qkv = {}
  for layer, x_BTD in by_layer.items():
    assert teacher_config is not None
    qkv[layer] = features.unflat_qkv(x_BTD, teacher_config)
  return Features({}, qkv)


def label_each_output(batch: Batch, out: Output) -> Batch:
  """Returns the batch with one position for each output of the student.

  Students with a distillation token (models/deit.py) have two outputs per label: the first is
  trained on labels, the second on teachers. For them every position is repeated.
  """
  T = batch.labels_BT.shape[1]
  if out.hidden_BTD.shape[1] == T:
    return batch

  def twice(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x_BT: jnp.repeat(x_BT, 2, axis=1), tree)

  targets = {
    name: twice(t.replace(head_VD=None)).replace(head_VD=t.head_VD)
    for name, t in batch.targets.items()
  }
  second_BT = jnp.broadcast_to(jnp.arange(2 * T)[None] % 2 == 1, (len(batch.labels_BT), 2 * T))
  doubled = twice(batch.replace(inputs=None, valid_BS=None, targets={}))
  return doubled.replace(targets=targets, distill_token_BT=second_BT)
