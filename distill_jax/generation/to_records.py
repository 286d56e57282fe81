"""Generated texts as a store of records, with the teacher's distributions during generation.

The records of a text are encoded when the text is finished (31.5 instead of 264 bytes per token)
and wait in the log of `journal.SampleJournal`. When all texts of a shard are finished, the shard is
written row by row. So neither memory nor the log grows with the store: memory holds the records of
the texts being generated and of one row, and the log those of one shard.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from distill_jax.config import Config
from distill_jax.data import packing
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import bad_value
from distill_jax.generation.finished import Place
from distill_jax.generation.journal import SampleJournal
from distill_jax.models.loading import ModelSource
from distill_jax.records import bits, codec, example_wire, recording
from distill_jax.records import manifest as manifest_lib
from distill_jax.records.fields import ARGMAX, IDS, LOGP, WEIGHT, Record, RecordSpec
from distill_jax.records.manifest import Manifest
from distill_jax.records.options import RecordsOptions
from distill_jax.records.store import Writer
from distill_jax.runtime import storage
from distill_jax.types import JsonObject

PART = "records"  # of finished.PARTS


@dataclasses.dataclass(frozen=True)
class GeneratedStore:
  """The store at generate.records_dir, written from sampled texts.

  Attributes:
    config: The config; its section `records` determines the format.
    teacher: The teacher.
  """

  config: Config
  teacher: ModelSource

  def check(self) -> None:
    """Raises InputError if generated texts cannot be stored with this config."""
    data, generate, records = self.config.data, self.config.generate, self.config.records
    if data.seq_len < generate.cache_len:
      raise bad_value(
        "data.seq_len",
        data.seq_len,
        f"at least generate.cache_len ({generate.cache_len}), since texts are not cut",
        "Increase it, or reduce generate.cache_len",
      )
    if records.taps:
      raise bad_value(
        "records.taps",
        records.taps,
        "() for generated texts",
        "Leave it empty, or run `record` on the texts",
      )

  @property
  def records(self) -> RecordsOptions | None:
    """Settings for recording the distribution of each token, or None if nothing is recorded."""
    return None if self.config.records.kind == "text" else self.config.records

  def spec(self, vocab_size: int) -> RecordSpec:
    """Returns the contents of a record."""
    return recording.record_spec(self.config.records, vocab_size)


class StoreWriter:
  """A reader of the log that packs prompts with their texts into a store, in order.

  Prompts are not trained on. A row of the store begins with a text, which is never cut.

  Args:
    store: The store.
    tokenizer: The tokenizer.

  Attributes:
    name: The key of its state.
    frontier: The prompt of the first text that is not in a finished shard.
    count: The number of finished shards.
    result: The numbers of sequences, tokens (record_tokens), entries and bytes, after `finish`.
  """

  name = PART

  def __init__(self, store: GeneratedStore, tokenizer: Tokenizer):
    self._store, self._tokenizer = store, tokenizer
    self._spec = store.spec(tokenizer.vocab_size)
    self._seq_len = store.config.data.seq_len
    self._found = manifest_lib.find(store.config.generate.records_dir)  # of an earlier run
    planned = store.config.records.sequences_per_shard(self._seq_len)
    self._rows_per_shard = self._found.sequences_per_shard if self._found else planned
    self.frontier = self.count = 0
    self.result: JsonObject = {}
    self._skip = 0  # the number of texts of the prompt `frontier` that are in finished shards
    self._corpus = ""  # the digest of the first row
    self._row: list[Place] = []  # the texts of the row that is not full yet
    self._row_tokens = 0
    self._rows: list[list[Place]] = []  # the full rows of the next shard
    self._after = (0, 0)  # the prompt of the text after them, and the number of its earlier texts
    self._next = (0, 0)  # the same for all texts
    self._open = contextlib.ExitStack()
    self._writer: Writer | None = None
    self._finished: set[int] = set()  # the first rows of the shards of earlier runs

  def restore(self, state: JsonObject) -> None:
    """Continues from the durable state of an earlier run."""
    self.frontier, self._skip, self.count, self._corpus = (
      state[key] for key in ("frontier", "skip", "count", "corpus")
    )

  def state(self) -> JsonObject:
    """Returns the durable state."""
    return {
      "frontier": self.frontier,
      "skip": self._skip,
      "count": self.count,
      "corpus": self._corpus,
    }

  def encode(
    self, prompt: Sequence[int], tokens: Sequence[int], recorded: Mapping[str, Sequence[np.ndarray]]
  ) -> bytes:
    """Returns the bytes of a text in the log.

    Args:
      prompt: The tokens of the prompt.
      tokens: The tokens of the text.
      recorded: The recorded arrays of each token, by field.
    """
    fields = {"prompt": _to_bytes(prompt), "text": _to_bytes(tokens)}
    if self._spec.recorded:
      arrays = {f.record: np.asarray(recorded[f.name], f.dtype) for f in self._spec.recorded}
      fields |= codec.encode_targets({"mask_T": np.ones(len(tokens), bool), **arrays}, self._spec)
    return example_wire.serialize(fields)

  def add(self, journal: SampleJournal, places: Sequence[Place]) -> None:
    """Takes the texts of the next prompt, and writes a shard when its last row is full."""
    prompt, texts = places[0].prompt, [place for place in places if place.length]
    first = self._skip if prompt == self.frontier else 0
    for n, text in enumerate(texts[first:], first):
      if self._row and self._row_tokens + text.length > self._seq_len:
        self._end_row(journal, (prompt, n))
      self._row.append(text)
      self._row_tokens += text.length
      self._next = prompt, n + 1
      if self._row_tokens == self._seq_len:
        self._end_row(journal, self._next)

  def _end_row(self, journal: SampleJournal, after: tuple[int, int]) -> None:
    """Ends a row.

    Args:
      journal: The log.
      after: The prompt of the next text, and the number of its texts before that one.
    """
    self._rows.append(self._row)
    self._row, self._row_tokens, self._after = [], 0, after
    if len(self._rows) == self._rows_per_shard:
      self._write_shard(journal)

  def _write_shard(self, journal: SampleJournal) -> None:
    """Writes a shard, unless an earlier run has finished it."""
    rows = self._rows
    first = self.count * self._rows_per_shard
    sequences = range(first, first + len(rows))
    writer = self._writer or self._open_writer(journal)
    if sequences.stop > writer.manifest.total:
      writer.lengthen(sequences.stop)
    if sequences.start not in self._finished:
      writer.write_shard(sequences, (self._record(journal, row) for row in rows))
    self.count += 1
    self._rows = []
    self.frontier, self._skip = self._after

  def _open_writer(self, journal: SampleJournal) -> Writer:
    """Opens the store, whose manifest has the digest of the first row."""
    c = self._store.config
    if not self.count:
      self._corpus = recording.text_digest(self._record(journal, self._rows[0]))
    folder = self._open.enter_context(storage.Synced(c.generate.records_dir))
    total = len(self._rows) if self._found is None else self._found.total
    manifest = dataclasses.replace(
      recording.planned_manifest(c.records, self._spec.vocab_size, total, self._seq_len),
      teacher=self._store.teacher.identity if self._store.records else {},
      tokenizer=self._tokenizer.digest,
      corpus=self._corpus,
      sequences_per_shard=self._rows_per_shard,
    )
    self._writer = self._open.enter_context(Writer(folder, manifest))
    self._finished = {shard.first for shard in self._writer.finished()}
    return self._writer

  def _record(self, journal: SampleJournal, row: Sequence[Place]) -> Record:
    """Returns a row of the store."""
    documents, at = [], 0
    targets: Record = {}
    for data in journal.read(row, PART):
      fields = example_wire.parse(data)
      prompt, tokens = (np.frombuffer(fields[k], "<u4").astype(int) for k in ("prompt", "text"))
      mask = np.repeat([False, True], [len(prompt), len(tokens)])
      ids = np.concatenate([prompt, tokens])
      documents.append(packing.MaskedDocument(ids.tolist(), mask.tolist()))
      if self._spec.recorded:
        first = at + len(prompt) - 1  # the position whose label is the first token of the text
        for name, values in _targets(fields, len(tokens), self._spec).items():
          whole = targets.setdefault(
            name, np.zeros((self._seq_len, *values.shape[1:]), values.dtype)
          )
          whole[first : first + len(tokens)] = values
      at += len(mask)
    (packed,) = packing.pack(documents, self._seq_len, None, whole=True)
    return packed.record() | targets

  def finish(self, journal: SampleJournal) -> None:
    """Writes the last shard and completes the store."""
    if self._row:
      self._end_row(journal, self._next)
    if self._rows:
      self._write_shard(journal)
    writer = self._writer or self._open_writer(journal)
    done = writer.complete()
    assert done is not None, "a shard is missing"
    self._corpus = done.corpus
    self.result = _sums(done)

  def close(self) -> None:
    """Releases the store."""
    self._open.close()


def _sums(done: Manifest) -> JsonObject:
  sums = {k: sum(getattr(s, k) for s in done.shards) for k in ("tokens", "entries", "bytes")}
  return {"sequences": done.total, "record_tokens": sums.pop("tokens"), **sums}


def _to_bytes(ids: Sequence[int]) -> bytes:
  return np.asarray(ids, "<u4").tobytes()


def _targets(fields: Mapping[str, bytes], positions: int, spec: RecordSpec) -> Record:
  """Returns the recorded fields of a text from the bytes of `StoreWriter.encode`.

  Numbers that are stored as float16 are rounded; encoding them again gives the same bytes.
  """
  targets = codec.decode_targets(bits.join([fields]), np.ones((1, positions), bool), spec)
  read = {name: x_1[0] for name, x_1 in targets.items()}
  scalars = {f.record: read[f.read] for f in spec.scalars}
  if spec.kind == "labels":
    return scalars
  ids_TK, logp_TK = read[IDS.read], read.get(LOGP.read)
  if spec.kind == "sampled":  # an id with a count of 2 is two points
    counts = np.rint(read[WEIGHT.read] * spec.n).astype(int).ravel()
    ids_TK = np.repeat(ids_TK.ravel(), counts).reshape(positions, spec.n)
    if logp_TK is not None:
      logp_TK = np.repeat(logp_TK.ravel(), counts).reshape(positions, spec.n)
  out = {IDS.record: ids_TK, ARGMAX.record: read[ARGMAX.read]}
  if logp_TK is not None:
    out[LOGP.record] = logp_TK
  return out | scalars
