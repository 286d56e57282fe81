"""Students whose layers share weights, each perhaps with a low-rank difference of its own.

U different layers stand for L: neighbours share (grouped: ALBERT, arXiv:1909.11942), or layer i is
the (i mod U)th (cyclic: relaxed recursive transformers, arXiv:2410.20672, whose differences are
LoRA's and start from the residual's largest singular values). What is trained is
`SharedLayers`; the step and the export see the family's own Model of L layers that it makes, and
the gradient of a shared weight is the sum over its layers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from distill_jax.errors import InputError
from distill_jax.nn import lora, params
from distill_jax.nn.layers import LayerStack
from distill_jax.types import FamilyConfig, Model


@dataclasses.dataclass(frozen=True)
class ShareOptions:
  """Layers that share their weights: see nn/layer_sharing.py."""

  layers: int = 0
  """Number of distinct layers, from 1 to the number of layers of the model."""
  order: str = "cyclic"
  """Assignment of layers to distinct layers: "cyclic" (layer i uses distinct layer i mod N) or
  "grouped" (neighbouring layers share)."""
  start: str = "mean"
  """Initial value of a distinct layer: "mean" or "first" of the source's layers that share it."""
  lora: lora.LoraOptions = lora.LoraOptions()
  """Low-rank adapters that each layer adds to its shared weights. They start as the best
  approximation of the difference to the source's layer. With `rank` 0 there are no adapters."""


ORDERS = ("cyclic", "grouped")
STARTS = ("mean", "first")
AT = "student.share.lora"


@runtime_checkable
class ModelOfStacks(Model, Protocol):
  """A decoder, as models/_decoder.Model: its layers are stacks."""

  def __init__(self, c: Any, key: jax.Array) -> None: ...

  @staticmethod
  def layer_stacks(c: Any) -> tuple[LayerStack, ...]: ...


class SharedLayers(struct.PyTreeNode):
  """What is trained of a student whose layers share weights."""

  unique: ModelOfStacks  # the family's Model of the different layers
  deltas: lora.Adapters  # of all L layers; {} without
  config: FamilyConfig = struct.field(pytree_node=False)  # of the model of L layers
  order: str = struct.field(pytree_node=False)

  def unshare(self) -> ModelOfStacks:
    """The model of L layers without the deltas, its shared weights written out."""
    make = type(self.unique)
    abstract = jax.eval_shape(lambda: make(self.config, jax.random.key(0)))
    rows = _rows(make, self.config, self.unique.config.num_hidden_layers, self.order)
    values = {}
    for path, v in params.named_params(self.unique):
      row = rows.get(_stack_name(path))
      values[path] = v[...] if row is None else v[...][row]
    return params.replace(abstract, values)

  def with_adapters(self) -> Model:
    """The model of L layers with the deltas in it, as lora.with_adapters puts them there."""
    return lora.with_adapters(self.unshare(), self.deltas)

  def merge_adapters(self) -> Model:
    """The model of L layers with the deltas merged, each weight in the dtype that it had."""
    return lora.merge_adapters(self.unshare(), self.deltas)


def check(spec: ShareOptions, model: Model) -> None:
  """Refuses what a model (or its shapes) cannot share."""
  if spec.order not in ORDERS or spec.start not in STARTS:
    raise InputError(
      f"student.share has order {spec.order!r} and start {spec.start!r}; order is one of "
      f"{', '.join(ORDERS)} and start one of {', '.join(STARTS)}"
    )
  if not isinstance(model, ModelOfStacks):
    raise InputError(
      f"student.share.layers is {spec.layers} and the student is no decoder, whose layers these "
      "are; set student.train='whole'"
    )
  *unshared, last = model.layer_stacks(model.config)
  own = sum(stack.size for stack in unshared)
  L = own + last.size
  if not own < spec.layers <= L:
    why = f", of which the first {own} are of another kind and stay as they are" if own else ""
    raise InputError(
      f"student.share.layers is {spec.layers} and the student has {L} layers{why}; it is "
      f"from {own + 1} to {L}; set student.train='whole' to share none"
    )


def start(model: Model, spec: ShareOptions, key: jax.Array, fit: bool) -> SharedLayers:
  """What training starts from: the model's layers shared.

  Args:
    fit: the layers have been trained. Then a shared layer is the mean of its layers, or the first
      of them, as spec.start says, and a delta the best approximation of its rank of what its layer
      differs by. Else it is the first, and deltas start as LoRA's do.

  Raises:
    InputError: the spec does not fit the model.
  """
  check(spec, model)
  assert isinstance(model, ModelOfStacks)
  rows = _rows(type(model), model.config, spec.layers, spec.order)
  config = model.config.keep_layers(_first_users(rows))
  abstract = jax.eval_shape(lambda: type(model)(config, jax.random.key(0)))
  mean = fit and spec.start == "mean"
  values = {}
  for path, v in params.named_params(model):
    row = rows.get(_stack_name(path))
    values[path] = v[...] if row is None else _distinct(v[...], row, mean)
  unique = params.replace(abstract, values)
  deltas = lora.init(model, spec.lora, key, AT) if spec.lora.rank else {}
  shared = SharedLayers(unique, deltas, model.config, spec.order)
  if not fit:
    return shared
  original, without_deltas = (dict(params.named_params(m)) for m in (model, shared.unshare()))
  fitted = {path: _fit(d, original[path], without_deltas[path]) for path, d in deltas.items()}
  return shared.replace(deltas=fitted)


def _rows(
  make: type[ModelOfStacks], config: FamilyConfig, layers: int, order: str
) -> dict[str, np.ndarray]:
  """By stack, which of its different layers each of its layers is.

  Layers of another kind before the last stack's, as DeepSeek's dense ones, are not shared.
  """
  *unshared, last = make.layer_stacks(config)
  rows = {stack.name: np.arange(stack.size) for stack in unshared}
  U, i_L = layers - sum(stack.size for stack in unshared), np.arange(last.size)
  rows[last.name] = i_L % U if order == "cyclic" else i_L * U // last.size
  return rows


def _first_users(rows: dict[str, np.ndarray]) -> tuple[int, ...]:
  """The model's layers, by number, that are the first to use a different one each."""
  found, before = [], 0
  for row in rows.values():
    found += [before + int(i) for i in np.unique(row, return_index=True)[1]]
    before += len(row)
  return tuple(found)


def _distinct(x_LX: jax.Array, row: np.ndarray, mean: bool) -> jax.Array:
  """The U different layers of a stacked weight: of those that share, the mean or the first.

  Args: row, int [L], which of the U each layer is.
  """
  _, first_U, count_U = np.unique(row, return_index=True, return_counts=True)
  if not mean:
    return x_LX[first_U]
  total_UX = jnp.zeros((len(first_U), *x_LX.shape[1:]), jnp.float32).at[row].add(x_LX)
  return (total_UX / count_U.reshape(-1, *[1] * (x_LX.ndim - 1))).astype(x_LX.dtype)


def _fit(delta: lora.LoraAdapter, original: nnx.Variable, shared: nnx.Variable) -> lora.LoraAdapter:
  """The delta nearest to original - shared (Eckart and Young), both factors of one size.

  Args: original, shared: stacked weights [L, ...] in the model's layout.

  A direction that they do not differ in keeps A as it was drawn, and B at 0: with both at 0
  neither would have a gradient.
  """
  a_LIR, b_LRO = delta.a[...], delta.b[...]  # I and O may each be several axes here
  rank, axes = a_LIR.shape[-1], original.get_metadata()["axes"][1:]
  inputs = delta.a.get_metadata()["axes"][1:-1]
  outputs = delta.b.get_metadata()["axes"][2:]
  to_inputs_outputs = [axes.index(axis) for axis in (*inputs, *outputs)]
  I = math.prod(a_LIR.shape[1:-1])

  def fit_layer(layer: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    original_layer, shared_layer = layer
    rest = original_layer.astype(jnp.float32) - shared_layer.astype(jnp.float32)
    rest_IO = rest.transpose(to_inputs_outputs).reshape(I, -1) / delta.scale
    if rest_IO.shape[1] >= I:
      return nearest_factors(rest_IO, rank)
    b_OR, a_RI = nearest_factors(rest_IO.T, rank)
    return a_RI.T, b_OR.T

  new_a, new_b = jax.lax.map(fit_layer, (original[...], shared[...]))  # a layer at a time
  differs = jnp.any(new_b != 0, -1).reshape(a_LIR.shape[0], *[1] * len(inputs), rank)
  new_a = jnp.where(differs, new_a.reshape(a_LIR.shape), a_LIR)
  return delta.replace(a=delta.a.replace(new_a), b=delta.b.replace(new_b.reshape(b_LRO.shape)))


def nearest_factors(x_IO: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
  """[I, R] and [R, O], of equal norms, whose product is nearest to x, which has I <= O.

  By the eigenvectors of x x^T, the smaller of the two squares.
  """
  _, u_II = jnp.linalg.eigh(jnp.matmul(x_IO, x_IO.T, precision="highest"))
  u_IR = u_II[:, ::-1][:, :rank]  # the largest first
  v_RO = jnp.matmul(u_IR.T, x_IO, precision="highest")
  size_R = jnp.linalg.norm(v_RO, axis=1)  # the singular values
  root_R = jnp.sqrt(size_R)
  return u_IR * root_R[None], v_RO / jnp.where(size_R > 0, root_R, 1.0)[:, None]


def _stack_name(path: str) -> str:
  """The stack that a parameter belongs to: "layers" of "layers.q"."""
  return path.partition(".")[0]
