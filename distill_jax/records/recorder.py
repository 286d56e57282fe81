"""Recording of any JAX teacher without a config: `distill_jax.Recorder`.

It uses the functions of the command `record` to reduce and store the teacher's outputs.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from distill_jax.data import model_rows
from distill_jax.errors import InputError, bad_value
from distill_jax.nn import mesh_in_use, sharding
from distill_jax.nn.sharding import MeshAxes
from distill_jax.records import recording
from distill_jax.records.fields import Record
from distill_jax.records.growing_store import GrowingStore
from distill_jax.records.manifest import Manifest
from distill_jax.records.options import RecordsOptions
from distill_jax.records.sampler import SamplerSpec
from distill_jax.runtime import storage

if TYPE_CHECKING:  # it needs sentencepiece, which a Recorder does not
  from distill_jax.data.tokenizers import Tokenizer

Array = jax.Array | np.ndarray
Outputs = Array | Callable[[], Array]  # or a function that computes it, called if it is needed
Targets = dict[str, jax.Array]


class Recorder:
  """Context manager that writes a store of a teacher's outputs, one batch of packed rows at a time.

  On exit the store is finished. If an exception ends the block, finished shards are kept, and a
  later run that adds the same rows from the beginning resumes.

      with Recorder("records", vocab_size=V, seq_len=T, teacher="my teacher") as r:
        for tokens_BT, segments_BT in batches:
          r.add(tokens_BT, segments_BT, hidden=lambda: teacher(tokens_BT), head=head_VD)
      store = distill_jax.open_store("records")

  The targets of a row depend only on the teacher's outputs, the seed and the row's index, not on
  the batch size. Under `jax.set_mesh(mesh)`, outputs may be sharded over `batch_axes` and
  `vocab_axis`. The bytes are those that the command `record` writes for the same rows and outputs.

  Args:
    folder: The folder or URL of the store.
    vocab_size: Number of tokens. Further rows of the head are padding.
    seq_len: Number of tokens per row.
    kind: "sampled": `n` points of systematic sampling per position. "topk": the `n` most probable
      tokens. "dense": all, for small vocabularies. "labels": the label's log-probability only.
      "text": the rows only, without a teacher.
    n: Number of sampled points or of most probable tokens.
    logp: True to store exact log-probabilities of the tokens of "sampled".
    nucleus: Probability mass at which the entries of "topk" are cut; 1 for no cut.
    missing_mass: Treatment of the mass outside the entries of "topk": "tail_bucket" or
      "renormalise".
    temperature: Temperature of the stored distribution.
    teacher: Name of the teacher, or {"name": …, "digest": …}. A store is not continued with
      another teacher. Not used for kind "text".
    tokenizer: The tokenizer, or its digest. Students with another tokenizer cannot use the store.
    sequences: Total number of rows; None if it is not known.
    tokens_per_shard: Number of tokens per file of the store; see RecordsOptions.
    seed: Random seed of the sampling.
    chunk: Number of positions per row whose logits are in memory at once.
    soft_cap: Logits become soft_cap * tanh(logits / soft_cap); None for no cap. Only for `hidden`.
    batch_axes: Mesh axes over which rows are sharded.
    vocab_axis: Mesh axis, or axes, over which the vocabulary is sharded; None if it is not.

  Raises:
    InputError: An argument is not valid, or the folder holds other records.
  """

  def __init__(
    self,
    folder: str | os.PathLike[str],
    *,
    vocab_size: int,
    seq_len: int,
    kind: str = "sampled",
    n: int = 63,
    logp: bool = False,
    nucleus: float = 1.0,
    missing_mass: str = "tail_bucket",
    temperature: float = 1.0,
    teacher: str | Mapping[str, Any] = "",
    tokenizer: str | Tokenizer = "unknown",
    sequences: int | None = None,
    tokens_per_shard: int = 2**20,
    seed: int = 0,
    chunk: int = 128,
    soft_cap: float | None = None,
    batch_axes: tuple[str, ...] = sharding.BATCH,
    vocab_axis: MeshAxes = sharding.VOCAB,
  ):
    if jax.process_count() > 1:
      raise InputError(
        "A Recorder runs in one process. Use the command `record`, which runs in several."
      )
    self._options = RecordsOptions(
      kind=kind,
      n=n,
      logp=logp,
      nucleus=nucleus,
      missing_mass=missing_mass,
      temperature=temperature,
      chunk=chunk,
      tokens_per_shard=tokens_per_shard,
    )
    self._spec = SamplerSpec.of(self._options, vocab_size)
    self._soft_cap = soft_cap
    self._axes: Any = {"batch_axes": batch_axes, "vocab_axis": vocab_axis}
    planned = recording.planned_manifest(self._options, vocab_size, sequences or 1, seq_len)
    self._manifest = dataclasses.replace(
      planned, teacher=self._identity(teacher), tokenizer=_digest(tokenizer)
    )
    self._key = recording.sampling_key(seed)
    self._synced = storage.Synced(folder)
    self._store = GrowingStore(self._synced.__enter__(), self._manifest, sequences)
    self._pending: tuple[list[Record], Targets] | None = None  # rows that are being reduced
    self._added = self._batch_size = 0

  def add(
    self,
    tokens_BT: Array,
    segments_BT: Array | None = None,
    mask_BT: Array | None = None,
    *,
    hidden: Outputs | None = None,
    head: Array | None = None,
    logits: Outputs | None = None,
  ) -> None:
    """Adds rows with the teacher's outputs.

    It returns after dispatching the computation, which runs while the next batch is prepared.

    Args:
      tokens_BT: Token ids.
      segments_BT: Documents of each row, numbered from 1, with 0 for padding; None for one document
        per row.
      mask_BT: True at positions whose label, the next token, is trained on; None for all positions.
        Positions without a next token in their document are always masked.
      hidden: The teacher's hidden states after the final norm, [B, T, D], with `head`; or a
        function that returns them, which is not called for rows that are already stored.
      head: The teacher's unembedding, [V, D].
      logits: The teacher's logits, [B, T, V], instead of `hidden` and `head`; or a function that
        returns them.

    Raises:
      InputError: The shapes do not fit, an output is missing, the store holds other rows, or there
        are more rows than `sequences`.
    """
    rows = self._rows(tokens_BT, segments_BT, mask_BT)
    first, targets = self._added, {}
    if not all(self._store.stored(first, rows)) and self._options.kind != "text":
      self._batch_size = max(self._batch_size, len(rows))
      targets = self._reduce(first, rows, _arrays(hidden, head, logits))
    self._added += len(rows)
    self._finish_pending()
    self._pending = rows, targets

  @property
  def added(self) -> int:
    """Number of added rows, including those that were already stored."""
    return self._added

  def close(self) -> Manifest:
    """Writes the remaining rows and finishes the store. A `with` block calls it on exit.

    Returns:
      The manifest of the store.

    Raises:
      InputError: Fewer rows were added than `sequences`, or none.
    """
    try:
      self._finish_pending()
      return self._store.finish()
    finally:
      self._release()

  def __enter__(self) -> Recorder:
    return self

  def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
    if error is None:
      self.close()
    else:
      self._release()

  def _identity(self, teacher: str | Mapping[str, Any]) -> dict[str, Any]:
    if self._options.kind == "text":
      return {}
    if not teacher:
      raise bad_value("teacher", teacher, "a name, or a dict with a name and a digest", "Pass it")
    return {"name": teacher} if isinstance(teacher, str) else dict(teacher)

  def _rows(
    self, tokens_BT: Array, segments_BT: Array | None, mask_BT: Array | None
  ) -> list[Record]:
    """Returns the rows as records without targets."""
    tokens_BT = np.asarray(tokens_BT)
    segments_BT = np.ones(tokens_BT.shape) if segments_BT is None else np.asarray(segments_BT)
    mask_BT = np.ones(tokens_BT.shape, bool) if mask_BT is None else np.asarray(mask_BT)
    T = self._manifest.seq_len
    shapes = {tokens_BT.shape, segments_BT.shape, mask_BT.shape}
    if len(shapes) > 1 or tokens_BT.ndim != 2 or tokens_BT.shape[1] != T or not len(tokens_BT):
      expected = f"arrays of one shape, [B, {T}]"
      found = tokens_BT.shape, segments_BT.shape, mask_BT.shape
      raise bad_value("tokens_BT, segments_BT, mask_BT", found, expected, "Pack rows of seq_len")
    segments_BT = segments_BT.astype(np.int32)
    mask_BT = mask_BT.astype(bool) & model_rows.label_mask(segments_BT, np.ones_like(mask_BT, bool))
    return [
      {"tokens_T": tokens_T, "segments_T": segments_T, "mask_T": mask_T}
      for tokens_T, segments_T, mask_T in zip(
        tokens_BT.astype(np.int32), segments_BT, mask_BT, strict=True
      )
    ]

  def _reduce(self, first: int, rows: list[Record], outputs: dict[str, Array]) -> Targets:
    """Starts the reduction of the teacher's outputs on the devices."""
    size, T = self._batch_size, self._manifest.seq_len
    labels_BT = np.zeros((size, T), np.int32)
    labels_BT[: len(rows)] = model_rows.next_tokens(np.stack([row["tokens_T"] for row in rows]))
    for name in outputs.keys() - {"head_VD"}:
      x = outputs[name]
      if x.ndim != 3 or x.shape[:2] != (len(rows), T):
        expected = f"an array of shape [{len(rows)}, {T}, …]"
        raise bad_value(name.partition("_")[0], x.shape, expected, "Pass outputs of the same rows")
      if missing := size - len(rows):  # pads to one batch size, to compile once
        outputs[name] = jnp.pad(x, ((0, missing), (0, 0), (0, 0)))
    index_B = np.arange(first, first + size, dtype=np.int32)
    return self._jitted(self._key, index_B, labels_BT, outputs)

  @functools.cached_property
  def _jitted(self) -> Callable[..., Targets]:
    """The jitted `recording.stored_targets`."""

    def reduce(
      key: jax.Array, index_B: jax.Array, labels_BT: jax.Array, outputs: dict[str, Any]
    ) -> Targets:
      return recording.stored_targets(
        self._spec,
        key,
        index_B,
        labels_BT,
        **outputs,
        chunk=self._options.chunk,
        soft_cap=self._soft_cap,
        **self._axes,
      )

    def on_mesh(*args: Any) -> Targets:
      rows = PartitionSpec(self._axes["batch_axes"])
      return mesh_in_use.auto(reduce, rows)(*args)

    return jax.jit(on_mesh)

  def _finish_pending(self) -> None:
    """Stores the rows of the last batch."""
    if self._pending is not None:
      rows, targets = self._pending
      self._pending = None
      self._store.add(recording.local_records(rows, targets))

  def _release(self) -> None:
    self._store.close()
    self._synced.__exit__()


def _digest(tokenizer: str | Tokenizer) -> str:
  digest = tokenizer if isinstance(tokenizer, str) else tokenizer.digest
  if not digest:
    raise bad_value("tokenizer", digest, "a tokenizer or its digest", "Pass it")
  return digest


def _arrays(hidden: Outputs | None, head: Array | None, logits: Outputs | None) -> dict[str, Any]:
  """Returns the given outputs, by name. Functions are called."""
  if (logits is None) == (hidden is None) or (hidden is None) != (head is None):
    outputs = {"hidden": hidden, "head": head, "logits": logits}
    given = " and ".join(name for name, x in outputs.items() if x is not None)
    raise InputError(
      f"Recorder.add got {given or 'no outputs'}; expected hidden and head, or logits. Pass either."
    )
  if logits is not None:
    return {"logits_BTV": logits() if callable(logits) else logits}
  return {"hidden_BTD": hidden() if callable(hidden) else hidden, "head_VD": head}
