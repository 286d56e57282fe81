"""Agreement of models on the similarity of held-out texts, by their embeddings."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from distill_jax.losses import DenseTargets
from distill_jax.runtime import distributed
from distill_jax.types import Batch


class Similarity:
  """Collects the embeddings of all batches and compares models with the teacher."""

  def __init__(self) -> None:
    self._embeddings: dict[str, list[np.ndarray]] = {}

  def add(self, outputs: Mapping[str, DenseTargets], batch: Batch) -> None:
    """Adds the embeddings of a batch.

    Args:
      outputs: The outputs of each model by name; hidden states are embeddings of length 1.
      batch: The batch.
    """
    real_B = distributed.to_host(batch.mask_BT)[:, 0]
    for name, t in outputs.items():
      self._embeddings.setdefault(name, []).append(distributed.to_host(t.hidden_BTD)[real_B, 0])

  def row(self, model: str) -> dict[str, float]:
    """Returns the agreement of a model with the teacher."""
    return agreement(*(np.concatenate(self._embeddings[name]) for name in (model, "teacher")))


def agreement(ours_ND: np.ndarray, theirs_ND: np.ndarray) -> dict[str, float]:
  """Compares the cosine similarities of all pairs of N texts between two models.

  Args:
    ours_ND: The embeddings of one model, with length 1.
    theirs_ND: The embeddings of the other model, with length 1. Its width D may differ.

  Returns:
    spearman: The rank correlation of the cosines of all pairs. This is the score of the STS
      benchmarks, with the teacher in place of human ratings.
    same_nearest: The fraction of texts with the same nearest other text in both models.
  """
  import scipy.stats  # its import takes 0.8 s, and only embeddings need it

  pairs = np.triu_indices(len(ours_ND), 1)
  cosines = [x.astype(np.float64) @ x.astype(np.float64).T for x in (ours_ND, theirs_ND)]
  spearman = scipy.stats.spearmanr(*(c[pairs] for c in cosines)).statistic
  for c in cosines:
    np.fill_diagonal(c, -np.inf)
  ours_N, theirs_N = (c.argmax(1) for c in cosines)
  return {"spearman": float(spearman), "same_nearest": float(np.mean(ours_N == theirs_N))}
