"""The config section `efficiency`: its operating points, and how decoding is timed."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class DecodeTimingOptions:
  """The measurement of decoding speed, with the compiled programs of `generate`."""

  steps: int = 8
  """Number of tokens per row that one call decodes."""
  prefill_chunk: int = 64
  """Number of tokens of each prompt that one call reads."""
  cache_dtype: str = ""
  """Dtype of the KV cache: "int8", or "" for the compute dtype. "int8" changes outputs slightly."""


@dataclasses.dataclass(frozen=True)
class EfficiencyOptions:
  """The operating points at which `efficiency` compares teacher and student."""

  context: int = 4096
  """Length of a row in tokens: its prompt and the generated text."""
  batch_sizes: tuple[int, ...] = (1, 8, 64, 512)
  """Numbers of rows that are decoded together."""
  chip: str = "v5p"
  """Chip for which the bounds on speed are computed: "v4", "v5e", "v5p", "v6e" or "tpu7x"."""
  teacher_dtype: str = "bfloat16"
  """Dtype of the teacher's weights when it is served: "float32", "bfloat16" or "float8"."""
  student_dtype: str = "bfloat16"
  """Dtype of the student's weights when it is served: "float32", "bfloat16" or "float8"."""
  cache_dtype: str = "bfloat16"
  """Dtype of the KV cache of both models when served: "float32", "bfloat16" or "float8"."""
  measure: bool = False
  """Also run and time both models on this machine, at this context and these batch sizes."""
  rounds: int = 5
  """Number of timed rounds. Each round runs both models."""
  decode: DecodeTimingOptions = DecodeTimingOptions()
  """Settings of the timed runs."""
