"""Collation of records to batches, on the host and on devices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import KeyPath

from distill_jax.cross_tokenizer import spans
from distill_jax.data import model_rows
from distill_jax.errors import InputError
from distill_jax.losses import LabelTargets, SampledTargets, SpanTargets, TopKTargets
from distill_jax.nn import sharding
from distill_jax.nn.sharding import Rows
from distill_jax.records import fields, taps
from distill_jax.records.fields import Record
from distill_jax.records.manifest import Manifest
from distill_jax.records.stacked import Stacked
from distill_jax.types import Batch, Inputs, Recorded, Rollout, Targets, Tree

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
    return _stack(records, name)

  recorded = recorded or Recorded()
  batch = (read or _packed)(stack)
  others = dict.fromkeys(name.partition("/")[0] for name in records[0] if "/" in name)
  prefixes = {name: f"{name}/" for name in others} | ({"teacher": ""} if with_targets else {})
  targets = {
    name: _targets(records, prefix, recorded)
    for name, prefix in prefixes.items()
    if prefix + fields.LABEL_LOGP.read in records[0]
  }
  if with_targets and spans.LOGP in records[0]:
    logp_BT, left_BT = (cast(Any, stack(name)) for name in (spans.LOGP, spans.LEFT))
    targets["teacher"] = SpanTargets(span_logp_BT=logp_BT, span_left_BT=left_BT)
  smoothing: Any = stack(fields.SMOOTHING) if fields.SMOOTHING in records[0] else None
  stored: dict[str, Any] = {f.batch: stack(f.read) for f in fields.ROLLOUT if f.read in records[0]}
  return batch.replace(
    targets=batch.targets | targets,
    smoothing_BT=smoothing,
    rollout=Rollout(**stored) if stored else None,
  )


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
  tokens_BT = stack("tokens_T")
  labels_BT: Any = model_rows.next_tokens(tokens_BT)
  mask_BT: Any = stack("mask_T")
  return Batch(Inputs.of(tokens_BT, stack("segments_T")), labels_BT, mask_BT)


def _targets(records: Sequence[Record], prefix: str, recorded: Recorded) -> Targets:
  """Returns the targets of one teacher, whose fields have a prefix (see MultiTeacherStore)."""
  stored: dict[str, Any] = {
    f.batch: _stack(records, prefix + f.read, f.empty)
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
  if fields.IDS.batch not in stored:
    return LabelTargets(**stored)
  return TopKTargets(**stored, missing_mass=recorded.missing_mass)


def padding_like(record: Record) -> Record:
  """Returns the record of a padding row: zeros, so that no label is trained on."""
  return {name: np.zeros_like(x) for name, x in record.items()}


def padded_batches(
  examples: Sequence[dict[str, np.ndarray]], rows: Rows, read: Read | None = None
) -> Iterator[Batch]:
  """Yields this process's rows of batches of all examples in order, without targets.

  Args:
    examples: The examples.
    rows: The rows that this process holds. The last batch is padded with rows of zeros.
    read: See `collate`.
  """
  padding = padding_like(examples[0])
  for first in range(0, len(examples), rows.size):
    held = (first + rows.held).tolist()
    yield collate([examples[i] if i < len(examples) else padding for i in held], read=read)


def streamed_batches(examples: Iterable[dict[str, np.ndarray]], rows: Rows) -> Iterator[Batch]:
  """Yields this process's rows of batches of packed text, as `padded_batches` does for a sequence.

  Only one batch of the text is in memory.
  """
  stream = iter(examples)
  while taken := list(itertools.islice(stream, rows.size)):
    padding = padding_like(taken[0])
    yield collate([taken[i] if i < len(taken) else padding for i in rows.held.tolist()])


def shardings(batch: Tree, mesh: Mesh) -> Tree:
  """Returns the sharding of each array of a batch: of its rows, and of its positions.

  Args:
    batch: A tree of arrays, or of their shapes, whose first axis is rows. With a context axis, the
      second axis of every array with several is positions, or the third of features.
    mesh: The mesh.
  """

  def of_array(path: KeyPath, x: jax.ShapeDtypeStruct) -> NamedSharding:
    features = jax.tree_util.keystr(path).endswith(fields.TAPS.batch)
    return sharding.batch_sharding(mesh, 2 if features else 1 if x.ndim > 1 else None)

  return jax.tree_util.tree_map_with_path(of_array, batch)


def to_device(batch: Tree, rows: Rows) -> Tree:
  """Returns a global batch, or any tree of rows, from the rows that each process holds.

  With a context axis, a device gets its part of the positions. A process reads its rows whole:
  where a sequence of 131,072 tokens spans 4 hosts, each reads 5 MB of records for it.

  Args:
    batch: A tree of arrays with the rows `rows.held` of the batch.
    rows: The rows of the batch.

  Raises:
    InputError: An array has another number of rows.
  """

  def global_array(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    if len(x) != len(rows.held):
      raise InputError(
        f"Process {rows.process} has {len(x)} rows of a batch of {rows.size}; expected the "
        f"{len(rows.held)} rows that its devices hold. Read the rows of sharding.rows."
      )

    def of_device(index: tuple[slice, ...] | None) -> np.ndarray:
      assert index is not None
      start, stop, _ = index[0].indices(rows.size)
      first = int(np.searchsorted(rows.held, start))
      return x[first : first + stop - start, *index[1:]]

    return jax.make_array_from_callback((rows.size, *x.shape[1:]), sharding, of_device)

  return jax.tree.map(global_array, batch, shardings(batch, rows.mesh))


def local_rows(x: jax.Array, index_B: np.ndarray) -> np.ndarray:
  """Returns some rows of a global array, all of which are on devices of this process.

  Args:
    x: An array of which only the first axis is sharded.
    index_B: Indices of the rows, in order.
  """
  parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
  chosen = []
  for start, part in sorted(parts.items()):
    first, past = np.searchsorted(index_B, [start, start + len(part)])
    if first < past:
      assert part.shape[1:] == x.shape[1:], (part.shape, x.shape)
      chosen.append(np.asarray(part)[index_B[first:past] - start])
  return np.concatenate(chosen)


def _stack(records: Sequence[Record], name: str, empty: float = 0) -> np.ndarray:
  """Returns a field of all records, with as many entries as the largest of them."""
  if isinstance(records, Stacked):
    return records.arrays[name]
  arrays = [record[name] for record in records]
  if len({x.shape for x in arrays}) == 1:
    return np.stack(arrays)
  K = max(x.shape[1] for x in arrays)
  out = np.full((len(arrays), len(arrays[0]), K), empty, arrays[0].dtype)
  for padded, x in zip(out, arrays, strict=True):
    padded[:, : x.shape[1]] = x
  return out
