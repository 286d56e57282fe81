"""Embeddings of square images that are split into square patches, for ViT and CLIP."""

from __future__ import annotations

import jax
from flax import nnx

from distill_jax.errors import bad_value
from distill_jax.models._encoder import VisionConfig
from distill_jax.nn import layers


def embed(
  c: VisionConfig, pixels_BYWM: jax.Array, patch: nnx.Param, compute: layers.ComputeConfig
) -> jax.Array:
  """Returns an embedding for each patch, row by row: [B, S, D] in the compute dtype.

  Args:
    c: the architecture.
    pixels_BYWM: the images.
    patch: the parameter, [D, M, p, p].
    compute: the settings of the computation.

  Raises:
    InputError: the images do not have the shape in `c`.
  """
  want = (c.image_size, c.image_size, c.num_channels)
  if pixels_BYWM.shape[1:] != want:
    found, key = pixels_BYWM.shape[1:], "shape of the images (height, width, channels)"
    action = "Change the model's image_size and num_channels, or the task's size"
    raise bad_value(key, found, f"{want} for this model", action)
  x_BYWD = layers.patches(pixels_BYWM.astype(compute.dtype), compute.cast_and_gather(patch)[...])
  return x_BYWD.reshape(len(pixels_BYWM), -1, c.hidden_size)
