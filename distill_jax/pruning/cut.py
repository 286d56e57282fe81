"""A student's parameters out of the teacher's, by the names of their axes.

Every parameter says what its axes are (params.py), so that no family has code here: where the
student's declaration is shorter along an axis, the places that are kept along the axis of that
name are taken.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.nn import params, sharding
from distill_jax.pruning import choose, shapes
from distill_jax.pruning.options import ShrinkOptions

CHANNELS = ("embed", "table", "norm")  # axes of the residual stream, the same in all layers
# By the energy where it is read. SmolLM2, 512 (448, 384) of 576 channels: held-out 3.77 (4.90,
# 6.07) nats, and by Minitron's mean size of what the norms put out 3.90 (5.15, 6.23).
READ = ("attn_norm.energy", "mlp_norm.energy", "norm.energy")
SAME = {"routes": "experts"}  # axes that go by another's places
Measured = dict[str, dict[str, np.ndarray]]  # measure.importance


@dataclasses.dataclass(frozen=True)
class Kept:
  """Places that a student takes from its teacher.

  Attributes:
    layers: the teacher's, by number, in the student's order.
    rows: by stack, those layers' numbers in the teacher's stack.
    places: by stack and axis, [L', k], or [L', E', k] for the channels of experts.
    channels: [D'] of the residual stream.
    correction: by the path of a norm, [L'] or scalar: see `corrections`.
  """

  layers: tuple[int, ...]
  rows: dict[str, np.ndarray]
  places: dict[str, dict[str, np.ndarray]]
  channels: np.ndarray
  correction: dict[str, np.ndarray]


def keep(
  s: ShrinkOptions, family: str, was: Any, now: Any, layers: tuple[int, ...], measured: Measured
) -> Kept:
  """What is kept of a model of Config `was` for one of Config `now`, which has these layers."""
  sizes = _sizes(shapes.abstract(family, now))
  rows: dict[str, np.ndarray] = {}
  places: dict[str, dict[str, np.ndarray]] = {}
  old, first = _sizes(shapes.abstract(family, was)), 0
  for stack in old:
    n = old[stack]["layers"]
    local = np.array([i - first for i in layers if first <= i < first + n], int)
    first += n
    if len(local):
      of = {name: x[local] for name, x in measured[stack].items()}
      rows[stack], places[stack] = local, _places(s, was, old[stack], sizes[stack], of)
  D, channels = was.hidden_size, np.arange(was.hidden_size)
  if now.hidden_size < D:
    read = [x for of in measured.values() for name, x in of.items() if name in READ]
    total = sum(x.reshape(-1, D).sum(0) for x in read)
    channels = choose.best(np.asarray(total), now.hidden_size)
  kept = Kept(layers, rows, places, channels, {})
  return dataclasses.replace(kept, correction=corrections(kept, measured, D))


def _sizes(model: Any) -> dict[str, dict[str, int]]:
  """By stack: how long each axis is."""
  sizes: dict[str, dict[str, int]] = {}
  for path, v in params.named_params(model):
    axes = v.get_metadata()["axes"]
    if axes[0] == "layers":
      named = zip(axes, v.shape, strict=True)
      sizes.setdefault(path.partition(".")[0], {}).update(named)
  return sizes


def _places(
  s: ShrinkOptions,
  was: Any,
  old: dict[str, int],
  new: dict[str, int],
  measured: dict[str, np.ndarray],
) -> dict[str, np.ndarray]:
  """What one stack keeps along the axes that get shorter."""
  less = lambda axis: new.get(axis, 0) < old.get(axis, 0)
  places: dict[str, np.ndarray] = {}
  if less("heads") or less("kv_heads"):
    G = was.num_key_value_heads
    merge = s.kv_heads_by == "merge" and less("kv_heads")
    groups = new.get("kv_heads", new["heads"])  # latent attention has none of its own
    q, kv = choose.heads(measured["heads"], G, new["heads"], groups, merge)
    places["heads"] = q
    places |= {} if kv is None else {"kv_heads": kv}
  if less("mlp"):
    places["mlp"] = choose.best(measured["mlp"], new["mlp"])
  if less("experts"):
    groups = getattr(was, "n_group", 1)
    places["experts"] = choose.experts(measured["experts"], new["experts"], groups)
  if less("expert_mlp"):
    score = measured["expert_mlp"]
    if "experts" in places:
      score = np.take_along_axis(score, places["experts"][..., None], 1)
    places["expert_mlp"] = choose.best(score, new["expert_mlp"])
  return places


def corrections(kept: Kept, measured: Measured, width: int) -> dict[str, np.ndarray]:
  """By what a norm's scale is multiplied where only some channels are left, [L'] or scalar.

  A norm divides by the root mean square of its input, over fewer channels now, and those are
  the large ones. Where the kept channels had, in the mean, `energy` times the mean square of
  all of them, what comes out is too small by sqrt(energy): exactly where the others are 0.
  """
  if len(kept.channels) == width:
    return {}
  found = {}
  for stack, named in measured.items():
    for name, energy in named.items():
      if name.endswith(".energy") and (not stack or stack in kept.rows):
        mean = np.sqrt(energy[..., kept.channels].mean(-1))
        path = f"{stack}.{name}".strip(".").removesuffix(".energy")
        found[path] = mean[kept.rows[stack]] if stack else mean
  return found


def cut(model: Any, family: str, config: Any, kept: Kept, mesh: Any, rules: sharding.Rules) -> Any:
  """The student, in its storage sharding; a part that nothing is cut from keeps its bits.

  Raises:
    InputError: a size does not divide over the mesh.
  """
  like = shapes.abstract(family, config)
  where = sharding.shardings(like, mesh, rules)

  def make(model: Any) -> Any:
    theirs, ours = dict(params.named_params(model)), dict(params.named_params(like))
    cutter = _Cutter(kept, _by_module(theirs), _by_module(ours))
    values = {path: cutter.value(path, theirs[path], v) for path, v in ours.items()}
    values = _scaled(values, kept, model.config, config)
    return params.replace(like, values)

  return jax.jit(make, out_shardings=where)(model)


def _by_module(named: dict[str, Any]) -> dict[tuple[str, str], Any]:
  """Weights by their stack and Hugging Face's name of the module that they are in."""
  of = lambda path, v: (path.partition(".")[0], v.get_metadata()["hf"].removesuffix(".weight"))
  return {of(path, v): v for path, v in named.items()}


def _scaled(values: dict[str, jax.Array], kept: Kept, was: Any, now: Any) -> dict[str, jax.Array]:
  """Norms corrected, and the embedding where a family scales it by its width."""
  factor = {path: jnp.asarray(c, jnp.float32) for path, c in kept.correction.items()}
  if (ratio := was.embed_scale / now.embed_scale) != 1:
    values["embed"] = values["embed"] * jnp.asarray(ratio, values["embed"].dtype)
    if now.tie_word_embeddings:  # the same table is the head, and logits stay as they are
      factor["norm"] = factor["norm"] / ratio
  for path, c in factor.items():
    x, off = values[path], was.NORM_OFFSET
    scale = (x.astype(jnp.float32) + off) * c.reshape(*c.shape, *[1] * (x.ndim - c.ndim)) - off
    values[path] = scale.astype(x.dtype)
  return values


@dataclasses.dataclass(frozen=True)
class _Cutter:
  kept: Kept
  theirs: dict[tuple[str, str], Any]
  ours: dict[tuple[str, str], Any]

  def value(self, path: str, v: Any, like: Any) -> jax.Array:
    """The student's value of one parameter."""
    x, stack, axes = v[...], path.partition(".")[0], v.get_metadata()["axes"]
    if axes[0] != "layers":
      return self._shorter(x, axes, like.shape, {})
    rows = self.kept.rows[stack]
    if not np.array_equal(rows, np.arange(len(x))):
      x = x[rows]
    places = self.kept.places[stack]
    if axes[-1] != "bias" or x.shape == like.shape:
      return self._shorter(x, axes, like.shape, places)
    # A bias is flat; its axes are those that its module's weight puts out.
    module = stack, v.get_metadata()["hf"].rpartition(".")[0]
    out = lambda w: dict(zip(w.get_metadata()["axes"], w.shape, strict=True))
    names = self.theirs[module].get_metadata()["out"]
    was, now = ([out(w[module])[a] for a in names] for w in (self.theirs, self.ours))
    x = self._shorter(x.reshape(len(x), *was), ("layers", *names), (len(x), *now), places)
    return x.reshape(like.shape)

  def _shorter(
    self, x: jax.Array, axes: tuple[str, ...], shape: tuple[int, ...], places: dict[str, np.ndarray]
  ) -> jax.Array:
    for at, (axis, n) in enumerate(zip(axes, shape, strict=True)):
      if x.shape[at] == n:
        continue
      if axis in CHANNELS:
        x = jnp.take(x, self.kept.channels, at)
      elif (axis := SAME.get(axis, axis)) in places:
        x = jnp.take_along_axis(x, _against(places[axis], at, x.ndim), at)
      else:  # neighbours are merged (arXiv:2305.13245)
        x = x.reshape(*x.shape[:at], n, -1, *x.shape[at + 1 :]).mean(at + 1)
    return x


def _against(places: np.ndarray, at: int, ndim: int) -> np.ndarray:
  """Places [L, ..., k] as indices along axis `at` of an array whose first axes are theirs."""
  before = [1] * (at - places.ndim + 1)
  return places.reshape(*places.shape[:-1], *before, -1, *[1] * (ndim - at - 1))
