"""Class names of classifiers."""

from __future__ import annotations

from collections.abc import Sequence

from distill_jax.errors import bad_value
from distill_jax.types import JsonObject


def check_names(names: Sequence[str]) -> None:
  """Raises InputError for the key `classes` unless it holds two or more different names."""
  if len(set(names)) < max(2, len(names)):
    raise bad_value("classes", names, "two or more different names", "Correct the list")


def as_hub_config(names: Sequence[str]) -> JsonObject:
  """Returns the names in the format of Hugging Face's config.json."""
  return {
    "id2label": {str(i): name for i, name in enumerate(names)},
    "label2id": {name: i for i, name in enumerate(names)},
  }
