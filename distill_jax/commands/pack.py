"""Packs the corpus into a store of tokens, on CPUs.

`record` reads the rows of this store by index (data.packed), so it starts and resumes at once, on
any number of processes, and needs little memory; `train` and `evaluate` can read it too. The
corpus is tokenized by a pool of processes (pack.workers), and the bytes of the store do not depend
on their number. When the command is run again, it continues after the last finished shard.

With records.heldout_sequences, rows of the held-out split are packed too, for `record`.

Reads: the corpus and the tokenizer (`data`), and the teacher's tokenizer and chat template.

Writes: a store in the workdir: manifest.json and shards (*.array_record); another one in
WORKDIR/heldout.

Config: teacher, data, pack, records.tokens_per_shard, records.heldout_sequences.

Example:
  distill-jax pack --config=configs/r1_record.py --workdir=gs://bucket/packed
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.data.options import DataOptions
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import bad_value
from distill_jax.models import loading
from distill_jax.models.loading import ModelSource
from distill_jax.records import manifest as manifest_lib
from distill_jax.records import packed_text, planned_stores, recorder
from distill_jax.records.options import RecordsOptions
from distill_jax.records.packed_rows import PackedRows
from distill_jax.records.store import Store, open_store
from distill_jax.runtime import distributed, storage
from distill_jax.types import JsonObject


def run(config: Config, folder: Path) -> JsonObject:
  """Packs the corpus of a config into `folder`; finished shards are kept.

  Returns:
    sequences, tokens and bytes of the whole store, and packed_now, the number of sequences that
    this call packed. Those of a held-out store begin with heldout/, e.g. heldout/sequences.

  Raises:
    InputError: The corpus or the tokenizer cannot be used, or the folder contains other records.
  """
  if config.tasks:
    raise bad_value("tasks", list(config.tasks), "no tasks, because they are not packed", "Remove")
  if config.data.packed:
    expected = "'' for `pack`, which makes such a store"
    raise bad_value("data.packed", config.data.packed, expected, "Remove the key")
  planned = planned_stores.planned(config)
  teacher = loading.open_source(config.teacher, config.seed)
  sizes = {name: _sizes(*make(c, teacher, folder / name)) for name, c in planned.items()}
  return planned_stores.flat(sizes)


def _sizes(store: Store, packed_now: int) -> JsonObject:
  sums = {k: sum(getattr(s, k) for s in store.manifest.shards) for k in ("tokens", "bytes")}
  return {"sequences": len(store), "packed_now": packed_now, **sums}


def make(config: Config, teacher: ModelSource, folder: Path) -> tuple[Store, int]:
  """Packs the corpus of a config into `folder` on process 0, while the other processes wait.

  Returns:
    The store, and the number of sequences that this process packed.

  Raises:
    InputError: See `run`.
  """
  packed: list[int] = []
  distributed.run_on_process_0(lambda: packed.append(_pack(config, teacher, folder)))
  return open_store(storage.location(folder)), sum(packed)


def _pack(config: Config, teacher: ModelSource, folder: Path) -> int:
  data, tokenizer = config.data, checked_tokenizer(config.data, teacher)
  options = RecordsOptions(kind="text", tokens_per_shard=config.records.tokens_per_shard)
  planned = recorder.planned_manifest(options, tokenizer.vocab_size, 1, data.seq_len)
  planned = dataclasses.replace(
    planned,
    tokenizer=tokenizer.digest,
    smoothing=bool(data.trust),
    teacher={},
    heldout_fraction=data.fraction_of_split,
  )
  planned = manifest_lib.with_shards_of(storage.location(folder), planned)
  work = corpus.block_tokenizer(data, tokenizer, teacher.pretrained)
  return packed_text.pack(data, work, planned, folder, config.pack.workers)[1]


def open_rows(config: Config, teacher: ModelSource, folder: Path) -> tuple[PackedRows, Tokenizer]:
  """Returns the packed rows of a config's corpus, which are made in `folder` without data.packed.

  Raises:
    InputError: See `run`; or if data.packed names a store of other tokens.
  """
  tokenizer = checked_tokenizer(config.data, teacher)
  if config.data.packed:
    expected = {
      "kind": "text",
      "labels": False,
      "tokenizer": tokenizer.digest,
      "seq_len": config.data.seq_len,
      "heldout_fraction": config.data.fraction_of_split,
    }
    store = open_store(config.data.packed, expected)
  else:
    store, _ = make(config, teacher, folder)
  return PackedRows(store, config.data.sequences), tokenizer


def checked_tokenizer(data: DataOptions, teacher: ModelSource) -> Tokenizer:
  """Returns the tokenizer of the corpus.

  Raises:
    InputError: The teacher cannot read its tokens, or data.seq_len is above the teacher's limit.
  """
  tokenizer = corpus.tokenizer_of(data, teacher.pretrained)
  shape = teacher.text_config
  corpus.check(data, tokenizer, shape.vocab_size, shape.max_position_embeddings)
  return tokenizer
