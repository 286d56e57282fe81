"""A store that joins the targets of several teachers on the same text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import SupportsIndex

from distill_jax.errors import InputError
from distill_jax.records.fields import WITHOUT_TARGETS, Record
from distill_jax.records.stacked import Stacked
from distill_jax.records.store import Store

# Manifest fields that must be equal in the stores of all teachers.
SAME = ("corpus", "tokenizer", "vocab_size", "seq_len", "labels", "temperature", "missing_mass")


class MultiTeacherStore:
  """A random-access source of records with the targets of several teachers.

  `store[i]` is the record of the first store, with the targets of other teachers added as
  "NAME/FIELD".

  Args:
    first: The first store.
    others: The other stores, by the name of their teacher.

  Attributes:
    first: The first store.
    others: The other stores, by the name of their teacher.
    manifest: The manifest of the first store.

  Raises:
    InputError: The stores are not of the same text.
  """

  def __init__(self, first: Store, others: dict[str, Store]):
    self.first, self.others = first, others
    self.manifest = first.manifest
    for name, store in others.items():
      for key in SAME:
        a, b = getattr(self.manifest, key), getattr(store.manifest, key)
        if a != b:
          raise InputError(
            f"The records of teacher {name!r} in {store.folder} have {key}={b!r:.40}, but those in "
            f"{first.folder} have {a!r:.40}. Record the same text with the same settings."
          )
      if len(store) != len(first):
        raise InputError(
          f"The records of teacher {name!r} in {store.folder} have {len(store)} sequences, but "
          f"those in {first.folder} have {len(first)}. Record the rest."
        )
      if store.manifest.kind == "text":
        raise InputError(
          f"The records of teacher {name!r} in {store.folder} hold only text. Record its targets."
        )

  @property
  def folder(self) -> str | Path:
    """The folder or URL of the first store."""
    return self.first.folder

  @property
  def digests(self) -> list[str]:
    """The digests of all stores."""
    return [store.manifest.digest for store in (self.first, *self.others.values())]

  def __len__(self) -> int:
    return len(self.first)

  def __getitem__(self, index: SupportsIndex) -> Record:
    return self.read_many([index])[0]

  def read_many(self, indices: Sequence[SupportsIndex]) -> Stacked:
    """Returns the records of some indices."""
    arrays, ids = dict(self.first.read_many(indices).arrays), self.manifest.ids_name
    for name, store in self.others.items():
      theirs = store.read_many(indices).arrays
      if arrays and (differs_B := (theirs[ids] != arrays[ids]).any(1)).any():
        raise InputError(
          f"The text of sequence {indices[int(differs_B.argmax())]} differs between "
          f"{store.folder} and {self.folder}. Record again."
        )
      arrays |= {f"{name}/{key}": x for key, x in theirs.items() if key not in WITHOUT_TARGETS}
    return Stacked(arrays)
