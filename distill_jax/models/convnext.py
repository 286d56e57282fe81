"""ConvNeXt (arXiv:2201.03545): images to classes by convolutions, with no batch statistics."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill_jax.errors import InputError
from distill_jax.models import _encoder
from distill_jax.models._declare import Declare
from distill_jax.models._family import FamilyDefaults, check_numbers
from distill_jax.nn import layers, sharding
from distill_jax.nn.params import stack
from distill_jax.types import Images, JsonObject, Output

HF_MODEL_TYPES = ("convnext",)  # of config.json
PREFIX = "convnext."  # of all but the head; a checkpoint of the body alone goes without
KERNEL, EPS = 7, 1e-6  # of the depthwise convolutions; of all norms but the last
MATMUL_PLACES = 256  # of an image, up to which a depthwise convolution is a product of matrices


@dataclasses.dataclass(frozen=True)
class Config(FamilyDefaults):
  """The shape of a model, in Hugging Face's words. There is no stochastic depth."""

  hidden_sizes: tuple[int, ...] = (96, 192, 384, 768)  # channels of each stage …
  depths: tuple[int, ...] = (3, 3, 9, 3)  # … and its layers
  patch_size: int = 4
  num_channels: int = 3
  image_size: int = 224
  hidden_act: str = "gelu"
  layer_norm_eps: float = 1e-12  # of the last norm
  layer_scale_init_value: float = 1e-6
  num_labels: int = 2

  MODEL_TYPE: ClassVar[str] = "convnext"

  def __post_init__(self):
    check_numbers(self)
    stages = len(self.hidden_sizes), len(self.depths)
    numbers = (*self.hidden_sizes, *self.depths)
    if len(set(stages)) > 1 or not all(type(n) is int and 0 < n < 2**20 for n in numbers):
      raise InputError(
        f"hidden_sizes is {self.hidden_sizes} and depths {self.depths}; a number above 0 of each, "
        "for every stage, was expected"
      )
    if self.hidden_act not in _encoder.ACTIVATIONS:
      raise InputError(
        f"hidden_act is {self.hidden_act!r}; it can be one of {', '.join(_encoder.ACTIVATIONS)}"
      )

  @classmethod
  def from_hf(cls, hf: JsonObject) -> Self:
    """From a Hugging Face config.json; what this family cannot do is refused by name."""
    names = {f.name for f in dataclasses.fields(cls)} - {"num_labels"}
    given = {name: hf[name] for name in names if name in hf}
    given |= {n: tuple(given[n]) for n in ("hidden_sizes", "depths") if n in given}
    return cls(**given, num_labels=_encoder.num_labels_of(hf))

  def to_hf(self) -> JsonObject:
    """The config.json of this model."""
    hf = dataclasses.asdict(self)
    return {
      "architectures": ["ConvNextForImageClassification"],
      "model_type": self.MODEL_TYPE,
      "drop_path_rate": 0.0,
      "initializer_range": 0.02,
      "num_stages": len(self.depths),
      **_encoder.label_names(hf.pop("num_labels")),
      **hf,
      "hidden_sizes": list(self.hidden_sizes),
      "depths": list(self.depths),
    }

  def keep_layers(self, kept: tuple[int, ...]) -> Self:
    raise InputError(
      f"keep_layers is {kept} and the model a ConvNeXt, whose layers are of several widths; take a "
      "smaller shape"
    )

  def ignores_tensor(self, name: str) -> bool:
    """Whether a checkpoint may hold this tensor although the model has no use for it."""
    del name
    return False

  @property
  def head_rows(self) -> int:
    return self.num_labels

  @property
  def num_hidden_layers(self) -> int:
    return sum(self.depths)

  @property
  def hidden_size(self) -> int:
    """The size of the features that the head reads."""
    return self.hidden_sizes[-1]


class Block(nnx.Module):
  """One layer: each channel over 7 x 7 places, then a feed-forward at each place, scaled."""

  def __init__(self, c: Config, D: int, at: str, key: jax.Array):
    declare = Declare(key, at)
    self.config = c
    # In torch's order, as a convolution's weights have four axes there.
    dims = f"embed:{D} one:1 pixels:{KERNEL} pixels:{KERNEL}"
    self.depthwise = declare.linear("dwconv", dims, "", init=1 / KERNEL)
    self.depthwise_bias = declare.bias("dwconv", D)
    self.norm, self.norm_bias = declare.layer_norm("layernorm", D)
    self.up = declare.linear("pwconv1", f"embed:{D} mlp:{4 * D}", "mlp")
    self.up_bias = declare.bias("pwconv1", 4 * D)
    self.down = declare.linear("pwconv2", f"mlp:{4 * D} embed:{D}", "embed")
    self.down_bias = declare.bias("pwconv2", D)
    scale = declare.scale("layer_scale_parameter", D)
    self.scale = scale.replace(scale[...] * c.layer_scale_init_value)

  def __call__(self, x_BYWD: jax.Array) -> jax.Array:
    with jax.named_scope("depthwise"):
      y_BYWD = depthwise(x_BYWD, self.depthwise[...]) + over_places(self.depthwise_bias[...])
      y_BYWD = layers.layer_norm(y_BYWD, self.norm[...], self.norm_bias[...], EPS)
    with jax.named_scope("mlp"):
      act = _encoder.ACTIVATIONS[self.config.hidden_act]
      h_BYWF = act(y_BYWD @ self.up[...] + over_places(self.up_bias[...]))
      return x_BYWD + over_places(self.scale[...]) * (
        h_BYWF @ self.down[...] + over_places(self.down_bias[...])
      )


class Stage(nnx.Module):
  """Layers of one width, after a step down to half the height and width but in the first."""

  def __init__(self, c: Config, i: int, key: jax.Array):
    down, blocks = jax.random.split(key)
    at, D = f"{PREFIX}encoder.stages.{i}.", c.hidden_sizes[i]
    block = functools.partial(Block, c, D, at + "layers.{layers}.")
    self.layers = stack(c.depths[i], block, blocks)
    self.steps_down = i > 0
    if self.steps_down:
      declare, M = Declare(down, at + "downsampling_layer."), c.hidden_sizes[i - 1]
      self.norm, self.norm_bias = declare.layer_norm("0", M)
      dims = f"embed:{D} channels:{M} pixels:2 pixels:2"
      self.down = declare.linear("1", dims, "", init=(4 * M) ** -0.5)
      self.down_bias = declare.bias("1", D)

  def __call__(self, x_BYWD: jax.Array, compute: layers.ComputeConfig) -> jax.Array:
    if self.steps_down:
      x_BYWD = layers.layer_norm(x_BYWD, self.norm[...], self.norm_bias[...], EPS)
      bias_D = compute.cast_and_gather(self.down_bias)[...]
      x_BYWD = layers.patches(x_BYWD, compute.cast_and_gather(self.down)[...])
      x_BYWD = x_BYWD + over_places(bias_D)
    return layers.scan_layers([self.layers], lambda layer, i, x: layer(x), x_BYWD, (), compute)[0]


class Model(nnx.Module):
  """Images in; the mean over places and the classifier out, as one position."""

  def __init__(self, c: Config, key: jax.Array):
    stem, stages, head = jax.random.split(key, 3)
    at, D, M, p = f"{PREFIX}embeddings.", c.hidden_sizes[0], c.num_channels, c.patch_size
    declare = Declare(stem, at)
    self.config = c
    dims = f"embed:{D} channels:{M} pixels:{p} pixels:{p}"
    self.patch = declare.linear("patch_embeddings", dims, "", init=(M * p * p) ** -0.5)
    self.patch_bias = declare.bias("patch_embeddings", D)
    self.stem_norm, self.stem_norm_bias = declare.layer_norm("layernorm", D)
    keys = jax.random.split(stages, len(c.depths))
    self.stages = nnx.List([Stage(c, i, k) for i, k in enumerate(keys)])
    declare, width = Declare(head, ""), c.hidden_size
    self.norm, self.norm_bias = declare.layer_norm(PREFIX + "layernorm", width)
    dims = f"classes:{c.num_labels} embed:{width}"
    self.head = declare.linear("classifier", dims, "classes", 0.02)
    self.head_bias = declare.bias("classifier", c.num_labels)

  def __call__(
    self, inputs: Images, compute: layers.ComputeConfig, taps: tuple[int, ...] = ()
  ) -> Output:
    """Args: inputs, float32 pixels [B, Y, W, M]. Returns: Output, T = 1. There are no taps."""
    if taps:
      raise InputError(
        f"taps {taps} of a ConvNeXt, whose layers are of several widths; there are none"
      )
    with jax.named_scope("embed"):
      x_BYWD = layers.patches(
        inputs.pixels_BYWM.astype(compute.dtype), compute.cast_and_gather(self.patch)[...]
      )
      x_BYWD = x_BYWD + over_places(compute.cast_and_gather(self.patch_bias)[...])
      x_BYWD = layers.layer_norm(x_BYWD, self.stem_norm[...], self.stem_norm_bias[...], EPS)
      x_BYWD = sharding.constrain(x_BYWD, "batch seq seq embed", compute.rules)
    for stage in self.stages:
      x_BYWD = stage(x_BYWD, compute)
    x_B1D = jnp.mean(x_BYWD, (1, 2), dtype=jnp.float32)[:, None].astype(x_BYWD.dtype)
    eps = self.config.layer_norm_eps
    x_B1D = layers.layer_norm(x_B1D, self.norm[...], self.norm_bias[...], eps)
    weights = compute.cast_and_gather(self.head)[...], compute.cast_and_gather(self.head_bias)[...]
    return Output(*layers.with_bias(x_B1D, *weights))


def over_places(x_D: jax.Array) -> jax.Array:
  """One number for each channel, for images [B, Y, W, D]."""
  return x_D[None, None, None]


def depthwise(x_BYWD: jax.Array, w_D1kk: jax.Array) -> jax.Array:
  """Each channel by a filter of its own, zeros outside, the image as large as before: odd k.

  For few places it is a product with a matrix of places by places, for each channel: XLA's
  convolution is 17 to 40 times slower on a CPU, its gradients included (14 x 14, 7 x 7 places).
  """
  (B, Y, W, D), k = x_BYWD.shape, w_D1kk.shape[-1]
  if Y * W > MATMUL_PLACES:
    return jax.lax.conv_general_dilated(
      x_BYWD,
      w_D1kk,
      (1, 1),
      "SAME",
      dimension_numbers=("NHWC", "OIHW", "NHWC"),
      feature_group_count=D,
    )
  # In the subscripts y, w are places of the input, Y, W of the output; p, q taps of the filter.
  rows_kYY, columns_kWW = (_shifts(k, n, x_BYWD.dtype) for n in (Y, W))
  w_DkYY = jnp.einsum("Dpq,pyY->DqyY", w_D1kk[:, 0], rows_kYY)
  w_DSS = jnp.einsum("DqyY,qwW->DywYW", w_DkYY, columns_kWW).reshape(D, Y * W, Y * W)
  y_BSD = jnp.einsum("BsD,DsS->BSD", x_BYWD.reshape(B, Y * W, D), w_DSS)
  return y_BSD.reshape(x_BYWD.shape)


def _shifts(k: int, n: int, dtype: np.dtype) -> np.ndarray:
  """[k, n, n]: 1 where tap q of a filter brings place i to place j."""
  from_n1, to_1n = np.arange(n)[:, None], np.arange(n)[None]
  return (from_n1 - to_1n + k // 2 == np.arange(k)[:, None, None]).astype(dtype)


TINY = Config(
  hidden_sizes=(8, 16),
  depths=(1, 2),
  patch_size=2,
  num_channels=1,
  image_size=12,
  num_labels=10,
  layer_scale_init_value=1.0,
)

CONFIGS = {"tiny": TINY, "convnext-tiny": Config(num_labels=1_000)}
