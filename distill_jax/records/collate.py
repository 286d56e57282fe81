"""Records of single sequences to one batch, and to the devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from distill_jax.data import packing
from distill_jax.losses import SampledTargets, TopKTargets
from distill_jax.records import fields, taps
from distill_jax.types import Batch, Inputs, Recorded, Targets

Read = Callable[[Callable[[str], Any]], Batch]


def collate(
  records: Sequence[dict[str, np.ndarray]],
  with_targets: bool = True,
  read: Read | None = None,
  recorded: Recorded | None = None,
) -> Batch:
  """Records of single sequences to a Batch; differing K are filled up with weight 0.

  Args:
    read: makes the batch but for its targets, of stack(name), a field [B, ...]; by default of
      packed text.
    recorded: how the targets were recorded, from their store's manifest.
  """
  # numpy here, jax arrays once `to_device` has made the global batch
  stack: Callable[[str], Any] = lambda name: np.stack([r[name] for r in records])
  recorded = recorded or Recorded()
  batch = (read or _packed)(stack)
  others = dict.fromkeys(name.partition("/")[0] for name in records[0] if "/" in name)
  asked = {name: f"{name}/" for name in others} | ({"teacher": ""} if with_targets else {})
  targets = {
    name: _targets(records, at, recorded)
    for name, at in asked.items()
    if at + fields.IDS.read in records[0]
  }
  smoothing = stack(fields.SMOOTHING) if fields.SMOOTHING in records[0] else None
  return batch.replace(targets=targets, smoothing_BT=smoothing)


def _packed(stack: Callable[[str], Any]) -> Batch:
  """Packed text: the label of a position is the next token."""
  tokens, segments, mask = stack("tokens_T"), stack("segments_T"), stack("mask_T")
  inputs: Any = packing.to_inputs(tokens, segments, mask)
  tokens, positions, segments, labels, _ = inputs
  return Batch(Inputs(tokens, positions, segments), labels, mask)


def _targets(records: Sequence[dict[str, np.ndarray]], at: str, recorded: Recorded) -> Targets:
  """The targets of one teacher; `at` stands before the names of its fields (MultiTeacherStore)."""
  stored: dict[str, Any] = {
    f.batch: _stack_padded([r[at + f.read] for r in records], f.empty)
    for f in fields.PREDICTED
    if at + f.read in records[0]
  }
  names = [at + f.read for f in fields.TAPPED]
  if names[0] in records[0]:
    vectors = [taps.dequantise(*(r[name] for name in names)) for r in records]
    stored[fields.TAPS.batch] = np.stack(vectors)
  stored["temperature"] = recorded.temperature
  if "weight_BTK" in stored:
    return SampledTargets(**stored)
  return TopKTargets(**stored, missing_mass=recorded.missing_mass)


def padded_batches(
  rows: Sequence[dict[str, np.ndarray]], size: int, read: Read | None = None
) -> Iterator[Batch]:
  """Yields this process's rows of batches of `size` rows, in order, without targets of a teacher.

  The last batch is filled up with rows of padding.
  """
  padding = {name: np.zeros_like(x) for name, x in rows[0].items()}
  for i in range(0, len(rows), size):
    chunk = rows[i : i + size]
    whole = [*chunk, *[padding] * (size - len(chunk))]
    yield collate(whole[jax.process_index() :: jax.process_count()], read=read)


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
