"""ConvNeXt (arXiv:2201.03545): images to classes by convolutions, without batch norm."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill_jax.errors import bad_value
from distill_jax.models import _encoder
from distill_jax.models._declare import Declare
from distill_jax.models._family import FamilyDefaults, check_numbers
from distill_jax.nn import layers, sharding
from distill_jax.nn.params import stack
from distill_jax.nn.products import product, recomputed
from distill_jax.types import Images, JsonObject, Output

HF_MODEL_TYPES = ("convnext",)  # model_type in config.json
PREFIX = "convnext."  # of all tensors except the head's; absent in checkpoints without a head
KERNEL = 7  # width of the depthwise convolutions
EPS = 1e-6  # epsilon of all norms except the last
MATMUL_PLACES = 256  # up to this number of places, depthwise convolutions are matrix products


@dataclasses.dataclass(frozen=True)
class Config(FamilyDefaults):
  """A model's architecture, under Hugging Face's field names. Stochastic depth is off."""

  hidden_sizes: tuple[int, ...] = (96, 192, 384, 768)  # channels of each stage
  depths: tuple[int, ...] = (3, 3, 9, 3)  # layers of each stage
  patch_size: int = 4
  num_channels: int = 3
  image_size: int = 224
  hidden_act: str = "gelu"
  layer_norm_eps: float = 1e-12  # epsilon of the last norm
  layer_scale_init_value: float = 1e-6
  num_labels: int = 2

  MODEL_TYPE: ClassVar[str] = "convnext"

  def __post_init__(self):
    check_numbers(self)
    for key in ("hidden_sizes", "depths"):
      numbers = getattr(self, key)
      if not all(type(n) is int and 0 < n < 2**20 for n in numbers):
        raise bad_value(key, numbers, "positive integers", "Correct the model's config")
    if len(self.hidden_sizes) != len(self.depths):
      expected = f"{len(self.hidden_sizes)} numbers, as many as hidden_sizes has"
      raise bad_value("depths", self.depths, expected, "Correct the model's config")
    _encoder.check_activation(self.hidden_act)

  @classmethod
  def from_hf(cls, hf: JsonObject) -> Self:
    """Returns the config for a Hugging Face config.json; unsupported values raise InputError."""
    names = {f.name for f in dataclasses.fields(cls)} - {"num_labels"}
    given = {name: hf[name] for name in names if name in hf}
    given |= {n: tuple(given[n]) for n in ("hidden_sizes", "depths") if n in given}
    return cls(**given, num_labels=_encoder.num_labels_of(hf))

  def to_hf(self) -> JsonObject:
    """Returns the config.json of this model."""
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
    expected = "(), since the layers of a ConvNeXt have several widths"
    raise bad_value("keep_layers", kept, expected, "Choose a smaller shape")

  def ignores_tensor(self, name: str) -> bool:
    """Returns whether a checkpoint may hold this tensor although the model does not use it."""
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
    """Width of the features for the head."""
    return self.hidden_sizes[-1]


class Block(nnx.Module):
  """One layer: a depthwise 7 x 7 convolution, then a scaled feed-forward at each place."""

  def __init__(self, c: Config, D: int, at: str, key: jax.Array):
    declare = Declare(key, at)
    self.config = c
    # In torch's layout of a convolution: [out, in, height, width].
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
      h_BYWF = product(y_BYWD, self.up[...]) + over_places(self.up_bias[...])
      h_BYWF = recomputed(act, h_BYWF)
      return x_BYWD + over_places(self.scale[...]) * (
        product(h_BYWF, self.down[...]) + over_places(self.down_bias[...])
      )


class Stage(nnx.Module):
  """Layers of one width. Every stage except the first begins by halving height and width."""

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
  """An image classifier. Its output has one position, the mean over places."""

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
    """Returns the model's Output with T = 1; see types.Model.

    Raises:
      InputError: `taps` is not ().
    """
    if taps:
      expected = "(), since the layers of a ConvNeXt have several widths"
      raise bad_value("taps", taps, expected, "Use another model for feature losses")
    with jax.named_scope("embed"):
      x_BYWD = layers.patches(
        inputs.pixels_BYWM.astype(compute.dtype), compute.cast_and_gather(self.patch)[...]
      )
      x_BYWD = x_BYWD + over_places(compute.cast_and_gather(self.patch_bias)[...])
      x_BYWD = layers.layer_norm(x_BYWD, self.stem_norm[...], self.stem_norm_bias[...], EPS)
      x_BYWD = sharding.constrain(x_BYWD, "batch pixels pixels embed", compute.rules)
    for stage in self.stages:
      x_BYWD = stage(x_BYWD, compute)
    x_B1D = jnp.mean(x_BYWD, (1, 2), dtype=jnp.float32)[:, None].astype(x_BYWD.dtype)
    eps = self.config.layer_norm_eps
    x_B1D = layers.layer_norm(x_B1D, self.norm[...], self.norm_bias[...], eps)
    weights = compute.cast_and_gather(self.head)[...], compute.cast_and_gather(self.head_bias)[...]
    return Output(*layers.with_bias(x_B1D, *weights))


def over_places(x_D: jax.Array) -> jax.Array:
  """Reshapes one number per channel, [D], for images [B, Y, W, D]."""
  return x_D[None, None, None]


def depthwise(x_BYWD: jax.Array, w_D1kk: jax.Array) -> jax.Array:
  """Convolves each channel with its own filter of odd width, padded to keep the image's size.

  For images of few places, this is a product with a matrix [places, places] for each channel. On a
  CPU, XLA's convolution with its gradients is 17 to 40 times slower (14 x 14 and 7 x 7 places).
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
  # Subscripts: y and w are places of the input, Y and W of the output; p and q are filter taps.
  rows_kYY, columns_kWW = (_shifts(k, n, x_BYWD.dtype) for n in (Y, W))
  w_DkYY = jnp.einsum("Dpq,pyY->DqyY", w_D1kk[:, 0], rows_kYY)
  w_DSS = jnp.einsum("DqyY,qwW->DywYW", w_DkYY, columns_kWW).reshape(D, Y * W, Y * W)
  y_BSD = jnp.einsum("BsD,DsS->BSD", x_BYWD.reshape(B, Y * W, D), w_DSS)
  return y_BSD.reshape(x_BYWD.shape)


def _shifts(k: int, n: int, dtype: np.dtype) -> np.ndarray:
  """Returns [k, n, n]: 1 where tap q of a filter maps place i to place j."""
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
