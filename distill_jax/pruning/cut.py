"""Cuts a student's parameters from the teacher's, by the names of their axes.

Every parameter declares the names of its axes (nn/params.py), so no family needs its own code.
Where an axis of the student is shorter, the student takes the kept indices of the axis of that
name.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill_jax.models import DecoderConfig, DecoderModel
from distill_jax.nn import params, sharding
from distill_jax.pruning import choose, shapes
from distill_jax.pruning.measure import Importance
from distill_jax.pruning.options import ShrinkOptions

CHANNELS = ("embed", "table", "norm")  # axes of the residual stream, the same in all layers
# Channels are chosen by their energy at the inputs of these norms. For SmolLM2 with 512 (448, 384)
# of 576 channels, held-out cross-entropy is 3.77 (4.90, 6.07) nats. With Minitron's criterion, the
# mean absolute output of the norms, it is 3.90 (5.15, 6.23).
READ = ("attn_norm.energy", "mlp_norm.energy", "norm.energy")
SAME = {"routes": "experts"}  # axes that are cut at the indices of another axis


@dataclasses.dataclass(frozen=True)
class KeptIndices:
  """Indices into the teacher's axes that the student keeps.

  Attributes:
    layers: numbers of the teacher's layers, in the student's order.
    rows: by stack, the indices of these layers in the teacher's stack.
    axes: by stack and axis, [L', k], or [L', E', k] for channels of experts.
    channels: [D'], channels of the residual stream.
    correction: by path of a norm, [L'] or scalar; see `corrections`.
  """

  layers: tuple[int, ...]
  rows: dict[str, np.ndarray]
  axes: dict[str, dict[str, np.ndarray]]
  channels: np.ndarray
  correction: dict[str, np.ndarray]


def keep(
  options: ShrinkOptions,
  family: str,
  teacher: DecoderConfig,
  student: DecoderConfig,
  layers: tuple[int, ...],
  measured: Importance,
) -> KeptIndices:
  """Chooses the indices that a student keeps.

  Args:
    options: the options of `shrink`.
    family: the teacher's family.
    teacher: the teacher's Config.
    student: the student's Config.
    layers: the teacher's layers that the student keeps.
    measured: the importance of the teacher's parts.
  """
  old, new = _axis_sizes(family, teacher), _axis_sizes(family, student)
  rows: dict[str, np.ndarray] = {}
  axes: dict[str, dict[str, np.ndarray]] = {}
  first = 0
  for stack in old:
    n = old[stack]["layers"]
    local = np.array([i - first for i in layers if first <= i < first + n], int)
    first += n
    if len(local):
      scores = {name: x[local] for name, x in measured[stack].items()}
      rows[stack] = local
      axes[stack] = _stack_indices(options, teacher, old[stack], new[stack], scores)
  D, channels = teacher.hidden_size, np.arange(teacher.hidden_size)
  if student.hidden_size < D:
    energies = [x for stack in measured.values() for name, x in stack.items() if name in READ]
    total = sum(x.reshape(-1, D).sum(0) for x in energies)
    channels = choose.top_indices(np.asarray(total), student.hidden_size)
  kept = KeptIndices(layers, rows, axes, channels, {})
  return dataclasses.replace(kept, correction=corrections(kept, measured, D))


def _axis_sizes(family: str, config: DecoderConfig) -> dict[str, dict[str, int]]:
  """Returns the length of each axis, by stack."""
  sizes: dict[str, dict[str, int]] = {}
  for path, v in params.named_params(shapes.abstract(family, config)):
    axes = v.get_metadata()["axes"]
    if axes[0] == "layers":
      named = zip(axes, v.shape, strict=True)
      sizes.setdefault(path.partition(".")[0], {}).update(named)
  return sizes


def _stack_indices(
  options: ShrinkOptions,
  teacher: DecoderConfig,
  old: dict[str, int],
  new: dict[str, int],
  scores: dict[str, np.ndarray],
) -> dict[str, np.ndarray]:
  """Returns the indices that one stack keeps, by axis that becomes shorter.

  Args:
    options: the options of `shrink`.
    teacher: the teacher's Config.
    old: the teacher's size of each axis.
    new: the student's size of each axis.
    scores: the importance of the kept layers' parts.
  """
  shorter = {axis for axis, n in old.items() if new.get(axis, 0) < n}
  indices: dict[str, np.ndarray] = {}
  if shorter & {"heads", "kv_heads"}:
    merge = options.kv_heads_by == "merge" and "kv_heads" in shorter
    groups = new.get("kv_heads", new["heads"])  # absent in latent attention
    query, key_value = choose.heads(
      scores["heads"], teacher.num_key_value_heads, new["heads"], groups, merge
    )
    indices["heads"] = query
    if key_value is not None:
      indices["kv_heads"] = key_value
  if "mlp" in shorter:
    indices["mlp"] = choose.top_indices(scores["mlp"], new["mlp"])
  if "experts" in shorter:
    indices["experts"] = choose.experts(scores["experts"], new["experts"], teacher.expert_groups)
  if "expert_mlp" in shorter:
    score = scores["expert_mlp"]
    if "experts" in indices:
      score = np.take_along_axis(score, indices["experts"][..., None], 1)
    indices["expert_mlp"] = choose.top_indices(score, new["expert_mlp"])
  return indices


def corrections(kept: KeptIndices, measured: Importance, width: int) -> dict[str, np.ndarray]:
  """Returns factors for the scales of norms if only some channels are kept.

  A norm divides by the root mean square of its input. The kept channels are the large ones, so
  their root mean square is larger than that of all channels. If their mean square is `energy` times
  the mean square of all channels, the norm's output is too small by sqrt(energy). This is exact if
  the removed channels are 0.

  Args:
    kept: the kept indices.
    measured: the importance of the teacher's parts.
    width: the teacher's number of channels.

  Returns:
    Factors by path of the norm, [L'] or scalar; empty if all channels are kept.
  """
  if len(kept.channels) == width:
    return {}
  factors = {}
  for stack, named in measured.items():
    for name, energy in named.items():
      if name.endswith(".energy") and (not stack or stack in kept.rows):
        mean = np.sqrt(energy[..., kept.channels].mean(-1))
        path = f"{stack}.{name}".strip(".").removesuffix(".energy")
        factors[path] = mean[kept.rows[stack]] if stack else mean
  return factors


def cut(
  model: DecoderModel,
  family: str,
  config: DecoderConfig,
  kept: KeptIndices,
  mesh: jax.sharding.Mesh,
  rules: sharding.Rules,
) -> DecoderModel:
  """Returns the student in its storage sharding. Parameters that are not cut are unchanged.

  Args:
    model: the teacher.
    family: the family of both.
    config: the student's Config.
    kept: the kept indices.
    mesh: the mesh.
    rules: the rules of the student.

  Raises:
    InputError: a size is not divisible by the mesh axes.
  """
  abstract = shapes.abstract(family, config)

  def make(model: DecoderModel) -> DecoderModel:
    theirs, ours = dict(params.named_params(model)), dict(params.named_params(abstract))
    cutter = _Cutter(kept, _by_module(theirs), _by_module(ours))
    values = {path: cutter.value(path, theirs[path], v) for path, v in ours.items()}
    values = _scaled(values, kept, model.config, config)
    return params.replace(abstract, values)

  return jax.jit(make, out_shardings=sharding.shardings(abstract, mesh, rules))(model)


def _by_module(named: dict[str, nnx.Variable]) -> dict[tuple[str, str], nnx.Variable]:
  """Returns parameters by stack and Hugging Face name of their module."""
  return {
    (path.partition(".")[0], v.get_metadata()["hf"].removesuffix(".weight")): v
    for path, v in named.items()
  }


def _scaled(
  values: dict[str, jax.Array], kept: KeptIndices, teacher: DecoderConfig, student: DecoderConfig
) -> dict[str, jax.Array]:
  """Applies `corrections`, and rescales the embedding of families that scale it by its width."""
  factors = {path: jnp.asarray(c, jnp.float32) for path, c in kept.correction.items()}
  if (ratio := teacher.embed_scale / student.embed_scale) != 1:
    values["embed"] = values["embed"] * jnp.asarray(ratio, values["embed"].dtype)
    if student.tie_word_embeddings:  # the table is also the head, so this keeps the logits
      factors["norm"] = factors["norm"] / ratio
  for path, c in factors.items():
    x, off = values[path], teacher.NORM_OFFSET
    scale = (x.astype(jnp.float32) + off) * c.reshape(*c.shape, *[1] * (x.ndim - c.ndim)) - off
    values[path] = scale.astype(x.dtype)
  return values


@dataclasses.dataclass(frozen=True)
class _Cutter:
  """Cuts parameters.

  Attributes:
    kept: the kept indices.
    theirs: the teacher's parameters, by `_by_module`.
    ours: the student's parameters, by `_by_module`.
  """

  kept: KeptIndices
  theirs: dict[tuple[str, str], nnx.Variable]
  ours: dict[tuple[str, str], nnx.Variable]

  def value(self, path: str, v: nnx.Variable, like: nnx.Variable) -> jax.Array:
    """Returns the student's value of one parameter.

    Args:
      path: the path of the parameter.
      v: the teacher's parameter.
      like: the student's declaration.
    """
    x, stack, axes = v[...], path.partition(".")[0], v.get_metadata()["axes"]
    if axes[0] != "layers":
      return self._shorten(x, axes, like.shape, {})
    rows = self.kept.rows[stack]
    if not np.array_equal(rows, np.arange(len(x))):
      x = x[rows]
    indices = self.kept.axes[stack]
    if axes[-1] != "bias" or x.shape == like.shape:
      return self._shorten(x, axes, like.shape, indices)
    # A bias is flat. Its axes are the output axes of its module's weight.
    module = stack, v.get_metadata()["hf"].rpartition(".")[0]
    weight = self.theirs[module]
    names = weight.get_metadata()["out"]
    old, new = _sizes(weight, names), _sizes(self.ours[module], names)
    x = x.reshape(len(x), *old)
    return self._shorten(x, ("layers", *names), (len(x), *new), indices).reshape(like.shape)

  def _shorten(
    self, x: jax.Array, axes: tuple[str, ...], shape: tuple[int, ...], kept: dict[str, np.ndarray]
  ) -> jax.Array:
    for at, (axis, n) in enumerate(zip(axes, shape, strict=True)):
      if x.shape[at] == n:
        continue
      if axis in CHANNELS:
        x = jnp.take(x, self.kept.channels, at)
      elif (axis := SAME.get(axis, axis)) in kept:
        x = jnp.take_along_axis(x, _broadcastable(kept[axis], at, x.ndim), at)
      else:  # key/value heads of neighbouring groups are averaged (arXiv:2305.13245)
        x = x.reshape(*x.shape[:at], n, -1, *x.shape[at + 1 :]).mean(at + 1)
    return x


def _sizes(weight: nnx.Variable, axes: tuple[str, ...]) -> list[int]:
  """Returns the sizes of a weight along some of its axes."""
  sizes = dict(zip(weight.get_metadata()["axes"], weight.shape, strict=True))
  return [sizes[axis] for axis in axes]


def _broadcastable(indices: np.ndarray, at: int, ndim: int) -> np.ndarray:
  """Reshapes indices [L, ..., k] for take_along_axis on axis `at` of an array [L, ...]."""
  before = [1] * (at - indices.ndim + 1)
  return indices.reshape(*indices.shape[:-1], *before, -1, *[1] * (ndim - at - 1))
