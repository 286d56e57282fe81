"""Describes the stores of records in a workdir: their settings, sizes, and single sequences.

The numbers of a held-out store begin with heldout/, e.g. heldout/sequences, and those of stores of
data.buckets with a length. The statistics of a store that `retarget` made (retarget.json) begin
with retarget., e.g. retarget.share.exact. inspect.sequence=N shows one sequence token by token.
inspect.verify=True checks the digest of every shard and decodes every record. Shards of earlier
versions have no indices (see records/shard_index.py); they are written.

Without --config it has the config of the run in the workdir, if there is one. It takes any config,
and another command may be using the workdir.

Reads: the stores in the workdir. With inspect.sequence, also the tokenizer of the teacher.

Writes: standard output, and the indices of shards that have none.

Config: inspect, data, teacher.

Example:
  distill-jax inspect --workdir=runs/demo/records --config.inspect.sequence=0
"""

from __future__ import annotations

import sys
from pathlib import Path

from distill_jax.config import Config
from distill_jax.cross_tokenizer import summary
from distill_jax.data import corpus
from distill_jax.errors import InputError, bad_value
from distill_jax.models import loading
from distill_jax.records import describe, manifest, planned_stores, shards
from distill_jax.records.store import Store, open_store
from distill_jax.runtime import storage
from distill_jax.runtime.progress import Progress
from distill_jax.types import JsonObject


def run(config: Config, workdir: Path) -> JsonObject:
  """Returns the description of the stores in `workdir`; see `InspectOptions` for what else it does.

  Raises:
    InputError: The workdir does not contain a store, a record is damaged, or inspect.sequence
      cannot be shown.
  """
  folders = planned_stores.found(storage.location(workdir), config.data)
  written = {
    name: shards.write_missing_indices(folder, manifest.load(folder))
    for name, folder in folders.items()
  }
  stores = {name: open_store(folder) for name, folder in folders.items()}
  if config.inspect.verify:
    for store in stores.values():
      _verify(store)
  if config.inspect.sequence >= 0:
    _show(config, next(iter(stores.values())))
  return planned_stores.flat(
    {
      name: {
        **describe.describe(store),
        **summary.describe(store.folder),
        "indices_written": written[name],
      }
      for name, store in stores.items()
    }
  )


def _verify(store: Store) -> None:
  """Checks every shard and every record of a store."""
  with Progress("verify", len(store), "sequences") as progress:
    store.verify(lambda done, total: progress.add(done - progress.done))


def _show(config: Config, store: Store) -> None:
  """Prints the sequence inspect.sequence."""
  if config.inspect.sequence >= len(store):
    raise bad_value(
      "inspect.sequence",
      config.inspect.sequence,
      f"a number below {len(store)}, the number of sequences in {store.folder}",
      "Choose another sequence",
    )
  if store.manifest.labels:
    raise bad_value(
      "inspect.sequence",
      config.inspect.sequence,
      f"-1, because {store.folder} contains labels of a task and not sequences of text",
      "Remove the key",
    )
  tokenizer = corpus.tokenizer_of(config.data, loading.open_source(config.teacher).pretrained)
  if tokenizer.digest != store.manifest.tokenizer:
    raise InputError(
      f"{store.folder} was recorded with tokenizer {store.manifest.tokenizer[:12]}, but "
      f"{tokenizer.where} is {tokenizer.digest[:12]}. Set data.tokenizer to the tokenizer of the "
      "store."
    )
  print(describe.show(store, config.inspect.sequence, tokenizer.decode), file=sys.stderr)
