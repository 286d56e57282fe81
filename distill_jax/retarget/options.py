"""Config section `retarget`: the records to convert, and the tokenizer to convert them to."""

from __future__ import annotations

import dataclasses

from distill_jax.errors import bad_value


@dataclasses.dataclass(frozen=True)
class RetargetOptions:
  """The records that the command `retarget` converts to a student's tokenizer."""

  records: str = ""
  """Store of records in the teacher's tokens, a path or URL. Its folders `heldout` and those of
  data.buckets are converted too."""
  tokenizer: str = ""
  """Tokenizer of the student: a tokenizer.json, a sentencepiece model, or a folder with one of
  them; a path, a URL or hub:ORG/NAME. "": that of student.source."""
  seq_len: int = 0
  """Length of the sequences of the result. Tokens of a sequence that do not fit are cut, and
  counted. 0: the smallest multiple of 128 that holds every row of a sample of the stores; with
  equal tokenizers, the length of the store. With data.buckets, it is the length of the longest
  sequences, and the others have the same share of it as before.

  For `on_policy`, it is the length of the rows of a teacher with other tokens than the student. 0:
  1.25 times generate.cache_len, rounded up to a multiple of 128."""
  min_mass: float = 0.0
  """Smallest probability mass of a position inside a teacher's token. Where the teacher's tokens
  that begin with its bytes have less mass together, the position gets its label as its target. By
  measurement (docs/cross-tokenizer.md), no threshold above 0 improves the targets."""
  roles: dict[str, str] = dataclasses.field(default_factory=dict)
  """Special tokens of the teacher and the student's tokens with the same role, as texts, e.g.
  {"<|call|>": "<tool_call>"}. Ends of text and of turns, and padding, are matched without it."""
  chat: bool = False
  """True for texts that were generated with generate.chat. As with data.kind="chat", turns are then
  aligned by role, between the texts of the teacher's and the student's chat template."""
  workers: int = 0
  """Number of processes. 0: one per core. The result does not depend on it."""
  slice: str = ""
  """Share of the shards to convert in this call, e.g. "3/16" for those whose number modulo 16 is 3,
  so that several machines can work in one workdir. "": all that are missing, and the statistics."""
  dry_run: bool = False
  """True to print the statistics of a sample of the store, and what the whole would take, and write
  nothing."""

  def __post_init__(self) -> None:
    for name in ("seq_len", "workers"):
      if (n := getattr(self, name)) < 0:
        raise bad_value(f"retarget.{name}", n, "at least 0", "Correct it")
    if not 0 <= self.min_mass <= 1:
      raise bad_value("retarget.min_mass", self.min_mass, "a number from 0 to 1", "Correct it")
