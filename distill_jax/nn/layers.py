"""What model families share: norms, rope, feed-forwards, experts, the scan over layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill_jax.errors import InputError
from distill_jax.nn import lora, params, sharding
from distill_jax.nn.quantise import QuantiseOptions, rounded
from distill_jax.types import Tree

Layer = TypeVar("Layer")
Angles = tuple[jax.Array, jax.Array]  # (cos, sin) of rotary embeddings, each [B, T, h/2]
REMAT = ("none", "full", "dots", "offload")


class LayerStack(NamedTuple):
  """Layers alike, which are one module with a first axis of layers."""

  name: str  # the attribute of the model that holds them
  block: type  # the class of one of them
  size: int  # how many they are


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
  """How a model is computed, apart from what it is. Static and hashable.

  Attributes:
    dtype: of matrix products and activations; norms, softmax and losses are float32.
    rules: logical to mesh axes.
    remat: what the backward pass keeps of a layer: "none" recomputes nothing (and
      keeps weights as merged with adapters), "dots" keeps matrix products, "offload" keeps
      them too, in the host's memory, "full" keeps the layer's input alone.
    attention: the kernel, one of attention.KERNELS.
    quantise: linear weights are used as integers times a scale.
    training: the model is a student in its step; DeiT has two outputs for an image there alone.
  """

  dtype: str = "float32"
  rules: sharding.Rules = sharding.Rules()
  remat: str = "none"
  attention: str = "auto"
  quantise: QuantiseOptions = QuantiseOptions()
  training: bool = False

  def cast_and_gather(self, tree: Tree) -> Tree:
    """Parameters as they are used: in the compute dtype, gathered by the compute column.

    Before that, where they are stored, low-rank adapters are merged into their weights, and
    weights that are to be integers rounded.
    """

    def used_form(v: nnx.Variable) -> nnx.Variable:
      dtype = "float32" if v.get_metadata()["exact"] else self.dtype
      x = rounded(v, self.quantise)[...].astype(dtype)
      if not jax.sharding.get_abstract_mesh().empty:
        spec = self.rules.spec(v.get_metadata()["axes"], "compute")
        x = jax.lax.with_sharding_constraint(x, spec)
      return v.replace(x)

    return params.map_params(used_form, lora.merge_attached(tree))

  def checkpoint(self, fn: Callable) -> Callable:
    """The function, its activations kept or recomputed in the backward pass as `remat` says."""
    if self.remat not in REMAT:
      raise InputError(f"remat is {self.remat!r}; it can be one of {REMAT}")
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
  """Root-mean-square norm in float32, returned in the input's dtype (arXiv:1910.07467)."""
  x = x_BTD.astype(jnp.float32)
  x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)
  scale = jnp.broadcast_to(scale_D.astype(jnp.float32) + offset, x.shape)
  return (x * scale).astype(x_BTD.dtype)


def layer_norm(x_BTD: jax.Array, scale_D: jax.Array, bias_D: jax.Array, eps: float) -> jax.Array:
  """Layer norm in float32, returned in the input's dtype (arXiv:1607.06450)."""
  x = x_BTD.astype(jnp.float32)
  x -= jnp.mean(x, -1, keepdims=True)
  x *= jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)
  x = x * jnp.broadcast_to(scale_D.astype(jnp.float32), x.shape)
  x = x + jnp.broadcast_to(bias_D.astype(jnp.float32), x.shape)
  return x.astype(x_BTD.dtype)


def add_head_bias(x_BTHh: jax.Array, bias: jax.Array) -> jax.Array:
  """Adds a bias to heads, which is flat: [H * h]."""
  return x_BTHh + bias.reshape(1, 1, *x_BTHh.shape[2:])


def unit(x_BD: jax.Array) -> jax.Array:
  """Vectors of length 1 over the last axis, float32; one of length 0 stays, without gradient."""
  x_BD = x_BD.astype(jnp.float32)
  square = jnp.sum(x_BD * x_BD, -1, keepdims=True)
  return jnp.where(square > 0, x_BD * jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def with_bias(
  hidden_BTD: jax.Array, head_VD: jax.Array, bias_V: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Hidden states and head whose product is hidden @ head.T + bias: one number wider."""
  one_BT1 = jnp.ones((*hidden_BTD.shape[:2], 1), hidden_BTD.dtype)
  return (
    jnp.concatenate([hidden_BTD, one_BT1], -1),
    jnp.concatenate([head_VD, bias_V.astype(head_VD.dtype)[:, None]], -1),
  )


def patches(x_BYWM: jax.Array, w_DMpp: jax.Array) -> jax.Array:
  """A convolution whose p x p windows lie side by side, as one product: [B, Y/p, W/p, D].

  Rows and columns that fill no window are left out, as torch does.
  """
  (B, Y, W, M), p = x_BYWM.shape, w_DMpp.shape[-1]
  y, w = Y // p, W // p
  x_BYpWpM = x_BYWM[:, : y * p, : w * p].reshape(B, y, p, w, p, M)
  return jnp.einsum("BypwqM,DMpq->BywD", x_BYpWpM, w_DMpp)


def rope_angles(positions_BT: jax.Array, inv_freq: np.ndarray, amplitude: float = 1.0) -> Angles:
  """(cos, sin) of rotary embeddings, float32 [B, T, h/2] (arXiv:2104.09864)."""
  angles = positions_BT[..., None].astype(jnp.float32) * inv_freq[None, None, :]
  return amplitude * jnp.cos(angles), amplitude * jnp.sin(angles)


def rope(x_BTHh: jax.Array, angles: Angles, interleaved: bool = False) -> jax.Array:
  """Rotates the two halves of each head against each other, as Hugging Face lays them out.

  Interleaved, the even places are one half and the odd ones the other; they come out as
  halves, which leaves the products of queries and keys as they are.
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
  """down(activation(gate(x)) * up(x)); SwiGLU with silu (arXiv:2002.05202)."""
  return (activation(x_BTD @ gate_DF) * (x_BTD @ up_DF)) @ down_FD


def experts(
  x_BTD: jax.Array,
  ids_BTK: jax.Array,
  weight_BTK: jax.Array,
  gate_EDF: jax.Array,
  up_EDF: jax.Array,
  down_EFD: jax.Array,
  rules: sharding.Rules,
) -> jax.Array:
  """Each position through its K chosen gated feed-forwards, summed by weight. Returns [B, T, D].

  Every device sorts its own positions by expert and multiplies them in groups, by those
  experts (or that part of each) that it holds; what it lacks comes from the devices that
  share its positions.

  Args:
    ids_BTK: int32, the experts of each position.
    weight_BTK: float32.

  Raises:
    InputError: experts are computed along a mesh axis that positions are spread over.
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
      f"experts are computed along mesh axis {both.pop()!r}, which the batch is spread over; give "
      "'experts' and 'expert_mlp' another axis, or none, in the compute column"
    )

  def on_device(x_BTD, ids_BTK, weight_BTK, gate_EDF, up_EDF, down_EFD):
    """Of a device's own positions: what the experts that it holds give, summed over devices."""
    if expert_axes:  # pcast here: left to the gather below, jax 0.10 forgets it in the gradient
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
  """`experts` for the E experts from number `first` on; the choices of others add nothing.

  The X = B * T * K choices are sorted by expert, so that those of one expert are neighbours and
  ragged_dot multiplies each group by its expert's matrix; then they are put back in order.
  """
  (B, T, D), K, E = x_BTD.shape, ids_BTK.shape[-1], gate_EDF.shape[0]
  ids_X = ids_BTK.reshape(-1) - first
  mine_X = (ids_X >= 0) & (ids_X < E)
  ids_X = jnp.where(mine_X, ids_X, E)  # the others' are sorted behind the last group
  order_X = jnp.argsort(ids_X)
  sizes_E = jnp.zeros(E, jnp.int32).at[ids_X].add(1, mode="drop")

  def only_mine(sorted_XD: jax.Array) -> jax.Array:
    """Zeros behind the last group, where rows may hold anything, in the gradient too."""
    return jnp.where(mine_X[order_X][:, None], sorted_XD, 0)

  x_XD = only_mine(x_BTD.reshape(-1, D)[order_X // K])
  gate_XF = jax.lax.ragged_dot(x_XD, gate_EDF, sizes_E)
  h_XF = jax.nn.silu(gate_XF) * jax.lax.ragged_dot(x_XD, up_EDF, sizes_E)
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
  """Runs `x = apply(layer, its number, x)` over stacks of layers, keeping those asked for.

  A tapped activation is written into a buffer carried through the scan; a layer that is
  not asked for writes to a slot out of bounds, which `mode="drop"` discards. So memory
  grows with the taps, not with the layers.

  Returns:
    The last activation, and the taps as [P, B, T, D] in the order asked for (None without).

  Raises:
    InputError: a tap is not the index of a layer.
  """
  sizes = [jax.tree.leaves(stack)[0].shape[0] for stack in stacks]
  n = sum(sizes)
  bad = [t for t in taps if not 0 <= t < n]
  if bad or len(set(taps)) < len(taps):
    raise InputError(f"taps {taps}: each is a different layer from 0 to {n - 1}")
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
