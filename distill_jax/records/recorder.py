"""Recording a teacher: what a store keeps of its outputs, and the manifest that describes it.

Nothing here reads a config or a corpus; `commands/record.py` does, and calls this.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.data.tokenizers import Tokenizer
from distill_jax.losses.features import FeatureSpec, flat_qkv
from distill_jax.nn.layers import ComputeConfig
from distill_jax.records import fields, sampler, tap_features, taps
from distill_jax.records.fields import Record, RecordSpec
from distill_jax.records.manifest import Manifest, Taps, format_of
from distill_jax.records.options import RecordsOptions
from distill_jax.records.sampler import SamplerSpec
from distill_jax.types import Batch, JsonObject, Model, Output

TAPS_SEED = 0  # of the fixed projection; the manifest names it
Part = TypeVar("Part")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The sequences that are recorded: packed text, or the examples of one task.

  Attributes:
    rows: records without targets: tokens_T, segments_T and mask_T of text; labels_T and
      mask_T of a task, with the model's inputs beside them.
    positions: positions of a row, T.
    classes: outcomes at a position: tokens, or the classes of a task.
    tokenizer: digest of the tokenizer; "" for a task, whose own digest covers it.
    digest: digest of the beginning of the text, or of the task.
    first_class: row of the teacher's head where the classes begin; not 0 only for one of
      several tasks.
  """

  rows: Sequence[Record]
  positions: int
  classes: int
  tokenizer: str
  digest: str
  first_class: int = 0

  @property
  def is_task(self) -> bool:
    return "labels_T" in self.rows[0]

  @classmethod
  def of_text(cls, rows: Sequence[Record], tokenizer: Tokenizer, positions: int) -> Corpus:
    """Packed text. Its digest covers the first row, so that a corpus may grow.

    `commands/record.py` compares what follows with the shards already written.
    """
    total = hashlib.sha256()
    for name in fields.TEXT:
      total.update(np.ascontiguousarray(rows[0][name]).tobytes())
    return cls(rows, positions, tokenizer.vocab_size, tokenizer.digest, total.hexdigest())


@dataclasses.dataclass(frozen=True)
class Recorder:
  """Reduces a teacher's outputs on a batch to what a store keeps of them, on the device.

  Attributes:
    options: what is stored; of any kind but "text".
    compute: how the teacher is computed.
    vocab_size: classes at a position.
    first_class: row of the teacher's head where they begin.
    feature_width: numbers in a tapped vector before the projection; see tap_features.feature_width.
  """

  options: RecordsOptions
  compute: ComputeConfig
  vocab_size: int
  first_class: int = 0
  feature_width: int = 0

  @functools.cached_property
  def jitted(self) -> jax.stages.Wrapped:
    """`targets`, compiled."""
    return jax.jit(self.targets)

  def targets(
    self, model: Model, key: jax.Array, batch: Batch, index_B: jax.Array
  ) -> dict[str, jax.Array]:
    """Returns what is stored of each row, by field, with the batch axis first.

    Args:
      model: the teacher.
      key: of the sampling offsets, which depend on it and the row's number alone.
      batch: the rows, without targets.
      index_B: int32 number of each row in the store.
    """
    c, T = self.options, batch.labels_BT.shape[1]
    u_BT = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (T,)))(index_B)
    features = feature_spec(c)
    out: Output = model(batch.model_inputs, self.compute, features.taps)
    # Rows of the head that belong to other tasks come last, as padding does.
    first = self.first_class
    head_VD = jnp.roll(out.head_VD, -first, 0) if first else out.head_VD
    summary = sampler.summarise(
      out.hidden_BTD,
      head_VD,
      batch.labels_BT,
      u_BT,
      SamplerSpec.of(c, self.vocab_size),
      chunk=c.chunk,
      soft_cap=out.soft_cap,
    )
    targets = {f.device: summary[f.name] for f in fields.PREDICTED if f.name in summary}
    if c.taps:
      kept = features.extract(model, out, batch.model_inputs, self.compute)
      flat = [kept.hidden[i] if i in kept.hidden else flat_qkv(kept.qkv[i]) for i in c.taps]
      q_PBTD, scale_PBT = tap_features.quantise(jnp.stack(flat), self._projection())
      targets[fields.TAPS.device] = jnp.moveaxis(q_PBTD, 0, 1)
      targets[fields.TAPS_SCALE.device] = jnp.moveaxis(scale_PBT, 0, 1)
    return targets

  def _projection(self) -> np.ndarray | None:
    to = self.options.taps_width
    return taps.projection(TAPS_SEED, self.feature_width, to) if to else None


def local_records(rows: Sequence[Record], targets: Mapping[str, jax.Array]) -> list[Record]:
  """Returns the records of this process: its rows, each with its part of the batch's targets.

  Args:
    rows: this process's rows of the batch, without padding.
    targets: of the global batch, as `Recorder.targets` returns them.
  """
  recorded = (*fields.PREDICTED, *fields.TAPPED)
  local = {f.record: _local(targets[f.device]) for f in recorded if f.device in targets}
  return [
    {name: row[name] for name in fields.UNTAUGHT if name in row}
    | {name: x[i] for name, x in local.items()}
    for i, row in enumerate(rows)
  ]


def _local(x_B: jax.Array) -> np.ndarray:
  parts = {s.index[0].start or 0: s for s in x_B.addressable_shards}  # replicas count once
  return np.concatenate([np.asarray(parts[start].data) for start in sorted(parts)])


def overlap(fn: Callable[[Part], Result], parts: Iterable[Part]) -> Iterator[tuple[Part, Result]]:
  """Yields (part, fn(part)), each once fn has been called on the next part.

  fn dispatches work to the devices; they compute one part while the caller reads the one
  before.
  """
  before: tuple[Part, Result] | None = None
  for part in parts:
    dispatched = part, fn(part)
    if before is not None:
      yield before
    before = dispatched
  if before is not None:
    yield before


def split(shards: Sequence[range], size: int) -> list[range]:
  """Cuts each shard into parts of at most `size` rows."""
  return [
    range(first, min(first + size, shard.stop))
    for shard in shards
    for first in range(shard.start, shard.stop, size)
  ]


def recorded(
  dispatch: Callable[[range], Mapping[str, jax.Array]],
  rows: Sequence[Record],
  parts: Iterable[range],
) -> Iterator[list[Record]]:
  """Yields the records of each part of the rows.

  Args:
    dispatch: starts the teacher's computation for this process's part of a batch, and returns
      the targets of the whole batch.
    rows: records without targets.
    parts: of the rows; all processes give equally many, range(0) where they have none left.
  """
  for part, targets in overlap(dispatch, parts):
    yield local_records(rows[part.start : part.stop], targets)


def feature_spec(options: RecordsOptions) -> FeatureSpec:
  """The features of the teacher that are recorded."""
  if options.tap_kind == "hidden":
    return FeatureSpec(hidden=options.taps)
  return FeatureSpec(qkv=options.taps)


def manifest_of(
  options: RecordsOptions, corpus: Corpus, teacher: JsonObject, feature_width: int = 0
) -> Manifest:
  """The manifest of a store of these sequences.

  Args:
    options: what is stored.
    corpus: what is recorded.
    teacher: its name and digest (ModelSource.identity); {} for kind "text".
    feature_width: see `Recorder`.
  """
  planned = planned_manifest(
    options,
    corpus.classes,
    len(corpus.rows),
    corpus.positions,
    feature_width,
    labels=corpus.is_task,
  )
  return dataclasses.replace(
    planned,
    teacher=teacher,
    tokenizer=corpus.tokenizer,
    corpus=corpus.digest,
    smoothing=fields.SMOOTHING in corpus.rows[0],
  )


def record_spec(options: RecordsOptions, vocab_size: int) -> RecordSpec:
  """What a record holds of so many classes."""
  c = options
  n = {"text": 0, "dense": vocab_size}.get(c.kind, c.n)
  return RecordSpec(c.kind, n, vocab_size, c.logp, entropy=not c.logprobs)


def planned_manifest(
  options: RecordsOptions,
  vocab_size: int,
  sequences: int,
  positions: int,
  feature_width: int = 0,
  labels: bool = False,
) -> Manifest:
  """The manifest of a store whose teacher and corpus are not known yet.

  Args:
    options: what is stored.
    vocab_size: tokens, or classes of a task.
    sequences: how many there are.
    positions: of a sequence, T.
    feature_width: see `Recorder`.
    labels: the sequences are examples of a task.
  """
  c, stored_taps = options, None
  if c.taps:
    width = c.taps_width or feature_width
    stored_taps = Taps(c.taps, width, TAPS_SEED if c.taps_width else None, c.tap_kind)
  spec = record_spec(c, vocab_size)
  return Manifest(
    kind=spec.kind,
    n=spec.n,
    logp=spec.logp,
    nucleus=1.0 if c.kind == "dense" else c.nucleus,
    vocab_size=vocab_size,
    seq_len=positions,
    teacher={},
    tokenizer="",
    corpus="",
    entropy=spec.entropy,
    sequences_per_shard=c.sequences_per_shard,
    extents=(sequences,),
    taps=stored_taps,
    missing_mass={"topk": c.missing_mass, "dense": "renormalise"}.get(c.kind, "none"),
    temperature=c.temperature,
    labels=labels,
    format_version=format_of(spec.kind, labels),
  )
