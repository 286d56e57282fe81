"""DeiT with its distillation token (arXiv:2012.12877, section 4): a ViT with two heads.

The class token is trained on labels and the distillation token on the teacher, each with a separate
head. Predictions use the mean of both heads' logits. One matrix holds both heads next to each
other; hidden states are 0 at the columns of the other head. So the logits of either head, and the
mean of both, are one position of an Output.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from distill_jax.models import vit
from distill_jax.models._declare import Declare
from distill_jax.nn import layers
from distill_jax.types import Images, Output

HF_MODEL_TYPES = ("deit",)  # model_type in config.json
PREFIX = "deit."  # of all tensors except the heads'; absent in checkpoints without a head


@dataclasses.dataclass(frozen=True)
class Config(vit.Config):
  """A model's architecture, under Hugging Face's field names. Dropout is 0."""

  MODEL_TYPE: ClassVar[str] = "deit"
  ARCHITECTURE: ClassVar[str] = "DeiTForImageClassificationWithTeacher"
  TOKENS: ClassVar[int] = 2


class Body(vit.Body):
  """The body of a ViT with one more token."""

  TOKENS = ("cls_token", "distillation_token")


class Model(vit.Model):
  """An image classifier. Its output has one position; in training, it has one for each head."""

  def __init__(self, c: Config, key: jax.Array):
    body, head = jax.random.split(key)
    self.config = c
    self.body = Body(c, PREFIX, body)
    declare = Declare(head, "")
    self.head, self.head_bias = vit.classifier(declare, "cls_classifier", c)
    self.distill_head, self.distill_head_bias = vit.classifier(
      declare, "distillation_classifier", c
    )

  def __call__(
    self, inputs: Images, compute: layers.ComputeConfig, taps: tuple[int, ...] = ()
  ) -> Output:
    """Returns the model's Output; see types.Model.

    It has T = 1, or with `compute.training` T = 2: the class token and the distillation token.
    """
    x_BSD, taps_PBSD = self.body(inputs, compute, taps)
    class_B1D, class_head_VD = layers.with_bias(
      x_BSD[:, :1], *(compute.cast_and_gather(v)[...] for v in (self.head, self.head_bias))
    )
    distill_B1D, distill_head_VD = layers.with_bias(
      x_BSD[:, 1:2],
      *(compute.cast_and_gather(v)[...] for v in (self.distill_head, self.distill_head_bias)),
    )
    zero_B1D = jnp.zeros_like(class_B1D)
    class_B1D = jnp.concatenate([class_B1D, zero_B1D], -1)
    distill_B1D = jnp.concatenate([zero_B1D, distill_B1D], -1)
    if compute.training:
      hidden_BTD = jnp.concatenate([class_B1D, distill_B1D], 1)
    else:
      hidden_BTD = (class_B1D + distill_B1D) / 2
    head_VD = jnp.concatenate([class_head_VD, distill_head_VD], -1)
    return Output(hidden_BTD, head_VD, taps_PBTD=taps_PBSD)


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
