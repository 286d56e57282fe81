"""What classifiers of all modalities say of their classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill_jax.errors import InputError


def check_names(task: str, names: Sequence[str]) -> None:
  if len(set(names)) < max(2, len(names)):
    raise InputError(f"the task {task} has classes {names}; name two or more, each once")


def class_names(names: Sequence[str]) -> dict[str, Any]:
  """Their names as config.json holds them."""
  return {
    "id2label": {str(i): name for i, name in enumerate(names)},
    "label2id": {name: i for i, name in enumerate(names)},
  }
