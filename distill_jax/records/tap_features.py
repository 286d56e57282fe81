"""Preparation of a teacher's features for storage: projection and int8 quantisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.errors import bad_value
from distill_jax.losses.features import attention_sizes
from distill_jax.records.options import RecordsOptions
from distill_jax.types import FamilyConfig


def feature_width(config: FamilyConfig, kind: str) -> int:
  """Returns the width of a tapped vector.

  Args:
    config: The model's architecture config.
    kind: "hidden" for a layer's output, or "qkv" for its concatenated queries, keys and values.
  """
  if kind == "hidden":
    return config.hidden_size
  c = attention_sizes(config)
  H, G = c.num_attention_heads, c.num_key_value_heads
  return (H + G) * c.head_dim + G * c.value_head_dim


def quantise(
  taps_PBTD: jax.Array, project_DE: np.ndarray | None = None
) -> tuple[jax.Array, jax.Array]:
  """Quantises features on the device.

  Args:
    taps_PBTD: Features of P layers.
    project_DE: A projection to apply first, or None.

  Returns:
    int8 values [P, B, T, D], and the float32 scale of each vector [P, B, T].
  """
  x = taps_PBTD.astype(jnp.float32)
  if project_DE is not None:
    x = x @ project_DE
  scale = jnp.max(jnp.abs(x), -1) / 127
  x = jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None])
  return jnp.clip(x, -127, 127).astype(jnp.int8), scale


def check(c: RecordsOptions, of_task: bool) -> None:
  """Raises InputError if the options of taps do not fit each other."""
  if of_task and c.taps:
    action = "Remove the key, and set train.online=True for losses that compare features"
    raise bad_value("records.taps", c.taps, "() with tasks, whose features are not stored", action)
  if c.tap_kind not in ("hidden", "qkv"):
    raise bad_value("records.tap_kind", c.tap_kind, "'hidden' or 'qkv'", "Choose one of them")
  if c.tap_kind == "qkv" and c.taps_width:
    expected = "0 with records.tap_kind='qkv', which is not projected"
    raise bad_value("records.taps_width", c.taps_width, expected, "Remove the key")
  if c.tap_kind == "qkv" and 0 in c.taps:
    expected = "layers from 1 with records.tap_kind='qkv', because 0 is the embedding"
    raise bad_value("records.taps", c.taps, expected, "Remove layer 0")
  if c.taps_width and not c.taps:
    expected = "0 without records.taps"
    raise bad_value("records.taps_width", c.taps_width, expected, "Add layers to records.taps")
