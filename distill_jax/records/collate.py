"""Collation of records to batches, on the host and on devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from distill_jax.data import packing
from distill_jax.losses import SampledTargets, TopKTargets
from distill_jax.records import fields, taps
from distill_jax.records.fields import Record
from distill_jax.records.manifest import Manifest
from distill_jax.types import Batch, Inputs, Recorded, Targets, Tree

# Makes a batch without targets, given a function from a field's name to the field [B, ...].
Read = Callable[[Callable[[str], np.ndarray]], Batch]


def collate(
  records: Sequence[Record],
  with_targets: bool = True,
  read: Read | None = None,
  recorded: Recorded | None = None,
) -> Batch:
  """Returns records of single sequences as a Batch of numpy arrays.

  Args:
    records: The rows of the batch. Different numbers of entries are padded with weight 0.
    with_targets: True to include the targets of "teacher".
    read: Returns the batch without targets from its fields; None for packed text.
    recorded: Metadata of the recorded targets, from the manifest of their store.
  """

  def stack(name: str) -> np.ndarray:
    return np.stack([record[name] for record in records])

  recorded = recorded or Recorded()
  batch = (read or _packed)(stack)
  others = dict.fromkeys(name.partition("/")[0] for name in records[0] if "/" in name)
  prefixes = {name: f"{name}/" for name in others} | ({"teacher": ""} if with_targets else {})
  targets = {
    name: _targets(records, prefix, recorded)
    for name, prefix in prefixes.items()
    if prefix + fields.IDS.read in records[0]
  }
  smoothing: Any = stack(fields.SMOOTHING) if fields.SMOOTHING in records[0] else None
  return batch.replace(targets=targets, smoothing_BT=smoothing)


def recorded_of(m: Manifest) -> Recorded:
  """Returns how the targets of a store were recorded."""
  return Recorded(
    temperature=m.temperature,
    missing_mass=m.missing_mass,
    taps=m.taps.layers if m.taps else (),
    tap_kind=m.taps.kind if m.taps else "hidden",
  )


def _packed(stack: Callable[[str], np.ndarray]) -> Batch:
  """Returns packed text as a batch. The label of a position is the next token."""
  mask: Any = stack("mask_T")
  rows: Any = packing.to_inputs(stack("tokens_T"), stack("segments_T"), mask)
  return Batch(Inputs(rows.tokens, rows.positions, rows.segments), rows.labels, mask)


def _targets(records: Sequence[Record], prefix: str, recorded: Recorded) -> Targets:
  """Returns the targets of one teacher, whose fields have a prefix (see MultiTeacherStore)."""
  stored: dict[str, Any] = {
    f.batch: _stack_padded([r[prefix + f.read] for r in records], f.empty)
    for f in fields.PREDICTED
    if prefix + f.read in records[0]
  }
  names = [prefix + f.read for f in fields.TAPPED]
  if names[0] in records[0]:
    vectors = [taps.dequantise(*(r[name] for name in names)) for r in records]
    stored[fields.TAPS.batch] = np.stack(vectors)
  stored["temperature"] = recorded.temperature
  if fields.WEIGHT.batch in stored:
    return SampledTargets(**stored)
  return TopKTargets(**stored, missing_mass=recorded.missing_mass)


def padded_batches(
  rows: Sequence[dict[str, np.ndarray]], size: int, read: Read | None = None
) -> Iterator[Batch]:
  """Yields this process's rows of batches in order, without targets.

  Args:
    rows: All rows.
    size: Size of the global batch. The last one is padded with rows of zeros.
    read: See `collate`.
  """
  padding = {name: np.zeros_like(x) for name, x in rows[0].items()}
  for i in range(0, len(rows), size):
    chunk = rows[i : i + size]
    whole = [*chunk, *[padding] * (size - len(chunk))]
    yield collate(whole[jax.process_index() :: jax.process_count()], read=read)


def to_device(batch: Tree, sharding: jax.sharding.Sharding) -> Tree:
  """Returns a global batch, or any tree of rows, from the rows of each process."""

  def global_array(x: np.ndarray) -> jax.Array:
    return jax.make_array_from_process_local_data(sharding, x)

  return jax.tree.map(global_array, batch)


def _stack_padded(arrays: list[np.ndarray], fill: float) -> np.ndarray:
  if arrays[0].ndim == 1:
    return np.stack(arrays)
  K = max(a.shape[1] for a in arrays)
  return np.stack([np.pad(a, ((0, 0), (0, K - a.shape[1])), constant_values=fill) for a in arrays])
