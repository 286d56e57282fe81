"""Students whose layers share weights, optionally with a low-rank delta for each layer.

A model of L layers has U distinct layers. In grouped order, neighbouring layers share (ALBERT,
arXiv:1909.11942). In cyclic order, layer i uses distinct layer i mod U (relaxed recursive
transformers, arXiv:2410.20672). As in that paper, deltas are LoRA adapters, initialised from the
largest singular values of the difference. Training updates `SharedLayers`; the training step and
the export use the family's ordinary model of L layers that it expands to. The gradient of a shared
weight is the sum over its layers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from distill_jax.errors import bad_value, check_choice
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
  approximation of the difference to the source's layer. With `rank` 0, layers have none."""


ORDERS = ("cyclic", "grouped")
STARTS = ("mean", "first")
AT = "student.share.lora"


@runtime_checkable
class ModelOfStacks(Model, Protocol):
  """The part of models/_decoder.Model that is used here: a model whose layers are stacks."""

  def __init__(self, c: Any, key: jax.Array) -> None: ...

  @staticmethod
  def layer_stacks(c: Any) -> tuple[LayerStack, ...]: ...


class SharedLayers(struct.PyTreeNode):
  """The trained parameters of a student whose layers share weights."""

  unique: ModelOfStacks  # the family's Model with only the distinct layers
  deltas: lora.Adapters  # adapters of all L layers; {} for none
  config: FamilyConfig = struct.field(pytree_node=False)  # config of the model of L layers
  order: str = struct.field(pytree_node=False)

  def unshare(self) -> ModelOfStacks:
    """Returns the model of L layers, with a copy of the shared weights per layer and no deltas."""
    make = type(self.unique)
    abstract = jax.eval_shape(lambda: make(self.config, jax.random.key(0)))
    rows = _rows(make, self.config, self.unique.config.num_hidden_layers, self.order)
    values = {}
    for path, v in params.named_params(self.unique):
      row = rows.get(_stack_name(path))
      values[path] = v[...] if row is None else v[...][row]
    return params.replace(abstract, values)

  def with_adapters(self) -> Model:
    """Returns the model of L layers with the deltas attached, as by lora.with_adapters."""
    return lora.with_adapters(self.unshare(), self.deltas)

  def merge_adapters(self) -> Model:
    """Returns the model of L layers with the deltas merged, each weight in its original dtype."""
    return lora.merge_adapters(self.unshare(), self.deltas)


def check(spec: ShareOptions, model: Model) -> None:
  """Checks that the options fit a model (or its shapes).

  Raises:
    InputError: they do not.
  """
  check_choice("student.share.order", spec.order, ORDERS, "Choose one")
  check_choice("student.share.start", spec.start, STARTS, "Choose one")
  if not isinstance(model, ModelOfStacks):
    expected = "another choice, because only layers of decoders can share weights"
    raise bad_value("student.train", "shared", expected, "Set student.train='whole'")
  *unshared, last = model.layer_stacks(model.config)
  own = sum(stack.size for stack in unshared)
  L = own + last.size
  if not own < spec.layers <= L:
    first = (
      f" (the first {own} of its {L} layers are of another kind and not shared)" if own else ""
    )
    expected = f"a number from {own + 1} to {L} for this student{first}"
    action = "Change it, or set student.train='whole' to share no layers"
    raise bad_value("student.share.layers", spec.layers, expected, action)


def start(model: Model, spec: ShareOptions, key: jax.Array, fit: bool) -> SharedLayers:
  """Returns the parameters at the start of training: the model with its layers shared.

  Args:
    model: the student with L separate layers, or its shapes.
    spec: the options.
    key: PRNG key of the deltas.
    fit: whether the model's layers are trained. If so, a distinct layer is the mean of the layers
      that use it, or the first of them (`spec.start`), and a delta is the best low-rank
      approximation of the difference to its layer. Otherwise a distinct layer is the first of the
      layers that use it, and deltas start like LoRA adapters.

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
  """Returns for each stack the index of the distinct layer that each of its layers uses.

  Only the last stack is shared. Layers of another kind before it, such as DeepSeek's dense ones,
  are not.
  """
  *unshared, last = make.layer_stacks(config)
  rows = {stack.name: np.arange(stack.size) for stack in unshared}
  U, i_L = layers - sum(stack.size for stack in unshared), np.arange(last.size)
  rows[last.name] = i_L % U if order == "cyclic" else i_L * U // last.size
  return rows


def _first_users(rows: dict[str, np.ndarray]) -> tuple[int, ...]:
  """Returns for each distinct layer the number of the model's first layer that uses it."""
  found, before = [], 0
  for row in rows.values():
    found += [before + int(i) for i in np.unique(row, return_index=True)[1]]
    before += len(row)
  return tuple(found)


def _distinct(x_LX: jax.Array, row: np.ndarray, mean: bool) -> jax.Array:
  """Returns the U distinct layers of a stacked weight.

  Args:
    x_LX: the weight of all L layers.
    row: int [L], the index of the distinct layer that each layer uses.
    mean: whether a distinct layer is the mean of its layers, not the first of them.
  """
  _, first_U, count_U = np.unique(row, return_index=True, return_counts=True)
  if not mean:
    return x_LX[first_U]
  total_UX = jnp.zeros((len(first_U), *x_LX.shape[1:]), jnp.float32).at[row].add(x_LX)
  return (total_UX / count_U.reshape(-1, *[1] * (x_LX.ndim - 1))).astype(x_LX.dtype)


def _fit(delta: lora.LoraAdapter, original: nnx.Variable, shared: nnx.Variable) -> lora.LoraAdapter:
  """Returns the delta nearest to original - shared (Eckart-Young), with factors of equal norm.

  Where the difference has a rank below the delta's, the remaining directions keep the random A and
  have B = 0: with both at 0 neither would have a gradient.

  Args:
    delta: the initialised adapter.
    original: the stacked weight [L, ...] of the model, in the model's layout.
    shared: the same of the model with shared layers.
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

  new_a, new_b = jax.lax.map(fit_layer, (original[...], shared[...]))  # one layer at a time
  differs = jnp.any(new_b != 0, -1).reshape(a_LIR.shape[0], *[1] * len(inputs), rank)
  new_a = jnp.where(differs, new_a.reshape(a_LIR.shape), a_LIR)
  return delta.replace(a=delta.a.replace(new_a), b=delta.b.replace(new_b.reshape(b_LRO.shape)))


def nearest_factors(x_IO: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
  """Returns factors [I, R] and [R, O] of equal norm, whose product is nearest to x.

  They are computed from the eigenvectors of x x^T, which is not larger than x^T x.

  Args:
    x_IO: a float32 matrix with I <= O.
    rank: R.
  """
  _, u_II = jnp.linalg.eigh(jnp.matmul(x_IO, x_IO.T, precision="highest"))
  u_IR = u_II[:, ::-1][:, :rank]  # the largest first
  v_RO = jnp.matmul(u_IR.T, x_IO, precision="highest")
  size_R = jnp.linalg.norm(v_RO, axis=1)  # the singular values
  root_R = jnp.sqrt(size_R)
  return u_IR * root_R[None], v_RO / jnp.where(size_R > 0, root_R, 1.0)[:, None]


def _stack_name(path: str) -> str:
  """Returns the stack that a parameter belongs to, e.g. "layers" for "layers.q"."""
  return path.partition(".")[0]
