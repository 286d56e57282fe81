"""Packs the corpus into a store of tokens, on CPUs.

`record` reads the rows of this store by index (data.packed), so it starts and resumes at once, on
any number of processes, and needs little memory; `train` and `evaluate` can read it too. The
corpus is tokenized by a pool of processes (pack.workers), and the bytes of the store do not depend
on their number. When the command is run again, it continues after the last finished shard.

Documents are concatenated and cut at the end of each sequence; chats, and other documents with
data.whole, are packed whole by best fit. With data.buckets, short documents are packed into short
sequences, in a store for each length. With records.heldout_sequences, rows of the held-out split
are packed too, for `record`.

Reads: the corpus and the tokenizer (`data`), and the teacher's tokenizer and chat template.

Writes: a store in the workdir: manifest.json and shards (*.array_record); with data.buckets, a
store in the folder of each length, e.g. WORKDIR/4096. Held-out rows are in WORKDIR/heldout.

Config: teacher, data, pack, records.tokens_per_shard, records.heldout_sequences.

Example:
  distill-jax pack --config=configs/r1_record.py --workdir=gs://bucket/packed
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.data.options import DataOptions
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import bad_value
from distill_jax.models import loading
from distill_jax.models.loading import ModelSource
from distill_jax.records import manifest as manifest_lib
from distill_jax.records import packed_text, planned_stores, recording
from distill_jax.records.options import RecordsOptions
from distill_jax.records.packed_rows import PackedRows
from distill_jax.records.store import Store, open_store
from distill_jax.runtime import distributed, files, storage
from distill_jax.types import JsonObject


def run(config: Config, folder: Path) -> JsonObject:
  """Packs the corpus of a config into `folder`; finished shards are kept.

  Returns:
    sequences, tokens and bytes of all stores together, and packed_now, the number of sequences that
    this call packed. With data.buckets also LENGTH/sequences, the number of sequences of a length.
    Those of held-out rows begin with heldout/, e.g. heldout/sequences.

  Raises:
    InputError: The corpus or the tokenizer cannot be used, or the folder contains other records.
  """
  if config.tasks:
    raise bad_value(
      "tasks", list(config.tasks), "no tasks, because they are not packed", "Remove them"
    )
  if config.data.packed:
    expected = "'' for `pack`, which makes such a store"
    raise bad_value("data.packed", config.data.packed, expected, "Remove the key")
  planned = planned_stores.planned(config)
  teacher = loading.open_source(config.teacher, config.seed)
  sizes = {name: _sizes(c, *make(c, teacher, folder / name)) for name, c in planned.items()}
  return planned_stores.flat(sizes)


def _sizes(config: Config, stores: dict[int, Store], packed_now: int) -> JsonObject:
  named = {config.data.folder_of_length[n]: store.manifest for n, store in stores.items()}
  return planned_stores.sizes(named, ("tokens", "bytes")) | {"packed_now": packed_now}


def make(config: Config, teacher: ModelSource, folder: Path) -> tuple[dict[int, Store], int]:
  """Packs the corpus of a config into `folder` on process 0, while the other processes wait.

  Returns:
    The stores that have rows, by length in ascending order, and the number of sequences that this
    process packed. Without data.buckets, there is one store, in `folder` itself.

  Raises:
    InputError: See `run`.
  """
  packed: list[int] = []
  distributed.run_on_process_0(lambda: packed.append(_pack(config, teacher, folder)))
  return _open(config.data, storage.location(folder)), sum(packed)


def _open(data: DataOptions, folder: str, expected: JsonObject | None = None) -> dict[int, Store]:
  """Opens the stores in a folder that `pack` wrote, by length; those without rows are missing.

  Args:
    data: The config section `data`.
    folder: The path or URL of the folder.
    expected: See `open_store`.
  """
  found = {data.seq_len: folder}
  if data.buckets:
    places = {n: files.join(folder, name) for n, name in data.folder_of_length.items()}
    found = {n: place for n, place in places.items() if manifest_lib.find(place) is not None}
  if not found:
    expected_lengths = f"the lengths of the stores in {folder}"
    raise bad_value("data.buckets", data.buckets, expected_lengths, "Correct them")
  return {n: open_store(place, {**(expected or {}), "seq_len": n}) for n, place in found.items()}


def _pack(config: Config, teacher: ModelSource, folder: Path) -> int:
  data, tokenizer = config.data, checked_tokenizer(config, teacher)
  options = RecordsOptions(kind="text", tokens_per_shard=config.records.tokens_per_shard)
  planned = []
  for length, name in data.folder_of_length.items():
    manifest = dataclasses.replace(
      recording.planned_manifest(options, tokenizer.vocab_size, 1, length),
      tokenizer=tokenizer.digest,
      smoothing=bool(data.trust),
      teacher={},
      heldout_fraction=data.fraction_of_split,
    )
    planned.append(manifest_lib.with_shards_of(storage.location(folder / name), manifest))
  work = corpus.block_tokenizer(data, tokenizer, teacher.pretrained)
  made, packed = packed_text.pack(data, work, planned, folder, config.pack.workers)
  if empty := [length for length in data.buckets if length not in made]:
    print(f"No document needs sequences of {empty} tokens, so no store has them.", file=sys.stderr)
  return packed


def open_rows(
  config: Config, teacher: ModelSource, folder: Path
) -> tuple[dict[int, PackedRows], Tokenizer]:
  """Returns the packed rows of a config's corpus by length, and its tokenizer.

  They are those of data.packed, or are made in `folder`; see `make`. If the stores of data.packed
  hold more than data.sequences, each contributes in proportion to its number of rows.

  Raises:
    InputError: See `run`; or if data.packed names a store of other tokens.
  """
  data, tokenizer = config.data, checked_tokenizer(config, teacher)
  if data.packed:
    expected = {
      "kind": "text",
      "labels": False,
      "tokenizer": tokenizer.digest,
      "heldout_fraction": data.fraction_of_split,
    }
    stores = _open(data, data.packed, expected)
  else:
    stores, _ = make(config, teacher, folder)
  held = sum(length * len(store) for length, store in stores.items())
  limit = min(data.sequences * data.seq_len or held, held)
  rows_of = {length: len(store) * limit // held for length, store in stores.items()}
  return {n: PackedRows(stores[n], rows) for n, rows in rows_of.items() if rows}, tokenizer


def checked_tokenizer(config: Config, teacher: ModelSource) -> Tokenizer:
  """Returns the tokenizer of the corpus.

  Raises:
    InputError: The teacher cannot read its tokens, or data.seq_len is above the teacher's limit.
  """
  data = config.data
  tokenizer = corpus.tokenizer_of(data, teacher.pretrained)
  if not config.records.served:  # a teacher on servers is checked there
    shape = teacher.text_config
    corpus.check(data, tokenizer, shape.vocab_size, shape.max_position_embeddings)
  return tokenizer
