"""Decoders with sliding-window attention in some layers, listed in layer_types in config.json."""

from __future__ import annotations

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from distill_jax.errors import InputError, bad_value
from distill_jax.models import _decoder
from distill_jax.nn import attention, layers
from distill_jax.types import Inputs, JsonObject

LOCAL, GLOBAL = "sliding_attention", "full_attention"


def check_kinds(types: tuple[str, ...], layers: int) -> None:
  """Checks layer_types.

  Raises:
    InputError: it does not have one of the two kinds for each layer.
  """
  if len(types) != layers or not set(types) <= {LOCAL, GLOBAL}:
    expected = f"{layers} entries, each {LOCAL!r} or {GLOBAL!r}"
    raise bad_value("layer_types", types, expected, "Correct the model's config")


def size(hf: JsonObject) -> int | None:
  """Returns `sliding_window` in config.json; null is None, and without the key it is 4,096."""
  return hf.get("sliding_window", 4_096)  # the default of Mistral and Qwen in transformers


@dataclasses.dataclass(frozen=True)
class Config(_decoder.Config):
  """A decoder's architecture with Qwen's field names for windows.

  If all layers have full attention, `layer_types` is () and `sliding_window` is None.
  """

  sliding_window: int | None = None
  layer_types: tuple[str, ...] = ()

  def __post_init__(self):
    super().__post_init__()
    if self.layer_types or self.sliding_window is not None:
      check_kinds(self.layer_types, self.num_hidden_layers)
      if self.sliding_window is None:
        expected = f"a number because layer_types contains {LOCAL!r}"
        raise bad_value("sliding_window", None, expected, "Correct the model's config")
      if LOCAL not in self.layer_types:
        expected = f"at least one {LOCAL!r} because sliding_window is {self.sliding_window}"
        raise bad_value("layer_types", self.layer_types, expected, "Correct the model's config")

  @classmethod
  def from_hf(cls, hf: JsonObject) -> Self:
    window = size(hf)
    used = hf.get("use_sliding_window") and window is not None
    numbers = range(hf["num_hidden_layers"]) if used else ()
    kinds = hf.get("layer_types") or [  # written by transformers 5 only
      GLOBAL if i < hf.get("max_window_layers", 28) else LOCAL for i in numbers
    ]
    if LOCAL in kinds and not used:
      raise InputError(
        f"layer_types in config.json contains {LOCAL!r}, but use_sliding_window is "
        f"{hf.get('use_sliding_window')!r} and sliding_window is {window!r}. Set "
        "both, or make all layers 'full_attention'."
      )
    if set(kinds) <= {GLOBAL}:
      return super().from_hf({**hf, "sliding_window": None, "layer_types": ()})
    return super().from_hf({**hf, "sliding_window": window, "layer_types": tuple(kinds)})

  def to_hf(self) -> JsonObject:
    hf = super().to_hf()
    window, types = hf.pop("sliding_window"), hf.pop("layer_types")
    if not types:
      return {**hf, "use_sliding_window": False}
    windows = {"sliding_window": window, "layer_types": list(types)}
    return {**hf, "use_sliding_window": True, "max_window_layers": types.index(LOCAL), **windows}

  def keep_layers(self, kept: tuple[int, ...]) -> Self:
    types = tuple(self.layer_types[i] for i in kept) if self.layer_types else ()
    window = self.sliding_window if LOCAL in types else None
    return dataclasses.replace(
      self,
      num_hidden_layers=len(kept),
      sliding_window=window,
      layer_types=types if window is not None else (),
    )

  @property
  def window(self) -> int | None:
    """The window of all layers; None if some or all layers have full attention."""
    return None if GLOBAL in self.layer_types else self.sliding_window

  def window_at(self, layer: int) -> int | None:
    return self.sliding_window if self.layer_types and self.layer_types[layer] == LOCAL else None


class Model(_decoder.Model):
  """A decoder: tokens to hidden states and the unembedding."""

  config: Config

  def position_inputs(self, inputs: Inputs) -> _decoder.PositionInputs:
    """Returns a function of the layer's number, so that one scan covers both kinds of layer."""
    c, same_for_all = self.config, super().position_inputs(inputs)
    if len(set(c.layer_types)) < 2:
      return same_for_all
    local_L = jnp.asarray([kind == LOCAL for kind in c.layer_types], jnp.int32)

    def of_layer(layer: int | jax.Array) -> tuple[layers.Angles, attention.Window]:
      angles, _ = same_for_all(layer)
      return angles, attention.OneOf((None, c.sliding_window), local_L[layer])

    return of_layer
