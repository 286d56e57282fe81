"""The features of a teacher's layers before they are stored: their width and int8 values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.losses.features import attention_sizes
from distill_jax.types import FamilyConfig


def feature_width(config: FamilyConfig, kind: str) -> int:
  """Returns how many numbers a tapped vector has, for a model of this config.

  Args:
    config: the model's.
    kind: "hidden", a layer's output, or "qkv", its queries, keys and values end to end.
  """
  if kind == "hidden":
    return config.hidden_size
  c = attention_sizes(config)
  H, G = c.num_attention_heads, c.num_key_value_heads
  return (H + G) * c.head_dim + G * c.value_head_dim


def quantise(
  taps_PBTD: jax.Array, project_DE: np.ndarray | None = None
) -> tuple[jax.Array, jax.Array]:
  """On the device: int8 values and the float32 scale of each vector [P, B, T]."""
  x = taps_PBTD.astype(jnp.float32)
  if project_DE is not None:
    x = x @ project_DE
  scale = jnp.max(jnp.abs(x), -1) / 127
  x = jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None])
  return jnp.clip(x, -127, 127).astype(jnp.int8), scale
