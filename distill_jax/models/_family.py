"""Base classes of family configs, and checks of config.json.

Every family's Config is a types.FamilyConfig and its Model a types.Model.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Protocol

from distill_jax.errors import InputError, bad_value
from distill_jax.types import JsonObject

if TYPE_CHECKING:
  from _typeshed import DataclassInstance


class FamilyDefaults:
  """Defaults of FamilyConfig properties that most families do not have."""

  @property
  def embedding_size(self) -> int | None:
    return None

  @property
  def tied_table(self) -> str | None:
    return None


class SizedPart(Protocol):
  """The sizes of one part of a model: a stack of layers with attention."""

  @property
  def hidden_size(self) -> int: ...

  @property
  def num_hidden_layers(self) -> int: ...

  @property
  def num_attention_heads(self) -> int: ...

  @property
  def num_key_value_heads(self) -> int: ...

  @property
  def head_dim(self) -> int: ...

  @property
  def value_head_dim(self) -> int: ...


class SizesOfPart(FamilyDefaults):
  """The sizes of a model made of several parts, which are those of one part."""

  @property
  def layered_part(self) -> SizedPart:
    """The config of the part whose layers can be tapped."""
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

  @property
  def value_head_dim(self) -> int:
    return self.layered_part.value_head_dim


def check_numbers(config: DataclassInstance, optional_zero: tuple[str, ...] = ()) -> None:
  """Checks the types of a config's fields, and that its numbers are positive.

  Args:
    config: a family's Config or a part of one.
    optional_zero: the fields that may be 0.

  Raises:
    InputError: a field has another type, or is not positive.
  """
  kinds = {"int": (int,), "float": (int, float), "bool": (bool,)}  # annotations are strings here
  for f in dataclasses.fields(config):
    x, name = getattr(config, f.name), str(f.type).removesuffix(" | None")
    if (x is None and name != f.type) or (x == 0 and type(x) is int and f.name in optional_zero):
      continue
    kind = kinds.get(name)
    if kind and (type(x) not in kind or (kind != (bool,) and not 0 < x < 2**31)):
      expected = name if kind == (bool,) else f"positive {name}"
      raise InputError(f"{f.name} is {x!r:.60}; expected a {expected}. Correct the model's config.")


def check_supported(
  hf: JsonObject, supported: JsonObject, family: str, required: bool = False
) -> None:
  """Checks that the family supports the values in a config.json.

  Args:
    hf: the config.json.
    supported: the only supported value, for some keys.
    family: the name of the family, for errors.
    required: whether the keys must be present.

  Raises:
    InputError: a value is not supported.
  """
  for key, want in supported.items():
    if hf.get(key, want) != want or (required and key not in hf):
      expected = f"{want!r}, the only value that the {family} family supports"
      raise bad_value(f"{key} in config.json", hf.get(key), expected, "Use another model")
