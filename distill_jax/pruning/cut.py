"""A student's parameters out of the teacher's, by the names of their axes.

Every parameter declares what its axes are (nn/params.py), so that no family has code here: where
the student's declaration is shorter along an axis, it takes the indices that are kept along the
axis of that name.
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
# By the energy where it is read. SmolLM2, 512 (448, 384) of 576 channels: held-out 3.77 (4.90,
# 6.07) nats, and by Minitron's mean size of what the norms put out 3.90 (5.15, 6.23).
READ = ("attn_norm.energy", "mlp_norm.energy", "norm.energy")
SAME = {"routes": "experts"}  # axes that are cut at another's indices


@dataclasses.dataclass(frozen=True)
class KeptIndices:
  """Indices into a teacher's axes that its student keeps.

  Attributes:
    layers: the teacher's, by number, in the student's order.
    rows: by stack, those layers' numbers in the teacher's stack.
    axes: by stack and axis, [L', k], or [L', E', k] for the channels of experts.
    channels: [D'] of the residual stream.
    correction: by the path of a norm, [L'] or scalar: see `corrections`.
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
  """Chooses what a student keeps.

  Args:
    teacher, student: their Configs.
    layers: the teacher's layers that the student has.
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
  """What one stack keeps along the axes that get shorter.

  Args:
    teacher: its Config.
    old, new: how long each axis is.
    scores: what was measured of the layers that are kept.
  """
  shorter = {axis for axis, n in old.items() if new.get(axis, 0) < n}
  indices: dict[str, np.ndarray] = {}
  if shorter & {"heads", "kv_heads"}:
    merge = options.kv_heads_by == "merge" and "kv_heads" in shorter
    groups = new.get("kv_heads", new["heads"])  # latent attention has none of its own
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
  """Returns what norms' scales are multiplied by where only some channels are left.

  By the path of a norm, [L'] or scalar; empty where all `width` channels are kept.

  A norm divides by the root mean square of its input, over fewer channels now, and those are
  the large ones. Where the kept channels had, in the mean, `energy` times the mean square of
  all of them, what comes out is too small by sqrt(energy): exactly where the others are 0.
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
  """Returns the student, in its storage sharding; a part that nothing is cut from keeps its bits.

  Args:
    model: the teacher.
    config: the student's.

  Raises:
    InputError: a size does not divide over the mesh.
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
  """Weights by their stack and Hugging Face's name of the module that they are in."""
  return {
    (path.partition(".")[0], v.get_metadata()["hf"].removesuffix(".weight")): v
    for path, v in named.items()
  }


def _scaled(
  values: dict[str, jax.Array], kept: KeptIndices, teacher: DecoderConfig, student: DecoderConfig
) -> dict[str, jax.Array]:
  """Norms corrected, and the embedding where a family scales it by its width."""
  factors = {path: jnp.asarray(c, jnp.float32) for path, c in kept.correction.items()}
  if (ratio := teacher.embed_scale / student.embed_scale) != 1:
    values["embed"] = values["embed"] * jnp.asarray(ratio, values["embed"].dtype)
    if student.tie_word_embeddings:  # the same table is the head, and logits stay as they are
      factors["norm"] = factors["norm"] / ratio
  for path, c in factors.items():
    x, off = values[path], teacher.NORM_OFFSET
    scale = (x.astype(jnp.float32) + off) * c.reshape(*c.shape, *[1] * (x.ndim - c.ndim)) - off
    values[path] = scale.astype(x.dtype)
  return values


@dataclasses.dataclass(frozen=True)
class _Cutter:
  """Cuts one parameter after another.

  Attributes:
    theirs, ours: the teacher's and the student's parameters, by `_by_module`.
  """

  kept: KeptIndices
  theirs: dict[tuple[str, str], nnx.Variable]
  ours: dict[tuple[str, str], nnx.Variable]

  def value(self, path: str, v: nnx.Variable, like: nnx.Variable) -> jax.Array:
    """The student's value of one parameter, declared as `like`, out of the teacher's."""
    x, stack, axes = v[...], path.partition(".")[0], v.get_metadata()["axes"]
    if axes[0] != "layers":
      return self._shorten(x, axes, like.shape, {})
    rows = self.kept.rows[stack]
    if not np.array_equal(rows, np.arange(len(x))):
      x = x[rows]
    indices = self.kept.axes[stack]
    if axes[-1] != "bias" or x.shape == like.shape:
      return self._shorten(x, axes, like.shape, indices)
    # A bias is flat; its axes are the output axes of its module's weight.
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
      else:  # neighbours are merged (arXiv:2305.13245)
        x = x.reshape(*x.shape[:at], n, -1, *x.shape[at + 1 :]).mean(at + 1)
    return x


def _sizes(weight: nnx.Variable, axes: tuple[str, ...]) -> list[int]:
  """How long a weight is along some of its axes."""
  sizes = dict(zip(weight.get_metadata()["axes"], weight.shape, strict=True))
  return [sizes[axis] for axis in axes]


def _broadcastable(indices: np.ndarray, at: int, ndim: int) -> np.ndarray:
  """Indices [L, ..., k] along axis `at` of an array whose first axes are theirs."""
  before = [1] * (at - indices.ndim + 1)
  return indices.reshape(*indices.shape[:-1], *before, -1, *[1] * (ndim - at - 1))
