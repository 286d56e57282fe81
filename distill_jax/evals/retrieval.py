"""Held-out images and texts that find each other by their embeddings."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from distill_jax.losses import DenseTargets
from distill_jax.runtime import distributed
from distill_jax.types import Batch


class Retrieval:
  """Gathers the embeddings of all batches, and says who finds whom."""

  def __init__(self) -> None:
    self._said: dict[str, list[np.ndarray]] = {}
    self._texts: list[np.ndarray] = []

  def add(self, outputs: Mapping[str, DenseTargets], batch: Batch) -> None:
    """Args: outputs, by model; their heads are the batch, first its texts, then its images."""
    real_B = distributed.to_host(batch.mask_BT)[:, 0]
    self._texts.append(distributed.to_host(batch.inputs.texts.tokens_BT)[real_B])
    for name, t in outputs.items():
      assert t.head_VD is not None
      both_2BE = distributed.to_host(t.head_VD).reshape(2, len(real_B), -1)[..., :-1]
      self._said.setdefault(name, []).append(both_2BE[:, real_B])

  def row(self, model: str) -> dict[str, float]:
    """What `recall` says of a model."""
    text_BE, image_BE = np.concatenate(self._said[model], 1)
    return recall(text_BE, image_BE, np.concatenate(self._texts))


def recall(text_BE: np.ndarray, image_BE: np.ndarray, tokens_BS: np.ndarray) -> dict[str, float]:
  """Recall at 1 among all pairs, of embeddings of length 1; equal texts are one.

  Where each class has one text, text_recall is zero-shot classification.

  Returns:
    text_recall: the share of images whose own text is the nearest of all different texts;
    image_recall: the share of different texts whose nearest image is one of their own.
  """
  _, first, own_B = np.unique(tokens_BS, axis=0, return_index=True, return_inverse=True)
  own_B = own_B.reshape(-1)
  near_BU = image_BE @ text_BE[first].T  # U different texts
  return {
    "text_recall": float(np.mean(near_BU.argmax(1) == own_B)),
    "image_recall": float(np.mean(own_B[near_BU.argmax(0)] == np.arange(len(first)))),
  }
