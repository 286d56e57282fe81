"""Retrieval of held-out images by text and of texts by image, by the similarity of embeddings."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from distill_jax.losses import DenseTargets
from distill_jax.runtime import distributed
from distill_jax.types import Batch, ImageText


class Retrieval:
  """Collects the embeddings of all batches and computes the recall."""

  def __init__(self) -> None:
    self._embeddings: dict[str, list[np.ndarray]] = {}
    self._texts: list[np.ndarray] = []

  def add(self, outputs: Mapping[str, DenseTargets], batch: Batch) -> None:
    """Adds the embeddings of a batch.

    Args:
      outputs: The outputs of each model by name. The rows of a head are the embeddings of the
        batch's texts, followed by those of its images.
      batch: The batch.
    """
    assert isinstance(batch.inputs, ImageText)
    real_B = distributed.to_host(batch.mask_BT)[:, 0]
    self._texts.append(distributed.to_host(batch.inputs.texts.tokens_BT)[real_B])
    for name, output in outputs.items():
      assert output.head_VD is not None
      both_2BD = distributed.to_host(output.head_VD).reshape(2, len(real_B), -1)[..., :-1]
      self._embeddings.setdefault(name, []).append(both_2BD[:, real_B])

  def row(self, model: str) -> dict[str, float]:
    """Returns the recall of a model."""
    text_BD, image_BD = np.concatenate(self._embeddings[model], 1)
    return recall(text_BD, image_BD, np.concatenate(self._texts))


def recall(text_BD: np.ndarray, image_BD: np.ndarray, tokens_BS: np.ndarray) -> dict[str, float]:
  """Computes recall@1 among all pairs of texts and images. Equal texts count as one text.

  If there is one text per class, text_recall is the accuracy of zero-shot classification.

  Args:
    text_BD: The embedding of each pair's text, with length 1.
    image_BD: The embedding of each pair's image, with length 1.
    tokens_BS: The tokens of each pair's text, to find equal texts.

  Returns:
    text_recall: The fraction of images whose nearest text is the text of their pair.
    image_recall: The fraction of texts whose nearest image belongs to one of their pairs.
  """
  _, first, own_B = np.unique(tokens_BS, axis=0, return_index=True, return_inverse=True)
  own_B = own_B.reshape(-1)
  cosine_BK = image_BD @ text_BD[first].T  # K different texts
  return {
    "text_recall": float(np.mean(cosine_BK.argmax(1) == own_B)),
    "image_recall": float(np.mean(own_B[cosine_BK.argmax(0)] == np.arange(len(first)))),
  }
