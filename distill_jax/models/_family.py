"""The contract of a model family, and how families read config.json.

`FamilyConfig` is what the rest of the package asks of every family's Config; types.Model is the
same of its Model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, Self, runtime_checkable

from distill_jax.errors import InputError
from distill_jax.types import JsonObject


@runtime_checkable
class FamilyConfig(Protocol):
  """The shape of a model, under the names of Hugging Face's config.json: a frozen dataclass."""

  @property
  def hidden_size(self) -> int:
    """Width of the hidden states that features are taken from."""

  @property
  def num_hidden_layers(self) -> int:
    """How many layers taps are chosen from."""

  @property
  def head_rows(self) -> int:
    """How many outcomes the model's head tells apart: tokens of a vocabulary, or classes."""

  @classmethod
  def from_hf(cls, hf: JsonObject) -> Self:
    """Reads a Hugging Face config.json; what the family cannot do is refused by name."""

  def to_hf(self) -> JsonObject:
    """Returns the config.json of the model."""

  def keep_layers(self, kept: tuple[int, ...]) -> Self:
    """Returns the config of a model that has these layers of this one, in this order."""

  def ignores_tensor(self, name: str) -> bool:
    """Whether a checkpoint may hold this tensor although the model has no use for it."""


class SizesOfPart:
  """Sizes that are asked of every config, for a model made of parts: those of one part."""

  @property
  def layered_part(self) -> Any:
    """The config of the part whose layers are counted, tapped and compared."""
    raise NotImplementedError

  @property
  def hidden_size(self) -> int:
    return self.layered_part.hidden_size

  @property
  def num_hidden_layers(self) -> int:
    return self.layered_part.num_hidden_layers

  @property
  def num_attention_heads(self) -> int:
    return self.layered_part.num_attention_heads

  @property
  def num_key_value_heads(self) -> int:
    return self.layered_part.num_key_value_heads

  @property
  def head_dim(self) -> int:
    return self.layered_part.head_dim


def check_numbers(config: Any, optional_zero: tuple[str, ...] = ()) -> None:
  """Refuses, by name, a field of the wrong kind, or a number no model can have.

  Args: optional_zero, the fields that may be 0.
  """
  kinds = {"int": (int,), "float": (int, float), "bool": (bool,)}  # annotations are strings here
  for f in dataclasses.fields(config):
    x, name = getattr(config, f.name), str(f.type).removesuffix(" | None")
    if (x is None and name != f.type) or (x == 0 and type(x) is int and f.name in optional_zero):
      continue
    kind = kinds.get(name)
    if kind and (type(x) not in kind or (kind != (bool,) and not 0 < x < 2**31)):
      raise InputError(f"{f.name} is {x!r:.60}; a {name}, above 0 if a number, was expected")


def check_supported(
  hf: Mapping[str, Any], supported: Mapping[str, Any], family: str, required: bool = False
) -> None:
  """Refuses a config.json with a value that the family has no code for.

  Args:
    supported: for some keys of config.json, the only value that the family can do.
    required: a key that is missing is refused too.
  """
  for key, want in supported.items():
    if hf.get(key, want) != want or (required and key not in hf):
      raise InputError(
        f"config.json has {key}={hf.get(key)!r}; the {family} family has {want!r} only"
      )
