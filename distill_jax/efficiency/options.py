"""The settings of `efficiency`: its operating points, and how decoding is timed."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class DecodeTimingOptions:
  """How decoding speed is measured, in the programs that `generate` runs."""

  steps: int = 8  # tokens of a row that one call decodes
  prefill_chunk: int = 64  # tokens of each prompt that are read at once
  cache_dtype: str = ""  # int8 | "", the compute dtype, of the key/value cache


@dataclasses.dataclass(frozen=True)
class EfficiencyOptions:
  """The operating points at which `efficiency` compares teacher and student."""

  context: int = 4096  # positions of a row: its prompt and what is generated
  batch_sizes: tuple[int, ...] = (1, 8, 64, 512)
  chip: str = "v5p"  # v4 | v5e | v5p | v6e | tpu7x
  teacher_dtype: str = "bfloat16"  # float32 | bfloat16 | float8, of its weights as it is served
  student_dtype: str = "bfloat16"
  cache_dtype: str = "bfloat16"  # of both, as they are served
  measure: bool = False  # runs both here too, at this context and these batch sizes
  rounds: int = 5  # of measuring, each with both models
  decode: DecodeTimingOptions = DecodeTimingOptions()  # of measuring
