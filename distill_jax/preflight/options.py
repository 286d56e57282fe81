"""Config section `preflight`: the program to compile and the TPUs to compile it for."""

from __future__ import annotations

import dataclasses

from distill_jax.errors import bad_value


@dataclasses.dataclass(frozen=True)
class PreflightOptions:
  """Settings of `preflight`. The flags --topology, --num_slices and --verb set these keys."""

  topology: str = ""
  """TPU topology to compile for, as CHIP:SHAPE, e.g. "v5p:4x4x4"."""

  num_slices: int = 1
  """Number of slices with this topology, connected by the data center network."""

  verb: str = "train"
  """Command to estimate: "train" or "record", whose step is compiled; "generate", by formula; or
  "on_policy", whose training step is compiled, with generation and scoring by formula."""

  dollars_per_chip_hour: float = 0.0
  """Price of a chip for one hour, for the cost of the run. 0: the cost is not printed."""

  document_tokens: int = 0
  """Tokens of a document, for the operations of attention, which skips the blocks between the
  documents of a row. If lengths vary: the mean length of the documents of all tokens, i.e. the sum
  of the squared lengths divided by the sum of the lengths. 0: every row is one document."""

  def __post_init__(self) -> None:
    if (n := self.document_tokens) < 0:
      action = "Set the mean length of documents, or 0"
      raise bad_value("preflight.document_tokens", n, "at least 0", action)
