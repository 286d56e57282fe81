"""The targets of several teachers on the same text, as one store."""

from __future__ import annotations

from pathlib import Path
from typing import SupportsIndex

import numpy as np

from distill_jax.errors import InputError
from distill_jax.records.fields import UNTAUGHT
from distill_jax.records.store import Store

# What the stores of several teachers agree on: the text, and how their targets are read.
SAME = ("corpus", "tokenizer", "vocab_size", "seq_len", "labels", "temperature", "missing_mass")


class MultiTeacherStore:
  """A random-access source of records that hold the targets of each teacher.

  `store[i]` is the record of the first store; the fields of the others that are not the
  text's own stand beside them as "NAME/FIELD".

  Attributes:
    manifest: the first store's.
    others: the other stores, by the name of their teacher.
  """

  def __init__(self, first: Store, others: dict[str, Store]):
    """Raises: InputError: the stores are not of the same text."""
    self.first, self.others = first, others
    self.manifest = first.manifest
    for name, store in others.items():
      for key in SAME:
        a, b = getattr(self.manifest, key), getattr(store.manifest, key)
        if a != b:
          raise InputError(
            f"the records of teacher {name!r} in {store.folder} have {key}={b!r:.40} and those in "
            f"{first.folder} {a!r:.40}; record the same text with the same settings"
          )
      if len(store) != len(first):
        raise InputError(
          f"the records of teacher {name!r} in {store.folder} are of {len(store)} sequences and "
          f"those in {first.folder} of {len(first)}; record the rest"
        )
      if store.manifest.kind == "text":
        raise InputError(f"the records of teacher {name!r} in {store.folder} hold text alone")

  @property
  def folder(self) -> Path:
    return self.first.folder

  @property
  def digests(self) -> list[str]:
    return [store.manifest.digest for store in (self.first, *self.others.values())]

  def __len__(self) -> int:
    return len(self.first)

  def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
    row = self.first[index]
    out = dict(row)
    ids = self.manifest.ids_name
    for name, store in self.others.items():
      theirs = store[index]
      if not np.array_equal(theirs[ids], row[ids]):
        raise InputError(
          f"sequence {index} of {store.folder} is another text than in {self.folder}; record it "
          "anew"
        )
      out |= {f"{name}/{field}": x for field, x in theirs.items() if field not in UNTAUGHT}
    return out
