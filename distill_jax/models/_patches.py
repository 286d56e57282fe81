"""Square images cut into square patches, as ViT and the vision tower of CLIP read them."""

from __future__ import annotations

import jax
from flax import nnx

from distill_jax.errors import InputError
from distill_jax.models._encoder import VisionConfig
from distill_jax.nn import layers


def embed(
  c: VisionConfig, pixels_BYWM: jax.Array, patch: nnx.Param, compute: layers.ComputeConfig
) -> jax.Array:
  """A vector for each patch, row by row: [B, S, D], in the compute dtype.

  Args:
    patch: the parameter, [D, M, p, p].

  Raises:
    InputError: the images have another shape.
  """
  want = (c.image_size, c.image_size, c.num_channels)
  if pixels_BYWM.shape[1:] != want:
    raise InputError(
      f"images are {pixels_BYWM.shape[1:]} [height, width, channels] and the model's {want}; set "
      "the model's image_size and num_channels, or the task's size"
    )
  x_BYWD = layers.patches(pixels_BYWM.astype(compute.dtype), compute.cast_and_gather(patch)[...])
  return x_BYWD.reshape(len(pixels_BYWM), -1, c.hidden_size)
