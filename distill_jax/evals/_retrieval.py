"""Held-out images and texts that find each other by their embeddings."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from distill_jax import build, processes
from distill_jax.layers import Compute
from distill_jax.types import Batch


def measure(m: build.Built, batches: Iterable[Batch]) -> dict[str, float]:
  """Recall at 1 over all that is held out, whatever the batches are.

  Equal texts are one. Where each class has one text, text_recall is zero-shot classification.

  Returns:
    text_recall: the share of images whose own text is the nearest of all different texts;
    image_recall: the share of different texts whose nearest image is one of their own.
  """
  embed = jax.jit(functools.partial(_embeddings, how=m.how))
  said, texts = [], []
  for batch in batches:
    real_B = processes.to_host(batch.mask_BT)[:, 0]
    said.append(processes.to_host(embed(m.model, batch.inputs))[real_B])
    texts.append(processes.to_host(batch.inputs.texts.tokens_BT)[real_B])
  return recall(np.concatenate(said), np.concatenate(texts))


def recall(said_B2E: np.ndarray, tokens_BS: np.ndarray) -> dict[str, float]:
  """Of embeddings of (image, text) of length 1, and the texts themselves."""
  _, first, own_B = np.unique(tokens_BS, axis=0, return_index=True, return_inverse=True)
  own_B = own_B.reshape(-1)
  near_BU = said_B2E[:, 0] @ said_B2E[first, 1].T  # U different texts
  images = near_BU.argmax(0)
  return {
    "text_recall": float(np.mean(near_BU.argmax(1) == own_B)),
    "image_recall": float(np.mean(own_B[images] == np.arange(len(first)))),
  }


def _embeddings(model: Any, inputs: Any, how: Compute) -> jax.Array:
  return model(inputs, how).embedding_BTD
