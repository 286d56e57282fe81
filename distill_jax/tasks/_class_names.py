"""The names of a classifier's classes, of all modalities."""

from __future__ import annotations

from collections.abc import Sequence

from distill_jax.errors import InputError
from distill_jax.types import JsonObject


def check_names(kind: str, names: Sequence[str]) -> None:
  """Refuses fewer than two classes, or a name that is there twice."""
  if len(set(names)) < max(2, len(names)):
    raise InputError(f"the task {kind} has classes {names}; name two or more, each once")


def as_hub_config(names: Sequence[str]) -> JsonObject:
  """Returns the names as config.json holds them."""
  return {
    "id2label": {str(i): name for i, name in enumerate(names)},
    "label2id": {name: i for i, name in enumerate(names)},
  }
