"""The registration of finished shards: a small file next to each shard, `NAME.json`.

It is written last, when the shard and its index are on disk or uploaded.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence

from distill_jax.records import manifest as manifest_lib
from distill_jax.records.manifest import Manifest, Shard
from distill_jax.runtime import files, json_io

Folder = str | os.PathLike[str]


def name_of(number: int) -> str:
  """Returns the name of the file that registers a shard."""
  return f"{manifest_lib.shard_name(number)}.json"


def find(folder: Folder, m: Manifest, numbers: Sequence[int]) -> dict[int, Shard]:
  """Returns those of some shards that are registered and exist, by first sequence.

  It costs one listing of the folder and a small read per shard.

  Args:
    folder: The path or URL of the store.
    m: The manifest with the planned shards; those that it holds need no registration.
    numbers: The numbers of the shards to look up.
  """
  found, recorded = files.listing(folder, "records-*"), {s.first: s for s in m.shards}
  firsts = {n: m.ranges[n].start for n in numbers}
  known = {first: recorded[first] for first in firsts.values() if first in recorded}
  registered = [n for n in numbers if name_of(n) in found]
  texts = files.read_ranges(
    [(files.join(folder, name_of(n)), 0, found[name_of(n)].size) for n in registered]
  )
  known |= {firsts[n]: _parse(folder, n, x) for n, x in zip(registered, texts, strict=True)}
  return {
    first: shard
    for first, shard in known.items()
    if shard.name in found and found[shard.name].size == shard.bytes
  }


def find_one(folder: Folder, number: int) -> Shard | None:
  """Returns a shard if it is registered and exists, without a listing."""
  path = files.join(folder, name_of(number))
  if files.info(path) is None:
    return None
  shard = _parse(folder, number, files.read(path))
  found = files.info(files.join(folder, shard.name))
  return shard if found is not None and found.size == shard.bytes else None


def write(folder: Folder, number: int, shard: Shard) -> None:
  """Registers a shard."""
  text = json.dumps(dataclasses.asdict(shard)) + "\n"
  files.write(files.join(folder, name_of(number)), text.encode())


def _parse(folder: Folder, number: int, text: bytes) -> Shard:
  path, action = files.join(folder, name_of(number)), "delete it and run `record` again"
  return Shard(**json_io.parse_object(text, path, action))
