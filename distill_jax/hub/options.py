"""Config section `export`: the Hugging Face folder to write."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ExportOptions:
  """Settings of `export`: the Hugging Face folder to write."""

  dir: str = ""
  """Folder to write: a path or a URL such as gs://bucket/folder. It must not exist."""

  step: int = 0
  """Step of the checkpoint to export; 0: the last one."""

  best: bool = False
  """True to export the best checkpoint by train.best_metric, False for that of `step`."""

  evaluation: str = ""
  """Path of an evaluation.json whose numbers are shown on the model card; "": no numbers."""

  lora: str = "merged"
  """Form of a LoRA run: "merged" weights, "peft" (adapters only) or "base" (without adapters)."""

  dtype: str = "bfloat16"
  """Dtype of the weights: "float32", "bfloat16" or "float16"."""

  shard_bytes: int = 5_000_000_000
  """Maximum size of one weight file, in bytes."""
