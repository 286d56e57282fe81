"""Texts that an encoder reads whole, one a row: what tasks of text encoders share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.tasks._base import Example, Stack
from distill_jax.tasks._model_configs import PositionLimitedConfig
from distill_jax.types import Inputs

MIN_TOKENS = 3  # of a row: a text's beginning, a word, its end


class EncodedTexts:
  """A TaskSource of texts as tokens, with a class each."""

  positions = 1

  def __init__(
    self,
    texts: Sequence[str],
    labels: Sequence[int],
    classes: int,
    tokenizer: Tokenizer,
    max_tokens: int,
  ):
    """Args:
    texts: one an example.
    labels: the number of each text's class.
    classes: how many classes there are.
    tokenizer: of the texts.
    max_tokens: the length of a row; a longer text is cut before its end token.
    """
    self.classes, self._max_tokens, self._labels = classes, max_tokens, labels
    self._ids = [
      _cut([*tokenizer.begin, *ids, *tokenizer.end], max_tokens)
      for ids in tokenizer.encode_batch(texts)
    ]
    data = json.dumps([self._ids, list(labels), tokenizer.digest])
    self.digest = hashlib.sha256(data.encode()).hexdigest()

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, i: int) -> Example:
    label_T = np.array([self._labels[i]], np.int32)
    tokens = padded(self._ids[i], self._max_tokens)
    return {**tokens, "labels_T": label_T, "mask_T": np.ones(1, bool)}


def _cut(ids: list[int], max_tokens: int) -> list[int]:
  """Returns at most so many ids, of which the last stays: a text's end, such as BERT's [SEP]."""
  return ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], ids[-1]]


def padded(ids: Sequence[int], length: int) -> Example:
  """Returns `tokens_S`, an encoder's tokens, and `valid_S`, 1 where they are not padding."""
  tokens_S, valid_S = np.zeros(length, np.int32), np.zeros(length, np.int32)
  tokens_S[: len(ids)], valid_S[: len(ids)] = ids, 1
  return {"tokens_S": tokens_S, "valid_S": valid_S}


def as_inputs(tokens_BT: np.ndarray, segments_BT: np.ndarray) -> Inputs:
  """Returns rows that each begin at position 0; the arrays are numpy until they are sharded."""
  positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
  arrays: Any = (tokens_BT, positions_BT, segments_BT)
  return Inputs(*arrays)


def inputs(stack: Stack) -> Inputs:
  """Returns what a text encoder reads of a batch with the fields of `padded`."""
  return as_inputs(stack("tokens_S"), stack("valid_S"))


def valid(stack: Stack) -> np.ndarray:
  """Returns the positions that are not padding, bool [B, S]."""
  return stack("valid_S") > 0


def check_length(kind: str, max_tokens: int, config: PositionLimitedConfig) -> None:
  """Refuses texts of more tokens than a family's Config has positions for, or of too few."""
  if not MIN_TOKENS <= max_tokens <= config.max_position_embeddings:
    raise InputError(
      f"the task {kind} has max_tokens {max_tokens}; it is at least {MIN_TOKENS}, and the model "
      f"reads at most {config.max_position_embeddings}"
    )
