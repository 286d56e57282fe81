"""DeiT with its distillation token (arXiv:2012.12877, section 4): a ViT that answers twice.

The class token answers as the labels say, the distillation token as the teacher says, each by a
head of its own, and in use the mean of both logits counts. The two heads lie side by side in one
matrix, against hidden states that are 0 where the other head is: so either answer, and the mean
of both, is one position of an Output.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.models import _encoder, vit
from distill_jax.nn import layers
from distill_jax.types import Images, Output

HF_MODEL_TYPES = ("deit",)  # of config.json
PREFIX = "deit."  # of all but the heads; a checkpoint of the body alone goes without


@dataclasses.dataclass(frozen=True)
class Config(vit.Config):
  """The shape of a model, in Hugging Face's words. There is no dropout."""

  MODEL_TYPE: ClassVar[str] = "deit"
  ARCHITECTURE: ClassVar[str] = "DeiTForImageClassificationWithTeacher"
  TOKENS: ClassVar[int] = 2


class Body(vit.Body):
  """A ViT's, with one more token."""

  TOKENS = ("cls_token", "distillation_token")


class Model(nnx.Module):
  """Images in; the mean of both answers out as one position, in training both as two."""

  def __init__(self, c: Config, key: jax.Array):
    body, head = jax.random.split(key)
    self.config = c
    self.body = Body(c, PREFIX, body)
    declare = _encoder.Declare(head, "")
    self.head, self.head_bias = vit.classifier(declare, "cls_classifier", c)
    self.taught, self.taught_bias = vit.classifier(declare, "distillation_classifier", c)

  def __call__(
    self, inputs: Images, compute: layers.ComputeConfig, taps: tuple[int, ...] = ()
  ) -> Output:
    """Args: inputs, float32 pixels; taps, the layers whose output is kept.

    Returns: Output, T = 1; where `how.training`, T = 2, the class token and then the other.
    """
    x_BSD, taps_PBSD = self.body(inputs, compute, taps)
    view = lambda v: compute.cast_and_gather(v)[...]
    own_B1D, head_VD = layers.with_bias(x_BSD[:, :1], view(self.head), view(self.head_bias))
    taught, taught_VD = layers.with_bias(x_BSD[:, 1:2], view(self.taught), view(self.taught_bias))
    zero = jnp.zeros_like(own_B1D)
    first = jnp.concatenate([own_B1D, zero], -1)
    second = jnp.concatenate([zero, taught], -1)
    hidden = jnp.concatenate([first, second], 1) if compute.training else (first + second) / 2
    return Output(hidden, jnp.concatenate([head_VD, taught_VD], -1), taps_PBTD=taps_PBSD)

  qkv = vit.Model.qkv


TINY = Config(
  hidden_size=32,
  intermediate_size=64,
  num_hidden_layers=3,
  num_attention_heads=4,
  image_size=12,
  patch_size=4,
  num_channels=1,
  num_labels=10,
)

CONFIGS = {
  "tiny": TINY,
  "deit-tiny-16": Config(
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=12,
    num_attention_heads=3,
    num_labels=1_000,
  ),
  "deit-base-16": Config(
    hidden_size=768,
    intermediate_size=3_072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_labels=1_000,
  ),
}
