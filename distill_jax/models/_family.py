"""The contract of a model family, and how families read config.json.

types.FamilyConfig is what the rest of the package asks of every family's Config, and types.Model
what it asks of its Model.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Protocol

from distill_jax.errors import InputError
from distill_jax.types import JsonObject

if TYPE_CHECKING:
  from _typeshed import DataclassInstance


class FamilyDefaults:
  """Defaults for the parts of FamilyConfig that most families lack."""

  @property
  def embedding_size(self) -> int | None:
    return None

  @property
  def tied_table(self) -> str | None:
    return None


class SizedPart(Protocol):
  """The sizes of one part of a model, a stack of layers with attention."""

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
  """Sizes that are asked of every config, for a model made of parts: those of one part."""

  @property
  def layered_part(self) -> SizedPart:
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

  @property
  def value_head_dim(self) -> int:
    return self.layered_part.value_head_dim


def check_numbers(config: DataclassInstance, optional_zero: tuple[str, ...] = ()) -> None:
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
  hf: JsonObject, supported: JsonObject, family: str, required: bool = False
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
