"""Recording of a teacher: its corpus, targets of its distributions, and the manifest of the store.

This module does not read configs or corpora; `commands/record.py` does, and job.py writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from distill_jax.errors import InputError, bad_value
from distill_jax.models import runs
from distill_jax.nn import sharding
from distill_jax.nn.sharding import MeshAxes
from distill_jax.records import collate, fields, sampler
from distill_jax.records import manifest as manifest_lib
from distill_jax.records.fields import Record, RecordSpec
from distill_jax.records.manifest import Manifest, Taps, format_of
from distill_jax.records.options import RecordsOptions
from distill_jax.records.sampler import SamplerSpec
from distill_jax.records.store import RecordSource, Store
from distill_jax.types import JsonObject

if TYPE_CHECKING:  # it needs sentencepiece, which a Recorder does not
  from distill_jax.data.tokenizers import Tokenizer

TAPS_SEED = 0  # seed of the fixed projection, stored in the manifest


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The sequences to record: packed text, or the examples of one task.

  Attributes:
    rows: Records without targets: tokens_T, segments_T and mask_T for text; labels_T, mask_T and
      the model's inputs for a task.
    positions: Number of positions of a row, T.
    classes: Number of tokens, or of classes of the task.
    tokenizer: Digest of the tokenizer; "" for a task, whose own digest covers it.
    digest: Digest of the first row of the text, or of the task.
    first_class: First row of the teacher's head for the classes; not 0 only with several tasks.
    heldout_fraction: See Manifest.
    retargeted: See Manifest; for the rows of a student with another tokenizer.
    rollout: See Manifest; for rows that a student wrote, which hold its scalars.
  """

  rows: Sequence[Record]
  positions: int
  classes: int
  tokenizer: str
  digest: str
  first_class: int = 0
  heldout_fraction: float = 0.0
  retargeted: JsonObject = dataclasses.field(default_factory=dict)
  rollout: JsonObject = dataclasses.field(default_factory=dict)

  def read(self, indices: Sequence[int]) -> Sequence[Record]:
    """Returns some rows, in the order of their indices. Packed rows are read at once."""
    rows = self.rows
    return rows.read_many(indices) if isinstance(rows, RecordSource) else [rows[i] for i in indices]

  @property
  def teacher_positions(self) -> int:
    """Number of positions of a row as the teacher reads it."""
    return getattr(self.rows, "teacher_positions", self.positions)  # of StudentRows

  @property
  def is_task(self) -> bool:
    """True for the examples of a task, False for packed text."""
    return "labels_T" in self.rows[0]

  @classmethod
  def of_text(
    cls, rows: Sequence[Record], tokenizer: Tokenizer, positions: int, heldout_fraction: float = 0.0
  ) -> Corpus:
    """Returns the corpus of packed text. The digest covers the first row: a corpus can grow."""
    digest, vocab_size = text_digest(rows[0]), tokenizer.vocab_size
    return cls(rows, positions, vocab_size, tokenizer.digest, digest, 0, heldout_fraction)


def sampling_key(seed: int) -> jax.Array:
  """Returns the key of the sampling offsets of a run with this seed."""
  return runs.keys(seed)["records"]


def text_digest(first: Record) -> str:
  """Returns the digest of a corpus of packed text, from its first row."""
  total = hashlib.sha256()
  for name in fields.TEXT:
    total.update(np.ascontiguousarray(first[name]).tobytes())
  return total.hexdigest()


def stored_targets(
  spec: SamplerSpec,
  key: jax.Array,
  index_B: jax.Array,
  labels_BT: jax.Array,
  *,
  hidden_BTD: jax.Array | None = None,
  head_VD: jax.Array | None = None,
  logits_BTV: jax.Array | None = None,
  chunk: int,
  soft_cap: float | None = None,
  batch_axes: tuple[str, ...] = sharding.BATCH,
  seq_axis: str | None = None,
  vocab_axis: MeshAxes = sharding.VOCAB,
) -> dict[str, jax.Array]:
  """Returns the targets of a teacher's distributions, by field, with the batch axis first.

  Args:
    spec: The targets to compute.
    key: Random key. The sampling offsets of a row depend only on it and the row's index.
    index_B: int32 index of each row in the store.
    labels_BT: The token after each position.
    hidden_BTD: The teacher's hidden states after the final norm.
    head_VD: The teacher's unembedding.
    logits_BTV: The teacher's logits, instead of `hidden_BTD` and `head_VD`.
    chunk: See `sampler.summarise`.
    soft_cap: See `sampler.summarise`.
    batch_axes: See `sampler.summarise`.
    seq_axis: See `sampler.summarise`; only with `hidden_BTD`.
    vocab_axis: See `sampler.summarise`.
  """
  u_BT = offsets(key, index_B, labels_BT.shape[1])
  axes: Any = {"batch_axes": batch_axes, "vocab_axis": vocab_axis}
  if logits_BTV is not None:
    summary = sampler.summarise_logits(logits_BTV, labels_BT, u_BT, spec, chunk=chunk, **axes)
  else:
    assert hidden_BTD is not None and head_VD is not None
    axes["seq_axis"] = seq_axis
    summary = sampler.summarise(
      hidden_BTD, head_VD, labels_BT, u_BT, spec, chunk=chunk, soft_cap=soft_cap, **axes
    )
  return by_field(summary)


def offsets(key: jax.Array, index_B: jax.Array, positions: int) -> jax.Array:
  """Returns the sampling offsets of rows, float32 [B, positions]."""
  return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (positions,)))(index_B)


def by_field(summary: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns the output of `sampler.summarise` under the names of its fields on the device."""
  return {f.device: summary[f.name] for f in fields.PREDICTED if f.name in summary}


def local_records(
  rows: Sequence[Record], targets: Mapping[str, jax.Array], index_B: np.ndarray | None = None
) -> list[Record]:
  """Returns rows of a batch with their targets.

  Args:
    rows: Rows that are on devices of this process, without padding.
    targets: Targets of the global batch, from `TeacherPass.targets`.
    index_B: Indices of the rows in the batch, in order; None for the first rows.
  """
  index_B = np.arange(len(rows)) if index_B is None else index_B
  if not len(index_B):
    return []
  recorded = (*fields.PREDICTED, *fields.TAPPED)
  local = {
    f.record: collate.local_rows(targets[f.device], index_B)
    for f in recorded
    if f.device in targets
  }
  return [
    {name: row[name] for name in fields.WITHOUT_TARGETS if name in row}
    | {name: x[i] for name, x in local.items()}
    for i, row in enumerate(rows)
  ]


def check_same_row(store: Store, index: int, row: Record) -> None:
  """Raises InputError if a recorded sequence differs from a row of this corpus."""
  name = store.manifest.ids_name
  if not np.array_equal(store[index][name], row[name]):
    raise InputError(
      f"{store.folder} was recorded from another corpus: sequence {index} differs. Choose another "
      "folder."
    )


def manifest_of(
  options: RecordsOptions, corpus: Corpus, teacher: JsonObject, feature_width: int = 0
) -> Manifest:
  """Returns the manifest of a store.

  Args:
    options: The options of `records`.
    corpus: The sequences to record.
    teacher: Name and digest of the teacher (ModelSource.identity); {} for kind "text".
    feature_width: See teacher_pass.TeacherPass.
  """
  planned = planned_manifest(
    options,
    corpus.classes,
    len(corpus.rows),
    corpus.positions,
    feature_width,
    labels=corpus.is_task,
  )
  complete = dataclasses.replace(
    planned,
    teacher=teacher,
    tokenizer=corpus.tokenizer,
    corpus=corpus.digest,
    smoothing=fields.SMOOTHING in corpus.rows[0],
    heldout_fraction=corpus.heldout_fraction,
    retargeted=corpus.retargeted,
  )
  return manifest_lib.with_rollout(complete, corpus.rollout)


def record_spec(options: RecordsOptions, vocab_size: int) -> RecordSpec:
  """Returns the contents of a record for a number of tokens or classes.

  Raises:
    InputError: More tokens of "topk" are to be stored than there are.
  """
  c = options
  if c.kind == "topk" and c.n > vocab_size:
    raise bad_value("records.n", c.n, f"at most {vocab_size}, the vocabulary", "Lower it")
  n = {"dense": vocab_size, "labels": 0, "text": 0}.get(c.kind, c.n)
  return RecordSpec(c.kind, n, vocab_size, c.logp, entropy=not (c.logprobs or c.served))


def planned_manifest(
  options: RecordsOptions,
  vocab_size: int,
  sequences: int,
  positions: int,
  feature_width: int = 0,
  labels: bool = False,
) -> Manifest:
  """Returns the manifest of a store whose teacher and corpus are not known yet.

  Args:
    options: The options of `records`.
    vocab_size: Number of tokens, or of classes of a task.
    sequences: Number of sequences.
    positions: Number of positions of a sequence, T.
    feature_width: See teacher_pass.TeacherPass.
    labels: True if the sequences are examples of a task.
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
    sequences_per_shard=c.sequences_per_shard(positions),
    extents=(sequences,),
    taps=stored_taps,
    missing_mass={"topk": c.missing_mass, "dense": "renormalise"}.get(c.kind, "none"),
    temperature=c.temperature,
    labels=labels,
    format_version=format_of(spec.kind, labels),
  )
