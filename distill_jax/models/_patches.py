"""Square pictures cut into square patches, as ViT and the vision tower of CLIP read them."""

from __future__ import annotations

from typing import Any

import jax

from distill_jax.errors import InputError
from distill_jax.nn import layers


def check(c: Any) -> None:
  """Raises: InputError: the patches of a shape do not fill its picture."""
  if c.image_size % c.patch_size:
    raise InputError(
      f"image_size is {c.image_size} and patch_size {c.patch_size}, which does not divide it; take "
      "a divisor"
    )


def embed(c: Any, pixels_BWWM: jax.Array, patch: Any, compute: layers.ComputeConfig) -> jax.Array:
  """A vector a patch, row by row: [B, S, D], in the compute dtype.

  Args:
    c: the shape: image_size, num_channels and hidden_size.
    patch: the parameter, [D, M, p, p].

  Raises:
    InputError: the pictures have another shape.
  """
  want = (c.image_size, c.image_size, c.num_channels)
  if pixels_BWWM.shape[1:] != want:
    raise InputError(
      f"images are {pixels_BWWM.shape[1:]} [height, width, channels] and the model's {want}; set "
      "the model's image_size and num_channels, or the task's size"
    )
  x_BhwD = layers.patches(pixels_BWWM.astype(compute.dtype), compute.cast_and_gather(patch)[...])
  return x_BhwD.reshape(len(pixels_BWWM), -1, c.hidden_size)
