"""Texts that are read whole, one a row: what tasks of text encoders share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distill_jax.data import corpus
from distill_jax.data.tokenizers import Tokenizer, load_tokenizer
from distill_jax.errors import InputError
from distill_jax.types import Inputs

LEAST = 3  # tokens of a row: a text's beginning, a word, its end


class Source:
  """Texts as tokens, and a class each; see distill_jax/tasks."""

  positions = 1

  def __init__(
    self, texts: Sequence[str], labels: Sequence[int], classes: int, tokenizer: Tokenizer, most: int
  ):
    """Args: most, tokens of a text, which is cut to so many."""
    self.classes, self._most, self._labels = classes, most, labels
    around = lambda ids: [*tokenizer.begin, *ids, *tokenizer.end]
    self._ids = [_cut(around(ids), most) for ids in tokenizer.encode_batch(texts)]
    said = json.dumps([self._ids, list(labels), tokenizer.digest])
    self.digest = hashlib.sha256(said.encode()).hexdigest()

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    ids = self._ids[i]
    read_S, seen_S = np.zeros(self._most, np.int32), np.zeros(self._most, np.int32)
    read_S[: len(ids)], seen_S[: len(ids)] = ids, 1
    label_T = np.array([self._labels[i]], np.int32)
    return {"read_S": read_S, "seen_S": seen_S, "labels_T": label_T, "mask_T": np.ones(1, bool)}


def _cut(ids: list[int], most: int) -> list[int]:
  """At most so many ids, of which the last stays: a text's end, as BERT's [SEP]."""
  return ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]


def inputs(stack: Callable[[str], np.ndarray]) -> Inputs:
  """What a text encoder reads of a batch."""
  tokens, segments = stack("read_S"), stack("seen_S")
  places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  read: Any = (tokens, places, segments)  # numpy until to_device
  return Inputs(*read)


def seen(stack: Callable[[str], np.ndarray]) -> np.ndarray:
  """The positions that are no padding, [B, S]."""
  return stack("seen_S") > 0


def tokenizer_of(task: str, path: str, pretrained: Any) -> Tokenizer:
  """The tokenizer that a task names, or the one of the model that reads."""
  if path:
    return load_tokenizer(path)
  if pretrained is None or pretrained.tokenizer is None:
    raise InputError(f"the task {task} has no tokenizer and the model brings none; name a file")
  return corpus.of_files(pretrained.tokenizer, pretrained.source)


def check_length(task: str, most: int, config: Any) -> None:
  """Refuses texts of more tokens than a family's Config has places for, or of too few."""
  if not LEAST <= most <= config.max_position_embeddings:
    raise InputError(
      f"the task {task} has max_tokens {most}; it is at least {LEAST}, and the model reads at most "
      f"{config.max_position_embeddings}"
    )
