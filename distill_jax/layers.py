"""What decoder families share: norm, rope, attention, feed-forward, the scan over layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import params, sharding
from distill_jax.errors import InputError

REMAT = ("none", "full", "dots")


@dataclasses.dataclass(frozen=True)
class Compute:
  """How a model is computed, apart from what it is. Static and hashable.

  Attributes:
    dtype: of matrix products and activations; norms, softmax and losses are float32.
    rules: logical to mesh axes.
    remat: what the backward pass keeps of a layer: "none" recomputes nothing, "dots"
      keeps matrix products, "full" keeps the layer's input alone.
  """

  dtype: str = "float32"
  rules: sharding.Rules = sharding.Rules()
  remat: str = "none"

  def view(self, tree: Any) -> Any:
    """Parameters as they are used: in the compute dtype, gathered by the compute column."""

    def one(v):
      x = v[...].astype(self.dtype)
      if not jax.sharding.get_abstract_mesh().empty:
        spec = self.rules.spec(v.get_metadata()["axes"], "compute")
        x = jax.lax.with_sharding_constraint(x, spec)
      return v.replace(x)

    return params.map_params(one, tree)

  def checkpoint(self, fn: Callable) -> Callable:
    if self.remat not in REMAT:
      raise InputError(f"remat is {self.remat!r}; it can be one of {REMAT}")
    if self.remat == "none":
      return fn
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(fn, policy=dots if self.remat == "dots" else None)


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
  """Root-mean-square norm in float32, returned in the input's dtype (arXiv:1910.07467)."""
  x = x_BTD.astype(jnp.float32)
  x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)
  scale = jnp.broadcast_to(scale_D.astype(jnp.float32), x.shape)
  return (x * scale).astype(x_BTD.dtype)


def rope_angles(positions_BT: jax.Array, inv_freq: np.ndarray) -> tuple[jax.Array, jax.Array]:
  """(cos, sin) of rotary embeddings, float32 [B, T, h/2] (arXiv:2104.09864)."""
  angles = positions_BT[..., None].astype(jnp.float32) * inv_freq[None, None, :]
  return jnp.cos(angles), jnp.sin(angles)


def rope(x_BTHh: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates the two halves of each head against each other, as Hugging Face lays them out."""
  cos, sin = (a[:, :, None, :] for a in angles)
  a, b = jnp.split(x_BTHh.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTHh.dtype)


def attention(q_BTHh: jax.Array, k_BTGh: jax.Array, v_BTGh: jax.Array, segments_BT: jax.Array):
  """Causal attention within segments, grouped heads, scale 1/sqrt(h). Returns [B, T, H, h].

  A position always sees itself, padding too, so no row of the softmax is empty.
  """
  same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
  return jax.nn.dot_product_attention(
    q_BTHh, k_BTGh, v_BTGh, mask=same_BTS[:, None], is_causal=True, implementation="xla"
  )


def swiglu(x_BTD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array):
  """down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""
  return (jax.nn.silu(x_BTD @ gate_DF) * (x_BTD @ up_DF)) @ down_FD


def scan_layers(
  layers: Any, apply: Callable[[Any, jax.Array], jax.Array], x_BTD: jax.Array,
  taps: tuple[int, ...], how: Compute,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
  """Runs `x = apply(layer, x)` over stacked layers, keeping the layers asked for.

  A tapped activation is written into a buffer carried through the scan; a layer that is
  not asked for writes to a slot out of bounds, which `mode="drop"` discards. So memory
  grows with the taps, not with the layers.

  Returns:
    The last activation, and the taps as [P, B, T, D] in the order asked for (None without).

  Raises:
    InputError: a tap is not the index of a layer.
  """
  n = jax.tree.leaves(layers)[0].shape[0]
  bad = [t for t in taps if not 0 <= t < n]
  if bad or len(set(taps)) < len(taps):
    raise InputError(f"taps {taps}: each is a different layer from 0 to {n - 1}")
  slots = np.full(n, len(taps), np.int32)
  slots[list(taps)] = np.arange(len(taps))
  step = how.checkpoint(lambda layer, x: apply(how.view(params.unstack(layer)), x))

  def body(carry, xs):
    (x, buffer), (layer, slot) = carry, xs
    x = sharding.constrain(step(layer, x), "batch seq embed", how.rules)
    return (x, buffer.at[slot].set(x, mode="drop") if taps else None), None

  buffer = jnp.zeros((len(taps), *x_BTD.shape), x_BTD.dtype) if taps else None
  (x_BTD, buffer), _ = jax.lax.scan(body, (x_BTD, buffer), (layers, jnp.asarray(slots)))
  return x_BTD, buffer
