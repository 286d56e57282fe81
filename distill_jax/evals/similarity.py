"""Similarity of held-out texts by their embeddings: whether models agree on it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import scipy.stats

from distill_jax.losses import DenseTargets
from distill_jax.runtime import distributed
from distill_jax.types import Batch


class Similarity:
  """Gathers the embeddings of all batches; widths may differ from model to model."""

  def __init__(self) -> None:
    self._embeddings: dict[str, list[np.ndarray]] = {}

  def add(self, outputs: Mapping[str, DenseTargets], batch: Batch) -> None:
    """Adds the embeddings of a batch.

    Args:
      outputs: by model; their hidden states are embeddings of length 1.
    """
    real_B = distributed.to_host(batch.mask_BT)[:, 0]
    for name, t in outputs.items():
      self._embeddings.setdefault(name, []).append(distributed.to_host(t.hidden_BTD)[real_B, 0])

  def row(self, model: str) -> dict[str, float]:
    """The agreement of a model with the teacher."""
    return agreement(*(np.concatenate(self._embeddings[name]) for name in (model, "teacher")))


def agreement(ours_ND: np.ndarray, theirs_ND: np.ndarray) -> dict[str, float]:
  """Compares two models' cosines of all pairs of N texts; their widths D may differ.

  Returns:
    spearman: the rank correlation of their cosines, each pair once (as STS is scored,
      with the teacher in the place of people);
    same_nearest: the share of texts whose nearest other text is the same.
  """
  pairs = np.triu_indices(len(ours_ND), 1)
  cosines = [x.astype(np.float64) @ x.astype(np.float64).T for x in (ours_ND, theirs_ND)]
  spearman = scipy.stats.spearmanr(*(c[pairs] for c in cosines)).statistic
  for c in cosines:
    np.fill_diagonal(c, -np.inf)
  ours_N, theirs_N = (c.argmax(1) for c in cosines)
  return {"spearman": float(spearman), "same_nearest": float(np.mean(ours_N == theirs_N))}
