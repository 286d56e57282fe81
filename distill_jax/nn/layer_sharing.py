"""Students whose layers share weights, each perhaps with a low-rank difference of its own.

U different layers stand for L: neighbours share (grouped: ALBERT, arXiv:1909.11942), or layer i is
the (i mod U)th (cyclic: relaxed recursive transformers, arXiv:2410.20672, whose differences are
LoRA's and start from the residual's largest singular values). What is trained is `Shared`; the
step and the export see the family's own Model of L layers that it makes, and the gradient of a
shared weight is the sum over its layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from distill_jax.errors import InputError
from distill_jax.nn import lora, params


@dataclasses.dataclass(frozen=True)
class ShareOptions:
  """Layers that have their weights in common: see share.py."""

  layers: int = 0  # different ones, of which the model's are made; 0: each is its own
  order: str = "cyclic"  # cyclic, the first again after the last | grouped, neighbours alike
  start: str = "mean"  # mean | first, of a source's layers that are to be one
  lora: lora.LoraOptions = (
    lora.LoraOptions()
  )  # each layer's own difference, which starts from the source's


ORDERS = ("cyclic", "grouped")
STARTS = ("mean", "first")
AT = "student.share.lora"


class Shared(struct.PyTreeNode):
  """What is trained of a student whose layers share weights."""

  unique: Any  # the family's Model of the different layers
  deltas: lora.Adapters  # of all L layers; {} without
  config: Any = struct.field(pytree_node=False)  # of the model of L layers
  order: str = struct.field(pytree_node=False)

  def unshare(self) -> Any:
    """The model of L layers without the deltas, its shared weights written out."""
    make = type(self.unique)
    like = jax.eval_shape(lambda: make(self.config, jax.random.key(0)))
    rows = _rows(make, self.config, self.unique.config.num_hidden_layers, self.order)
    taken = lambda x, row: x if row is None else x[row]
    named = params.named_params(self.unique)
    return params.replace(like, {path: taken(v[...], rows.get(_stack(path))) for path, v in named})

  def with_adapters(self) -> Any:
    """The model of L layers with the deltas in it, as lora.with_adapters puts them there."""
    return lora.with_adapters(self.unshare(), self.deltas)

  def merge_adapters(self) -> Any:
    """The model of L layers with the deltas merged, each weight in the dtype that it had."""
    return lora.merge_adapters(self.unshare(), self.deltas)


def check(spec: ShareOptions, model: Any) -> None:
  """Refuses what a model (or its shapes) cannot share."""
  if spec.order not in ORDERS or spec.start not in STARTS:
    raise InputError(
      f"student.share has order {spec.order!r} and start {spec.start!r}; order is one of "
      f"{', '.join(ORDERS)} and start one of {', '.join(STARTS)}"
    )
  if not hasattr(model, "layer_stacks"):
    raise InputError(
      f"student.share.layers is {spec.layers} and the student is no decoder, whose layers these "
      "are; leave student.share as it is"
    )
  *alone, (_, _, n) = model.layer_stacks(model.config)
  own = sum(k for _, _, k in alone)
  if not own < spec.layers <= own + n:
    why = f", of which the first {own} are of another kind and stay as they are" if own else ""
    raise InputError(
      f"student.share.layers is {spec.layers} and the student has {own + n} layers{why}; it is "
      f"from {own + 1} to {own + n}; leave student.share as it is to share none"
    )


def start(model: Any, spec: ShareOptions, key: jax.Array, fit: bool) -> Shared:
  """What training starts from: the model's layers shared.

  Args:
    fit: the layers have been trained. Then a shared layer is the mean of its layers, or the first
      of them, as spec.start says, and a delta the best approximation of its rank of what its layer
      differs by. Else it is the first, and deltas start as LoRA's do.

  Raises:
    InputError: the spec does not fit the model.
  """
  check(spec, model)
  rows = _rows(type(model), model.config, spec.layers, spec.order)
  like = jax.eval_shape(
    lambda: type(model)(model.config.keep_layers(_first(rows)), jax.random.key(0))
  )
  mean = fit and spec.start == "mean"
  values = {}
  for path, v in params.named_params(model):
    row = rows.get(_stack(path))
    values[path] = v[...] if row is None else _shared(v[...], row, mean)
  unique = params.replace(like, values)
  deltas = lora.init(model, spec.lora, key, AT) if spec.lora.rank else {}
  shared = Shared(unique, deltas, model.config, spec.order)
  if not fit:
    return shared
  theirs, ours = (dict(params.named_params(m)) for m in (model, shared.unshare()))
  fitted = {path: _fitted(d, theirs[path], ours[path]) for path, d in deltas.items()}
  return shared.replace(deltas=fitted)


def _rows(make: Any, config: Any, layers: int, order: str) -> dict[str, np.ndarray]:
  """By stack, which of its different layers each of its layers is.

  Layers of another kind before the last stack's, as DeepSeek's dense ones, are not shared.
  """
  *alone, (last, _, n) = make.layer_stacks(config)
  rows = {name: np.arange(k) for name, _, k in alone}
  U = layers - sum(k for _, _, k in alone)
  rows[last] = np.arange(n) % U if order == "cyclic" else np.arange(n) * U // n
  return rows


def _first(rows: dict[str, np.ndarray]) -> tuple[int, ...]:
  """The model's layers, by number, that are the first to use a different one each."""
  found, before = [], 0
  for row in rows.values():
    found += [before + int(i) for i in np.unique(row, return_index=True)[1]]
    before += len(row)
  return tuple(found)


def _shared(x_L: jax.Array, row: np.ndarray, mean: bool) -> jax.Array:
  """The different layers of a stacked weight."""
  _, first, count = np.unique(row, return_index=True, return_counts=True)
  if not mean:
    return x_L[first]
  total = jnp.zeros((len(first), *x_L.shape[1:]), jnp.float32).at[row].add(x_L)
  return (total / count.reshape(-1, *[1] * (x_L.ndim - 1))).astype(x_L.dtype)


def _fitted(delta: lora.Adapter, weight: Any, shared: Any) -> lora.Adapter:
  """The delta nearest to weight - shared (Eckart and Young), both factors of one size.

  A direction that they do not differ in keeps A as it was drawn, and B at 0: with both at 0
  neither would have a gradient.
  """
  a, b = delta.a[...], delta.b[...]
  rank, names = a.shape[-1], weight.get_metadata()["axes"][1:]
  inner = delta.a.get_metadata()["axes"][1:-1]
  outer = delta.b.get_metadata()["axes"][2:]
  order = [names.index(axis) for axis in (*inner, *outer)]

  def one(layers: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    rest = layers[0].astype(jnp.float32) - layers[1].astype(jnp.float32)
    rest = rest.transpose(order).reshape(a[0, ..., 0].size, -1) / delta.scale
    return factors(rest, rank) if len(rest) <= rest.shape[1] else factors(rest.T, rank, turn=True)

  new_a, new_b = jax.lax.map(one, (weight[...], shared[...]))  # a layer at a time
  differs = jnp.any(new_b != 0, -1).reshape(a.shape[0], *[1] * len(inner), rank)
  new_a = jnp.where(differs, new_a.reshape(a.shape), a)
  return delta.replace(a=delta.a.replace(new_a), b=delta.b.replace(new_b.reshape(b.shape)))


def factors(x_IO: jax.Array, rank: int, turn: bool = False) -> tuple[jax.Array, jax.Array]:
  """[I, rank] and [rank, O], of equal norms, whose product is nearest to x, which has I <= O.

  By the eigenvectors of x x^T, the smaller of the two squares. With `turn` the factors of x^T:
  [O, rank] and [rank, I].
  """
  _, u_II = jnp.linalg.eigh(jnp.matmul(x_IO, x_IO.T, precision="highest"))
  u_IR = u_II[:, ::-1][:, :rank]  # the largest first
  v_RO = jnp.matmul(u_IR.T, x_IO, precision="highest")
  size_R = jnp.linalg.norm(v_RO, axis=1)  # the singular values
  root_R = jnp.sqrt(size_R)
  a_IR, b_RO = u_IR * root_R[None], v_RO / jnp.where(size_R > 0, root_R, 1.0)[:, None]
  return (b_RO.T, a_IR.T) if turn else (a_IR, b_RO)


def _stack(path: str) -> str:
  return path.partition(".")[0]
