"""What `efficiency` compares."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class EfficiencyOptions:
  """What `efficiency` compares the teacher and the student at."""

  context: int = 4096  # positions of a row: what it has read and what it has said
  batch_sizes: tuple[int, ...] = (1, 8, 64, 512)
  chip: str = "v5p"  # v4 | v5e | v5p | v6e | tpu7x
  teacher_dtype: str = "bfloat16"  # float32 | bfloat16 | float8, of its weights as it is served
  student_dtype: str = "bfloat16"
  cache_dtype: str = "bfloat16"  # of both
  measure: bool = False  # runs both here too, at this context and these batch sizes
  rounds: int = 5  # of measuring, each with both models
