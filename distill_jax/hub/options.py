"""Config section `export`: the Hugging Face folder that is written."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ExportOptions:
  """The Hugging Face folder that `export` writes."""

  dir: str = ""  # the folder to make; it must not exist
  step: int = 0  # of the checkpoint; 0: the last
  evaluation: str = ""  # an evaluation.json whose numbers go on the model card; "": none
  lora: str = "merged"  # of a LoRA run: "merged" weights, "peft", adapters only, or the "base"
  # model without adapters
  dtype: str = "bfloat16"  # of the weights: float32 | bfloat16 | float16
  shard_bytes: int = 5_000_000_000  # at most, of one file of weights
