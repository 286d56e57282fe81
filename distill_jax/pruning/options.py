"""The smaller models that `shrink` and `chain` make."""

from __future__ import annotations

import dataclasses

from distill_jax.efficiency.options import DecodeTimingOptions
from distill_jax.models.options import StudentOptions


@dataclasses.dataclass(frozen=True)
class ShrinkOptions:
  """The smaller model that `shrink` makes of the teacher; 0 is as many as the teacher has."""

  layers: int = 0  # more than the teacher has: some of them twice
  layers_by: str = "loss"  # even | ends | influence | loss, how they are chosen
  hidden: int = 0  # channels of the embedding
  intermediate: int = 0  # channels of a dense feed-forward
  heads: int = 0
  kv_heads: int = 0
  kv_heads_by: str = "drop"  # drop, with their query heads | merge, by the mean of neighbours
  experts: int = 0
  experts_by: str = "drop"  # drop | merge, into the nearest that is kept
  expert_intermediate: int = 0  # channels of one expert
  window: int = 0  # positions that a layer sees, the last ones …
  global_every: int = 4  # … but the last of so many layers, which sees all; 0: none does
  factorise: dict[str, int] = dataclasses.field(default_factory=dict)  # matrix: rank, by the
  # end of its dotted name, as {"down_proj": 64}
  sequences: int = 32  # of data, by which importance is measured
  dir: str = ""  # the Hugging Face folder that is made; "": "model" in the workdir
  target_params: float = 0.0  # search: so many parameters …
  target_bytes: float = 0.0  # … or so many bytes in `dtype` …
  target_decode_rate: float = 0.0  # … or so many tokens a second, one text at a time, here
  steps: int = 100  # of distillation of each candidate
  context: int = 4096  # positions of the text at which target_decode_rate is measured, …
  decode: DecodeTimingOptions = DecodeTimingOptions()  # … and how
  chunk: int = 128  # positions of each sequence whose logits exist at once, in measuring
  dtype: str = "bfloat16"  # of the folder's weights
  shard_bytes: int = 5_000_000_000  # of one file of the folder


@dataclasses.dataclass(frozen=True)
class LinkOptions:
  """One student of a chain, taught by the model before it: see chain.py."""

  student: StudentOptions = (
    StudentOptions()
  )  # without source and shape: made of the model before it, …
  shrink: ShrinkOptions = ShrinkOptions()  # … by these sizes
  steps: int = 0  # 0: train.steps
  peak_lr: float = 0.0  # 0: optim.peak_lr
