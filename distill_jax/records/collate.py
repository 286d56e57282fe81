"""Records of single sequences to one batch, and to the devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from distill_jax.data import packing
from distill_jax.records import taps
from distill_jax.types import Batch, Inputs, Targets

# What a record calls a field, and what Targets calls it.
STORED = {
  "ids_TK": "ids_BTK",
  "weight_TK": "weight_BTK",
  "logp_TK": "logp_BTK",
  "entropy_T": "entropy_BT",
  "label_logp_T": "label_logp_BT",
  "argmax_T": "argmax_BT",
}

Read = Callable[[Callable[[str], Any]], Batch]


def collate(
  records: Sequence[dict[str, np.ndarray]], with_targets: bool = True, read: Read | None = None
) -> Batch:
  """Records of single sequences to a Batch; differing K are filled up with weight 0.

  Args:
    read: makes the batch but for its targets, of stack(name), a field [B, ...]; by default of
      packed text.
  """
  # numpy here, jax arrays once `to_device` has made the global batch
  stack: Callable[[str], Any] = lambda name: np.stack([r[name] for r in records])
  batch = (read or _packed)(stack)
  others = dict.fromkeys(name.partition("/")[0] for name in records[0] if "/" in name)
  asked = {name: f"{name}/" for name in others} | ({"teacher": ""} if with_targets else {})
  targets = {
    name: _targets(records, at) for name, at in asked.items() if f"{at}ids_TK" in records[0]
  }
  smoothing = stack("smoothing_T") if "smoothing_T" in records[0] else None
  return batch.replace(targets=targets, smoothing_BT=smoothing)


def _packed(stack: Callable[[str], Any]) -> Batch:
  """Packed text: the label of a position is the next token."""
  tokens, segments, mask = stack("tokens_T"), stack("segments_T"), stack("mask_T")
  inputs: Any = packing.to_inputs(tokens, segments, mask)
  tokens, positions, segments, labels, _ = inputs
  return Batch(Inputs(tokens, positions, segments), labels, mask)


def _targets(records: Sequence[dict[str, np.ndarray]], at: str) -> Targets:
  """What one teacher said; `at` stands before the names of its fields (records/joined.py)."""
  stored: dict[str, Any] = {
    ours: _stack_padded([r[at + name] for r in records], -np.inf if name == "logp_TK" else 0)
    for name, ours in STORED.items()
    if at + name in records[0]
  }
  if f"{at}taps_PTD" in records[0]:
    vectors = [taps.dequantise(r[f"{at}taps_PTD"], r[f"{at}taps_scale_PT"]) for r in records]
    stored["taps_BPTD"] = np.stack(vectors)
  return Targets(**stored)


def to_device(batch: Any, sharding: jax.sharding.Sharding) -> Any:
  """The global batch (or any tree of its rows), from each process's own rows."""
  put = lambda x: jax.make_array_from_process_local_data(sharding, x)
  return jax.tree.map(put, batch)


def _stack_padded(arrays: list[np.ndarray], fill: float) -> np.ndarray:
  if arrays[0].ndim == 1:
    return np.stack(arrays)
  K = max(a.shape[1] for a in arrays)
  fit = lambda a: np.pad(a, ((0, 0), (0, K - a.shape[1])), constant_values=fill)
  return np.stack([fit(a) for a in arrays])
