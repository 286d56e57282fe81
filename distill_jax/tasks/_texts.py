"""Texts as inputs of encoders, one text per row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import bad_value
from distill_jax.tasks._base import Example, Stack
from distill_jax.tasks._model_configs import PositionLimitedConfig
from distill_jax.types import Inputs

MIN_TOKENS = 3  # tokens of a row: a start token, a word and an end token


class EncodedTexts:
  """A TaskSource of tokenized texts with one class each.

  Args:
    texts: One text per example.
    labels: Index of the class of each text.
    classes: Number of classes.
    tokenizer: The tokenizer.
    max_tokens: Length of a row. The end of a longer text is cut, except for its end token.
  """

  positions = 1

  def __init__(
    self,
    texts: Sequence[str],
    labels: Sequence[int],
    classes: int,
    tokenizer: Tokenizer,
    max_tokens: int,
  ):
    self.classes, self._max_tokens, self._labels = classes, max_tokens, labels
    self._ids = [
      _cut([*tokenizer.begin, *ids, *tokenizer.end], max_tokens)
      for ids in tokenizer.encode_batch(texts)
    ]
    self.token_rows = 1 + max(map(max, self._ids))
    data = json.dumps([self._ids, list(labels), tokenizer.digest])
    self.digest = hashlib.sha256(data.encode()).hexdigest()

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, i: int) -> Example:
    label_T = np.array([self._labels[i]], np.int32)
    tokens = padded(self._ids[i], self._max_tokens)
    return {**tokens, "labels_T": label_T, "mask_T": np.ones(1, bool)}


def _cut(ids: list[int], max_tokens: int) -> list[int]:
  """Returns at most `max_tokens` ids, keeping the last one, e.g. the [SEP] of BERT."""
  return ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], ids[-1]]


def padded(ids: Sequence[int], length: int) -> Example:
  """Returns the padded tokens `tokens_S`, and `valid_S`, 1 at positions that are not padding."""
  tokens_S, valid_S = np.zeros(length, np.int32), np.zeros(length, np.int32)
  tokens_S[: len(ids)], valid_S[: len(ids)] = ids, 1
  return {"tokens_S": tokens_S, "valid_S": valid_S}


def as_inputs(tokens_BT: np.ndarray, segments_BT: np.ndarray) -> Inputs:
  """Returns Inputs whose rows start at position 0, as numpy arrays."""
  positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
  arrays: Any = (tokens_BT, positions_BT, segments_BT)
  return Inputs(*arrays)


def inputs(stack: Stack) -> Inputs:
  """Returns a text encoder's inputs for a batch with the fields of `padded`."""
  return as_inputs(stack("tokens_S"), stack("valid_S"))


def valid(stack: Stack) -> np.ndarray:
  """Returns the positions that are not padding, bool [B, S]."""
  return stack("valid_S") > 0


def check_length(kind: str, max_tokens: int, config: PositionLimitedConfig) -> None:
  """Raises InputError if `max_tokens` is too small, or exceeds the positions of a model.

  Args:
    kind: Name of the task in the registry.
    max_tokens: The task's key `max_tokens`.
    config: The model's architecture config.
  """
  if not MIN_TOKENS <= max_tokens <= (limit := config.max_position_embeddings):
    expected = f"from {MIN_TOKENS} to {limit}, the number of positions of the model"
    raise bad_value(f"{kind}.max_tokens", max_tokens, expected, "Correct it")
