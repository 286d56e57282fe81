"""Layers shared by model families: norms, rope, feed-forwards, experts, the scan over layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill_jax.errors import InputError, bad_value, check_choice
from distill_jax.nn import embedding, lora, params, sharding
from distill_jax.nn.products import product, recomputed
from distill_jax.nn.quantise import QuantiseOptions, rounded
from distill_jax.types import Tree

Layer = TypeVar("Layer")
Angles = tuple[jax.Array, jax.Array]  # (cos, sin) of rotary embeddings, each [B, T, h/2]
REMAT = ("none", "full", "dots", "offload")


class LayerStack(NamedTuple):
  """Layers of one kind, stored as one module whose parameters have a first axis of layers."""

  name: str  # the model's attribute that holds the stack
  block: type  # the class of one layer
  size: int  # the number of layers


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
  """Settings of a model's computation, such as its dtype. Static and hashable.

  Attributes:
    dtype: the dtype of matrix products and activations; norms, softmax and losses are float32.
    rules: the map from logical to mesh axes.
    remat: the activations of a layer that are kept for the backward pass. "none" keeps all except
      those inside of `recomputed`, and weights with merged adapters; "dots" keeps the results of
      matrix products; "offload" keeps these in host memory; "full" keeps only the layer's input.
    attention: the kernel, one of attention.KERNELS.
    quantise: the integers by which linear weights are represented.
    training: whether the model is a student in its training step. Only there DeiT has two outputs
      per image.
  """

  dtype: str = "float32"
  rules: sharding.Rules = sharding.Rules()
  remat: str = "none"
  attention: str = "auto"
  quantise: QuantiseOptions = QuantiseOptions()
  training: bool = False

  def cast_and_gather(self, tree: Tree) -> Tree:
    """Returns parameters as used: in the compute dtype, sharded by the compute column.

    Before parameters are gathered, low-rank adapters are merged into their weights, and quantised
    weights are rounded.
    """

    def used_form(v: nnx.Variable) -> nnx.Variable:
      dtype = "float32" if v.get_metadata()["exact"] else self.dtype
      x = rounded(v, self.quantise)[...].astype(dtype)
      return v.replace(sharding.gather(x, v.get_metadata()["axes"], self.rules))

    return params.map_params(used_form, lora.merge_attached(tree))

  def lookup(self, table: nnx.Variable, tokens_BT: jax.Array) -> jax.Array:
    """Returns the rows of tokens in an embedding table, [B, T, D]; see embedding.lookup."""
    axes = table.get_metadata()["axes"]
    return embedding.lookup(self.cast_and_gather(table)[...], tokens_BT, axes, self.rules)

  def checkpoint(self, fn: Callable) -> Callable:
    """Returns the function with `jax.checkpoint` applied, as configured by `remat`."""
    check_choice("remat", self.remat, REMAT, "Choose one")
    if self.remat == "none":
      return fn
    policies = jax.checkpoint_policies
    policy = {
      "full": None,
      "dots": policies.dots_with_no_batch_dims_saveable,
      "offload": policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    }[self.remat]
    return jax.checkpoint(fn, policy=policy)


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
  """Computes the root-mean-square norm (arXiv:1910.07467) in float32.

  Args:
    x_BTD: the input, normalised over its last axis.
    scale_D: the scale.
    eps: added to the mean square.
    offset: added to the scale.

  Returns:
    An array of the input's shape and dtype.
  """

  def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    x, dtype = x.astype(jnp.float32), x.dtype
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)
    return (x * jnp.broadcast_to(scale.astype(jnp.float32) + offset, x.shape)).astype(dtype)

  return recomputed(norm, x_BTD, scale_D)


def layer_norm(x_BTD: jax.Array, scale_D: jax.Array, bias_D: jax.Array, eps: float) -> jax.Array:
  """Computes layer norm (arXiv:1607.06450) in float32; returns the input's shape and dtype."""

  def norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    x, dtype = x.astype(jnp.float32), x.dtype
    x -= jnp.mean(x, -1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)
    x = x * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)
    return (x + jnp.broadcast_to(bias.astype(jnp.float32), x.shape)).astype(dtype)

  return recomputed(norm, x_BTD, scale_D, bias_D)


def add_head_bias(x_BTHh: jax.Array, bias: jax.Array) -> jax.Array:
  """Adds a flat bias [H * h] to heads."""
  return x_BTHh + bias.reshape(1, 1, *x_BTHh.shape[2:])


def unit(x_BD: jax.Array) -> jax.Array:
  """Normalises vectors to length 1 over the last axis, in float32.

  A vector of length 0 stays 0 and has no gradient.
  """
  x_BD = x_BD.astype(jnp.float32)
  square = jnp.sum(x_BD * x_BD, -1, keepdims=True)
  return jnp.where(square > 0, x_BD * jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def with_bias(
  hidden_BTD: jax.Array, head_VD: jax.Array, bias_V: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns hidden states and head, one element wider, whose product is hidden @ head.T + bias."""
  one_BT1 = jnp.ones((*hidden_BTD.shape[:2], 1), hidden_BTD.dtype)
  return (
    jnp.concatenate([hidden_BTD, one_BT1], -1),
    jnp.concatenate([head_VD, bias_V.astype(head_VD.dtype)[:, None]], -1),
  )


def patches(x_BYWM: jax.Array, w_DMpp: jax.Array) -> jax.Array:
  """Computes a convolution with stride p and p x p windows as one product: [B, Y/p, W/p, D].

  Rows and columns that do not fill a window are skipped, as in torch.
  """
  (B, Y, W, M), p = x_BYWM.shape, w_DMpp.shape[-1]
  y, w = Y // p, W // p
  x_BYpWpM = x_BYWM[:, : y * p, : w * p].reshape(B, y, p, w, p, M)
  return jnp.einsum("BypwqM,DMpq->BywD", x_BYpWpM, w_DMpp)


def rope_angles(positions_BT: jax.Array, inv_freq: np.ndarray, amplitude: float = 1.0) -> Angles:
  """Returns (cos, sin) of rotary embeddings, float32 [B, T, h/2] (arXiv:2104.09864).

  Args:
    positions_BT: int32.
    inv_freq: [h/2], the angle per position of each pair of elements.
    amplitude: the factor of both.
  """
  angles = positions_BT[..., None].astype(jnp.float32) * inv_freq[None, None, :]
  return amplitude * jnp.cos(angles), amplitude * jnp.sin(angles)


def rope(x_BTHh: jax.Array, angles: Angles, interleaved: bool = False) -> jax.Array:
  """Applies rotary embeddings to heads [B, T, H, h] in Hugging Face's layout.

  Element i of the first half of a head is rotated together with element i of the second half. With
  `interleaved`, the pairs are elements 2i and 2i + 1; the result is in halves nevertheless, which
  does not change the products of queries and keys.
  """
  dtype, (cos, sin) = x_BTHh.dtype, (a[:, :, None, :] for a in angles)
  x_BTHh = x_BTHh.astype(jnp.float32)
  if interleaved:
    a, b = x_BTHh[..., ::2], x_BTHh[..., 1::2]
  else:
    a, b = jnp.split(x_BTHh, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(dtype)


def gated_mlp(
  x_BTD: jax.Array,
  gate_DF: jax.Array,
  up_DF: jax.Array,
  down_FD: jax.Array,
  activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
) -> jax.Array:
  """Returns down(activation(gate(x)) * up(x)); with silu this is SwiGLU (arXiv:2002.05202)."""
  return product(gated(product(x_BTD, gate_DF), product(x_BTD, up_DF), activation), down_FD)


def gated(
  gate_BTF: jax.Array,
  up_BTF: jax.Array,
  activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
) -> jax.Array:
  """Returns activation(gate) * up, which the backward pass computes again."""
  return recomputed(lambda gate, up: activation(gate) * up, gate_BTF, up_BTF)


def experts(
  x_BTD: jax.Array,
  ids_BTK: jax.Array,
  weight_BTK: jax.Array,
  gate_EDF: jax.Array,
  up_EDF: jax.Array,
  down_EFD: jax.Array,
  rules: sharding.Rules,
) -> jax.Array:
  """Computes the weighted sum of K experts (gated feed-forwards) at each position.

  Every device sorts its own positions by expert and applies the experts, or the parts of experts,
  that it holds. The results are summed over the devices that hold the same positions.

  Args:
    x_BTD: the input.
    ids_BTK: int32, the experts of each position.
    weight_BTK: float32, their weights.
    gate_EDF: the experts' gate projections.
    up_EDF: the experts' up projections.
    down_EFD: the experts' down projections.
    rules: the sharding of experts and positions.

  Returns:
    [B, T, D].

  Raises:
    InputError: experts are sharded over a mesh axis over which positions are sharded.
  """
  weights = gate_EDF, up_EDF, down_EFD
  if jax.sharding.get_abstract_mesh().empty:
    return _experts_from(0, x_BTD, ids_BTK, weight_BTK, *weights)
  positions = rules.spec(("batch", "seq", "embed"), "compute")
  up = rules.spec(("experts", "embed", "expert_mlp"), "compute")
  down = rules.spec(("experts", "expert_mlp", "embed"), "compute")
  expert_axes = sharding.mesh_axis_names(up[0]) + sharding.mesh_axis_names(up[2])
  batch_axes = {name for entry in positions for name in sharding.mesh_axis_names(entry)}
  if both := set(expert_axes) & batch_axes:
    raise InputError(
      f"The rules shard experts over mesh axis {both.pop()!r}, over which the batch is sharded. "
      "Choose another mesh axis, or none, for 'experts' and 'expert_mlp' in the compute column."
    )

  def on_device(x_BTD, ids_BTK, weight_BTK, gate_EDF, up_EDF, down_EFD):
    """Applies a device's experts to its positions, and sums over devices."""
    if expert_axes:  # without this pcast, jax 0.10 loses the gather's own one in the gradient
      x_BTD = jax.lax.pcast(x_BTD, expert_axes, to="varying")
    first = jax.lax.axis_index(up[0]) * gate_EDF.shape[0] if up[0] else 0
    y_BTD = _experts_from(first, x_BTD, ids_BTK, weight_BTK, gate_EDF, up_EDF, down_EFD)
    return jax.lax.psum(y_BTD, expert_axes) if expert_axes else y_BTD

  in_specs = (positions, positions, positions, up, up, down)
  return jax.shard_map(on_device, in_specs=in_specs, out_specs=positions)(
    x_BTD, ids_BTK, weight_BTK, *weights
  )


def _experts_from(
  first: int | jax.Array,
  x_BTD: jax.Array,
  ids_BTK: jax.Array,
  weight_BTK: jax.Array,
  gate_EDF: jax.Array,
  up_EDF: jax.Array,
  down_EFD: jax.Array,
) -> jax.Array:
  """Computes the part of `experts` that belongs to the E experts from number `first` on.

  The X = B * T * K pairs of position and expert are sorted by expert, multiplied by the experts'
  matrices with ragged_dot, and put back in order.
  """
  (B, T, D), K, E = x_BTD.shape, ids_BTK.shape[-1], gate_EDF.shape[0]
  ids_X = ids_BTK.reshape(-1) - first
  mine_X = (ids_X >= 0) & (ids_X < E)
  ids_X = jnp.where(mine_X, ids_X, E)  # pairs of other experts are sorted after the last group
  order_X = jnp.argsort(ids_X)
  sizes_E = jnp.zeros(E, jnp.int32).at[ids_X].add(1, mode="drop")

  def only_mine(sorted_XD: jax.Array) -> jax.Array:
    """Sets rows after the last group to 0, since ragged_dot leaves them undefined."""
    return jnp.where(mine_X[order_X][:, None], sorted_XD, 0)

  x_XD = only_mine(x_BTD.reshape(-1, D)[order_X // K])
  gate_XF = jax.lax.ragged_dot(x_XD, gate_EDF, sizes_E)
  h_XF = gated(gate_XF, jax.lax.ragged_dot(x_XD, up_EDF, sizes_E))
  y_XD = only_mine(jax.lax.ragged_dot(h_XF, down_EFD, sizes_E))[jnp.argsort(order_X)]
  y_BTKD = y_XD.reshape(B, T, K, D)
  return jnp.einsum("BTKD,BTK->BTD", y_BTKD, weight_BTK.astype(y_BTKD.dtype))


def scan_layers(
  stacks: Sequence[Layer],
  apply: Callable[[Layer, jax.Array, jax.Array], jax.Array],
  x_BTD: jax.Array,
  taps: tuple[int, ...],
  compute: ComputeConfig,
) -> tuple[jax.Array, jax.Array | None]:
  """Runs `x = apply(layer, number of the layer, x)` over stacks of layers, and keeps taps.

  A tapped activation is written into a buffer that the scan carries. Other layers write to an index
  out of bounds, which `mode="drop"` discards. So memory is proportional to the number of taps, not
  of layers.

  Args:
    stacks: stacks of layers, in order.
    apply: computes one layer.
    x_BTD: the input of the first layer.
    taps: numbers of the layers whose outputs are returned.
    compute: the settings of the computation.

  Returns:
    (last activation [B, T, D], taps [P, B, T, D] in the order of `taps`, or None without taps).

  Raises:
    InputError: a tap is repeated, or is not the number of a layer.
  """
  sizes = [jax.tree.leaves(stack)[0].shape[0] for stack in stacks]
  n = sum(sizes)
  bad = [t for t in taps if not 0 <= t < n]
  if bad or len(set(taps)) < len(taps):
    raise bad_value("taps", taps, f"distinct layers from 0 to {n - 1}", "Change the layers")
  slots = np.full(n, len(taps), np.int32)
  slots[list(taps)] = np.arange(len(taps))
  step = compute.checkpoint(
    lambda layer, i, x: apply(compute.cast_and_gather(params.unstack(layer)), i, x)
  )

  def body(carry, xs):
    (x, buffer), (layer, i, slot) = carry, xs
    x = sharding.constrain(step(layer, i, x), "batch seq embed", compute.rules)
    return (x, buffer.at[slot].set(x, mode="drop") if taps else None), None

  carry = x_BTD, jnp.zeros((len(taps), *x_BTD.shape), x_BTD.dtype) if taps else None
  first = 0
  for stack, size in zip(stacks, sizes, strict=True):
    numbers = np.arange(first, first + size, dtype=np.int32)
    carry, _ = jax.lax.scan(body, carry, (stack, numbers, slots[first : first + size]))
    first += size
  return carry
