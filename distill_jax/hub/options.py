"""What `export` writes."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ExportOptions:
  """The Hugging Face folder."""

  dir: str = ""
  step: int = 0  # of the checkpoint; 0: the last
  evaluation: str = ""  # an evaluation.json whose numbers go on the model card
  lora: str = "merged"  # of a run with adapters: merged | peft, they alone | base, all but they
  dtype: str = "bfloat16"
  shard_bytes: int = 5_000_000_000
