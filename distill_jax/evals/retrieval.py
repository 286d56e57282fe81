"""Retrieval of held-out images by texts, and of texts by images, by their embeddings."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from distill_jax.losses import DenseTargets
from distill_jax.runtime import distributed
from distill_jax.types import Batch, ImageText


class Retrieval:
  """Gathers the embeddings of all batches, and computes recall among them."""

  def __init__(self) -> None:
    self._embeddings: dict[str, list[np.ndarray]] = {}
    self._texts: list[np.ndarray] = []

  def add(self, outputs: Mapping[str, DenseTargets], batch: Batch) -> None:
    """Adds the embeddings of a batch.

    Args:
      outputs: by model; their heads are the batch, first its texts, then its images.
    """
    assert isinstance(batch.inputs, ImageText)
    real_B = distributed.to_host(batch.mask_BT)[:, 0]
    self._texts.append(distributed.to_host(batch.inputs.texts.tokens_BT)[real_B])
    for name, output in outputs.items():
      assert output.head_VD is not None
      both_2BD = distributed.to_host(output.head_VD).reshape(2, len(real_B), -1)[..., :-1]
      self._embeddings.setdefault(name, []).append(both_2BD[:, real_B])

  def row(self, model: str) -> dict[str, float]:
    """The recall of a model."""
    text_BD, image_BD = np.concatenate(self._embeddings[model], 1)
    return recall(text_BD, image_BD, np.concatenate(self._texts))


def recall(text_BD: np.ndarray, image_BD: np.ndarray, tokens_BS: np.ndarray) -> dict[str, float]:
  """Computes recall at 1 among all pairs, of embeddings of length 1; equal texts are one.

  Where each class has one text, text_recall is zero-shot classification.

  Returns:
    text_recall: the share of images whose own text is the nearest of all different texts;
    image_recall: the share of different texts whose nearest image is one of their own.
  """
  _, first, own_B = np.unique(tokens_BS, axis=0, return_index=True, return_inverse=True)
  own_B = own_B.reshape(-1)
  cosine_BK = image_BD @ text_BD[first].T  # of the K different texts
  return {
    "text_recall": float(np.mean(cosine_BK.argmax(1) == own_B)),
    "image_recall": float(np.mean(own_B[cosine_BK.argmax(0)] == np.arange(len(first)))),
  }
