"""The texts of rows, and the records of rows whose texts are scored.

A row may hold several documents, which do not see each other. Each of them is one text, from its
first token to its last label; a document without labels is not scored.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from distill_jax.errors import InputError
from distill_jax.records import import_logprobs
from distill_jax.records.fields import Record, RecordSpec
from distill_jax.records.import_logprobs import Document
from distill_jax.served.requests import Text


class Place(NamedTuple):
  """A text of a row.

  Attributes:
    start: The index of its first token in the row.
    text: The text.
  """

  start: int
  text: Text

  @property
  def positions(self) -> slice:
    """The positions of the row whose next token is scored."""
    return slice(self.start + self.text.first - 1, self.start + len(self.text.tokens) - 1)


def texts_of(row: Record) -> list[Place]:
  """Returns the texts of a row that have labels.

  Args:
    row: tokens_T, segments_T (documents, numbered from 1) and mask_T (True at positions whose next
      token is a label).

  Raises:
    InputError: A label is the first token of a document.
  """
  tokens_T, segments_T = row["tokens_T"], row["segments_T"]
  at = np.flatnonzero(row["mask_T"])
  if not np.array_equal(segments_T[at], np.append(segments_T, 0)[at + 1]):
    raise InputError(
      "A row has a label that is not in the document of the token before it. Record another corpus."
    )
  places = []
  for segment in np.unique(segments_T[at]):
    own = at[segments_T[at] == segment]
    start = int(np.argmax(segments_T == segment))
    text = Text(tokens_T[start : own[-1] + 2].tolist(), int(own[0]) + 1 - start)
    places.append(Place(start, text))
  return places


def with_targets(row: Record, scored: Iterable[tuple[Place, Document]], spec: RecordSpec) -> Record:
  """Returns a row with the targets at its labels.

  Args:
    row: The row.
    scored: Its texts, each with the scored tokens.
    spec: The contents of a record.
  """
  mask_T = row["mask_T"]
  sizes = {"T": len(mask_T), "N": spec.n}
  targets = {
    f.record: np.full([sizes[axis] for axis in f.axes], f.empty, f.dtype) for f in spec.recorded
  }
  for place, document in scored:
    for t, (token, top) in enumerate(document, place.positions.start):
      if mask_T[t] and top:
        import_logprobs.set_targets(targets, t, token, top, spec.n)
  return row | targets
