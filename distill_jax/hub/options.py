"""Config section `export`: the folder to write."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ExportOptions:
  """Settings of `export`: the folder to write."""

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
  """Maximum size of one weight file of a Hugging Face folder, in bytes."""

  format: str = "hf"
  """Format: "hf" (Hugging Face folder) or "gguf" (folder with one GGUF file, for llama.cpp)."""

  quant: str = ""
  """Numbers of the linear weights of layers. hf: "float" (export.dtype), "int8" or "int4"
  (compressed-tensors). gguf: "F32", "F16", "BF16", "Q8_0" or "Q4_0". "": the grid on which the
  student was trained, if the format has it; else "float" (hf) or "F16" (gguf)."""

  group: int = 0
  """Number of consecutive inputs that share a scale, for "int8" and "int4" of a student that was
  not trained on such a grid. 0: one scale for each output."""

  embedding: str = ""
  """Numbers of the embedding table and the head in a GGUF file, one of the values of export.quant.
  "": "Q8_0" if export.quant is "Q8_0" or "Q4_0", else those of export.quant."""

  target_bytes: int = 0
  """Maximum size of the GGUF file, in bytes: the numbers of each tensor are chosen by the loss that
  they cause on calibration text. 0: export.quant for all tensors."""

  calibration_tokens: int = 2048
  """Number of tokens of `data` on which the loss by rounding is measured. 0: not measured."""

  draft: bool = False
  """True to write a draft model, which speculates for config.teacher in its runtime."""

  deployment: str = ""
  """Path of a deployment.json whose measurements are shown on the model card; "": none."""
