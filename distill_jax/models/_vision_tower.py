"""The vision tower of CLIP and LLaVA: images to an embedding for each patch."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.models import _encoder, _patches
from distill_jax.models._declare import Declare
from distill_jax.nn import layers, sharding
from distill_jax.nn.params import param, stack, take_layer
from distill_jax.types import QKV, Images


@dataclasses.dataclass(frozen=True)
class VisionConfig(_encoder.VisionConfig):
  """The tower's architecture, with defaults for fields that may be missing in config.json."""

  hidden_size: int = 768
  intermediate_size: int = 3_072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  patch_size: int = 32


class Block(_encoder.Block):
  """One layer of either tower of CLIP."""

  NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "attn_norm": "layer_norm1",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
    "mlp_norm": "layer_norm2",
  }


class VisionTower(nnx.Module):
  """An encoder: images to an embedding of the whole image and one for each patch."""

  def __init__(self, c: VisionConfig, prefix: str, key: jax.Array):
    """Declares the parameters. Their Hugging Face names begin with `prefix`."""
    keys, D, p = jax.random.split(key, 6), c.hidden_size, c.patch_size
    self.config = c
    self.whole = param(keys[0], f"table:{D}", f"{prefix}embeddings.class_embedding", init=D**-0.5)
    # In torch's layout of a convolution: [out, in, height, width].
    dims = f"embed:{D} channels:{c.num_channels} pixels:{p} pixels:{p}"
    std = (c.num_channels * p * p) ** -0.5
    self.patch = param(keys[1], dims, f"{prefix}embeddings.patch_embedding.weight", init=std)
    self.places = param(
      keys[2],
      f"places:{c.num_patches + 1} table:{D}",
      f"{prefix}embeddings.position_embedding.weight",
      init=0.02,
    )
    # The name is misspelt in the checkpoints.
    self.norm, self.norm_bias = Declare(keys[3], prefix).layer_norm("pre_layrnorm", D)
    block = functools.partial(Block, c, prefix + "encoder.layers.{layers}.")
    self.layers = stack(c.num_hidden_layers, block, keys[4])
    self.top, self.top_bias = Declare(keys[5], prefix).layer_norm("post_layernorm", D)

  def __call__(
    self, inputs: Images, compute: layers.ComputeConfig, taps: tuple[int, ...] = ()
  ) -> tuple[jax.Array, jax.Array | None]:
    """Returns the last layer's output [B, 1 + patches, D], and the taps."""
    return self._run(self.layers, inputs, compute, taps)

  def first_layers(self, n: int, inputs: Images, compute: layers.ComputeConfig) -> jax.Array:
    """Returns the output of the first n layers, [B, 1 + patches, D]."""
    return self._run(jax.tree.map(lambda w: w[:n], self.layers), inputs, compute, ())[0]

  def _run(
    self, stacked: Block, inputs: Images, compute: layers.ComputeConfig, taps: tuple[int, ...]
  ) -> tuple[jax.Array, jax.Array | None]:
    """Returns the output [B, 1 + patches, D] of these layers, and the taps."""
    with jax.named_scope("embed"):
      x_BSD, eps = self.embed_patches(inputs.pixels_BYWM, compute), self.config.layer_norm_eps
      x_BSD = layers.layer_norm(x_BSD, self.norm[...], self.norm_bias[...], eps)
      x_BSD = sharding.constrain(x_BSD, "batch seq embed", compute.rules)
    return layers.scan_layers([stacked], lambda layer, i, x: layer(x, None), x_BSD, taps, compute)

  def embed_patches(self, pixels_BYWM: jax.Array, compute: layers.ComputeConfig) -> jax.Array:
    """Returns [B, 1 + patches, D]: the class embedding, then the patches row by row."""
    c, B = self.config, pixels_BYWM.shape[0]
    patches_BSD = _patches.embed(c, pixels_BYWM, self.patch, compute)
    whole_B1D = jnp.broadcast_to(compute.cast_and_gather(self.whole)[...], (B, 1, c.hidden_size))
    x_BSD = jnp.concatenate([whole_B1D, patches_BSD], 1)
    return x_BSD + compute.cast_and_gather(self.places)[...][None]

  def pool(self, x_BSD: jax.Array) -> jax.Array:
    """Returns the normed embedding of the whole image, [B, D]."""
    return layers.layer_norm(
      x_BSD[:, 0], self.top[...], self.top_bias[...], self.config.layer_norm_eps
    )

  def qkv(self, layer: int, x_BSD: jax.Array, compute: layers.ComputeConfig) -> QKV:
    """Returns the queries, keys and values of one layer, given the output of the layer before."""
    return compute.cast_and_gather(take_layer(self.layers, layer)).qkv(x_BSD)
