"""The stores that `record` and `pack` make: of training rows and of held-out rows.

The training rows are in the workdir itself. With records.heldout_sequences, rows of the held-out
split are in its folder `heldout`. A store of packed text has the same folders, so data.packed names
both texts. With data.buckets, each split has a store of each length in a folder of its name, e.g.
`4096` and `heldout/4096`; a batch of shorter sequences has more of them, with as many tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from distill_jax.config import Config
from distill_jax.data.options import DataOptions
from distill_jax.errors import bad_value
from distill_jax.records import manifest
from distill_jax.records.manifest import Manifest
from distill_jax.runtime import files
from distill_jax.types import JsonObject

HELDOUT = "heldout"


def planned(config: Config) -> dict[str, Config]:
  """Returns the config of each split, by its folder in the workdir; "" is the workdir itself.

  The held-out split is the first to make: it is small, and its errors come at once.

  Raises:
    InputError: The corpus has no held-out rows that could be recorded too.
  """
  c, data = config, config.data
  if c.records.logprobs and data.buckets:
    expected = "() with records.logprobs, whose responses are stored in sequences of one length"
    raise bad_value("data.buckets", data.buckets, expected, "Remove the key")
  if c.records.heldout_sequences == 0:
    return {"": c}
  _check(c)
  packed = files.join(data.packed, HELDOUT) if data.packed else ""
  heldout = dataclasses.replace(
    data, split=HELDOUT, sequences=c.records.heldout_sequences, packed=packed
  )
  return {HELDOUT: dataclasses.replace(c, data=heldout), "": c}


def found(folder: str, data: DataOptions) -> dict[str, str]:
  """Returns the folders of the stores in a workdir, by their paths in it.

  Args:
    folder: The path or URL of the workdir.
    data: The config section `data` of the stores.

  Raises:
    InputError: There is no store.
  """
  names = ["", *map(str, data.buckets)]
  names += [HELDOUT, *(f"{HELDOUT}/{name}" for name in names[1:])]
  folders = {name: files.join(folder, name) if name else folder for name in names}
  stores = {name: at for name, at in folders.items() if manifest.find(at) is not None}
  if not stores:
    manifest.load(folder)  # raises
  return stores


def sizes(stores: Mapping[str, Manifest], keys: Sequence[str]) -> JsonObject:
  """Returns the sizes of the stores of a split together, and LENGTH/sequences of each length.

  Args:
    stores: The manifests, by the folder of their length; see DataOptions.folder_of_length.
    keys: The sums over all shards to return in addition to `sequences`.
  """
  shards = [shard for store in stores.values() for shard in store.shards]
  sums = {key: sum(getattr(shard, key) for shard in shards) for key in keys}
  by_length = {f"{name}/sequences": store.total for name, store in stores.items() if name}
  return {"sequences": sum(store.total for store in stores.values()), **sums, **by_length}


def check_one(data: DataOptions) -> None:
  """Raises InputError if there would be a store for each length, for verbs that train on one."""
  if data.buckets:
    expected = "(), because this verb records one store and trains on it"
    raise bad_value(
      "data.buckets", data.buckets, expected, "Remove the key, or run record and train"
    )


def flat(numbers: Mapping[str, JsonObject]) -> JsonObject:
  """Returns what is known of several stores as one object, with keys such as heldout/sequences.

  Args:
    numbers: What is known of each store, by its folder in the workdir.
  """
  return {
    f"{name}/{key}" if name else key: value
    for name in sorted(numbers)
    for key, value in numbers[name].items()
  }


def _check(config: Config) -> None:
  """Raises InputError if held-out rows cannot be recorded with the training rows."""
  key, heldout, data = "records.heldout_sequences", config.records.heldout_sequences, config.data
  if heldout < 0:
    raise bad_value(key, heldout, "at least 0", "Raise it")
  if config.records.logprobs:
    expected = "0 with records.logprobs, because the responses of a server have no splits"
    action = "Import the held-out responses into another store"
    raise bad_value(key, heldout, expected, action)
  if data.split == HELDOUT:
    expected = f"a split to train on with {key}={heldout}, which records the held-out rows too"
    raise bad_value("data.split", data.split, expected, "Remove one of the two keys")
  if not config.tasks and data.kind != "tfds" and data.heldout_fraction == 0:
    raise bad_value(
      key,
      heldout,
      "0 with data.heldout_fraction=0, which puts every document into both splits",
      "Set data.heldout_fraction, or record the held-out file into another store",
    )
