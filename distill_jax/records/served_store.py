"""Stores of a served teacher's outputs, imported from a dump of its responses."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import bad_value
from distill_jax.models.loading import ModelSource
from distill_jax.records import import_logprobs, recording
from distill_jax.records import manifest as manifest_lib
from distill_jax.records.fields import Record
from distill_jax.records.growing_store import GrowingStore
from distill_jax.records.manifest import Manifest
from distill_jax.runtime import distributed, files, storage
from distill_jax.types import JsonObject


def make(config: Config, teacher: ModelSource, folder: Path) -> tuple[Manifest, int]:
  """Stores the responses in records.logprobs on process 0, one shard at a time.

  Args:
    config: The config.
    teacher: The teacher, for its tokenizer.
    folder: The folder of the store.

  Returns:
    The manifest, and the number of sequences that this process stored.

  Raises:
    InputError: The dump cannot be used.
  """
  tokenizer = corpus.tokenizer_of(config.data, teacher.pretrained)
  planned = recording.planned_manifest(
    config.records, tokenizer.vocab_size, 1, config.data.seq_len, feature_width=0
  )
  teacher_of = identity(config.records.logprobs_format)
  planned = dataclasses.replace(planned, teacher=teacher_of, tokenizer=tokenizer.digest)
  planned = manifest_lib.with_shards_of(storage.location(folder), planned)
  stored: list[int] = []

  def import_rows() -> None:
    with contextlib.closing(GrowingStore(folder, planned, None)) as store:
      for n, row in enumerate(_rows(config, tokenizer)):
        stored.append(not store.stored(n, [row])[0])
        store.add([row])
      store.finish()

  distributed.run_on_process_0(import_rows)
  return manifest_lib.load(storage.location(folder)), sum(stored)


def identity(name: str) -> JsonObject:
  """Returns the name and digest of a teacher behind a server, for a manifest."""
  return {"name": name, "digest": "unknown: behind a server"}


def _rows(config: Config, tokenizer: Tokenizer) -> Iterator[Record]:
  """Reads the responses with their log-probabilities."""
  c = config.records
  if files.info(c.logprobs) is None and not files.listing(c.logprobs, "*.jsonl"):
    expected = "an existing JSONL file or folder of them"
    raise bad_value("records.logprobs", c.logprobs, expected, "Correct the path")
  if c.kind != "topk":
    expected = "'topk' with records.logprobs, because servers return the top log-probabilities"
    raise bad_value("records.kind", c.kind, expected, "Set it to 'topk'")

  def token_id(token: str) -> int | None:
    ids = tokenizer.encode(token)
    return ids[0] if len(ids) == 1 else tokenizer.token_id(token)

  return import_logprobs.sequences(
    c.logprobs,
    c.logprobs_format,
    n=c.n,
    seq_len=config.data.seq_len,
    token_id=token_id,
    vocab_size=tokenizer.vocab_size,
    missing_mass=c.missing_mass,
  )
