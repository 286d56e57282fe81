"""Finished samples, and their places in the log of `journal.SampleJournal`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

PARTS = ("samples", "samples.rejected", "responses", "records")  # the kinds of bytes of a sample
ALL = -1  # as the index of a sample: all samples of the prompt
SampleKey = tuple[int, int]  # indices of the prompt and the sample


class Finished(NamedTuple):
  """A finished sample, or one that cannot be generated.

  Attributes:
    prompt: The index of the prompt.
    sample: The index of the sample; ALL for a prompt that cannot be used.
    parts: The bytes to keep, by their kind, one of PARTS.
    reason: The reason why the text ended; "" for a rejected one.
    tokens: The number of tokens of the text.
    length: The number of tokens of the prompt and the text, if they are stored as records.
  """

  prompt: int
  sample: int
  parts: dict[str, bytes]
  reason: str = ""
  tokens: int = 0
  length: int = 0


class Place(NamedTuple):
  """The place of a sample in the log.

  Attributes:
    prompt: See Finished.
    sample: See Finished.
    reason: See Finished.
    tokens: See Finished.
    length: See Finished.
    sizes: The number of bytes of each of PARTS.
    checksums: Their CRC-32.
    piece: The number of the piece.
    offset: The offset of the first part in the piece's file.
  """

  prompt: int
  sample: int
  reason: str
  tokens: int
  length: int
  sizes: tuple[int, ...]
  checksums: tuple[int, ...]
  piece: int = -1
  offset: int = 0

  def size(self, part: str) -> int:
    """Returns the number of bytes of a part."""
    return self.sizes[PARTS.index(part)]


@dataclasses.dataclass
class Counts:
  """Numbers of all finished samples.

  Attributes:
    samples: The number of samples.
    rejected: The number of prompts and samples that cannot be generated.
    tokens: The number of generated tokens.
    reasons: The number of samples for each reason why they ended.
  """

  samples: int = 0
  rejected: int = 0
  tokens: int = 0
  reasons: dict[str, int] = dataclasses.field(default_factory=dict)

  def add(self, places: Iterable[Finished | Place]) -> None:
    for place in places:
      self.samples += bool(place.reason)
      self.rejected += not place.reason
      self.tokens += place.tokens
      if place.reason:
        self.reasons[place.reason] = self.reasons.get(place.reason, 0) + 1


class Done(NamedTuple):
  """The samples that are finished.

  Attributes:
    first: The first prompt that is not complete.
    keys: The finished samples of this and later prompts.
  """

  first: int
  keys: frozenset[SampleKey]

  def has(self, key: SampleKey) -> bool:
    """Returns True if a sample is finished."""
    return key[0] < self.first or key in self.keys
