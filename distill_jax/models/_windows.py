"""Families some of whose layers see a window and the others all, by config.json's layer_types."""

from __future__ import annotations

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from distill_jax.errors import InputError
from distill_jax.models import _decoder
from distill_jax.nn import attention, layers
from distill_jax.types import Inputs, JsonObject

LOCAL, GLOBAL = "sliding_attention", "full_attention"


def check_kinds(types: tuple[str, ...], layers: int) -> None:
  """Refuses layer_types that do not say of each layer which of the two it is."""
  if len(types) != layers or not set(types) <= {LOCAL, GLOBAL}:
    raise InputError(
      f"layer_types has {len(types)} layers of {sorted(set(types))}; {layers} of {LOCAL!r} or "
      f"{GLOBAL!r} were expected"
    )


@dataclasses.dataclass(frozen=True)
class Config(_decoder.Config):
  """A decoder's shape with Qwen's names for windows.

  `layer_types` is () and `sliding_window` None where all layers see all.
  """

  sliding_window: int | None = None
  layer_types: tuple[str, ...] = ()

  def __post_init__(self):
    super().__post_init__()
    if self.layer_types or self.sliding_window is not None:
      check_kinds(self.layer_types, self.num_hidden_layers)
      if self.sliding_window is None or LOCAL not in self.layer_types:
        raise InputError(
          f"sliding_window is {self.sliding_window} and layer_types {self.layer_types}; a window "
          f"goes with layers of {LOCAL!r}"
        )

  @classmethod
  def from_hf(cls, hf: JsonObject) -> Self:
    used = hf.get("use_sliding_window") and hf.get("sliding_window") is not None
    numbers = range(hf["num_hidden_layers"]) if used else ()
    kinds = hf.get("layer_types") or [  # spelt out by transformers 5
      GLOBAL if i < hf.get("max_window_layers", 28) else LOCAL for i in numbers
    ]
    if LOCAL in kinds and not used:
      raise InputError(
        f"config.json has layers of {LOCAL!r}, use_sliding_window="
        f"{hf.get('use_sliding_window')!r} and sliding_window={hf.get('sliding_window')!r}; name a "
        "window and set the first to true, or make all layers 'full_attention'"
      )
    if set(kinds) <= {GLOBAL}:
      return super().from_hf({**hf, "sliding_window": None, "layer_types": ()})
    return super().from_hf({**hf, "layer_types": tuple(kinds)})

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
    """What all layers see, where they are alike."""
    return None if GLOBAL in self.layer_types else self.sliding_window

  def window_at(self, layer: int) -> int | None:
    return self.sliding_window if self.layer_types and self.layer_types[layer] == LOCAL else None


class Model(_decoder.Model):
  """Tokens in, hidden states and the unembedding out."""

  config: Config

  def position_inputs(self, inputs: Inputs) -> _decoder.PositionInputs:
    """Chosen by the layer's number, so that layers of both kinds are one scan."""
    c, alike = self.config, super().position_inputs(inputs)
    if len(set(c.layer_types)) < 2:
      return alike
    local_L = jnp.asarray([kind == LOCAL for kind in c.layer_types], jnp.int32)

    def of_layer(layer: int | jax.Array) -> tuple[layers.Angles, attention.Window]:
      angles, _ = alike(layer)
      return angles, attention.OneOf((None, c.sliding_window), local_L[layer])

    return of_layer
