"""The config sections `shrink` and `links`: smaller models for `shrink` and `chain` to make."""

from __future__ import annotations

import dataclasses

from distill_jax.efficiency.options import DecodeTimingOptions
from distill_jax.models.options import StudentOptions


@dataclasses.dataclass(frozen=True)
class ShrinkOptions:
  """The smaller model that `shrink` makes from the teacher: its sizes, or a target of a search."""

  layers: int = 0
  """Number of layers. 0: as many as the teacher. A number above the teacher's repeats some layers
  and needs layers_by="even"."""
  layers_by: str = "loss"
  """Choice of the kept layers: "even" (evenly spaced), "ends" (the first and the last), "influence"
  (those that change the residual stream most), or "loss" (removes those whose removal raises the
  loss least)."""
  hidden: int = 0
  """Width of the embedding and the residual stream. 0: as in the teacher."""
  intermediate: int = 0
  """Width of a dense feed-forward layer. 0: as in the teacher."""
  heads: int = 0
  """Number of query heads. 0: as in the teacher, less those of dropped key/value heads."""
  kv_heads: int = 0
  """Number of key/value heads. 0: as in the teacher."""
  kv_heads_by: str = "drop"
  """Reduction of key/value heads: "drop" removes the least important ones together with their
  query heads, "merge" averages neighbours."""
  experts: int = 0
  """Number of routed experts in a layer. 0: as in the teacher."""
  experts_by: str = "drop"
  """Reduction of experts: "drop" removes the least used ones, "merge" averages each of them into
  the most similar expert that is kept."""
  expert_intermediate: int = 0
  """Width of one routed expert. 0: as in the teacher."""
  window: int = 0
  """Number of positions that a layer with sliding-window attention attends to. 0: attention as in
  the teacher."""
  global_every: int = 4
  """Interval of layers with full attention if `shrink.window` is set: every N-th layer. 0: all
  layers have the window."""
  factorise: dict[str, int] = dataclasses.field(default_factory=dict)
  """Ranks of matrices that are replaced by low-rank approximations, by the end of the dotted name,
  e.g. {"down_proj": 64}."""
  sequences: int = 32
  """Number of sequences of `data` on which importance is measured."""
  dir: str = ""
  """Hugging Face folder to write. "": "model" in the workdir."""
  target_params: float = 0.0
  """Target of a search: number of parameters of the student. 0: no such target."""
  target_bytes: float = 0.0
  """Target of a search: bytes of the student's weights in `shrink.dtype`. 0: no such target."""
  target_decode_rate: float = 0.0
  """Target of a search: tokens per second that the student decodes on this machine, one text at a
  time. 0: no such target."""
  steps: int = 100
  """Number of distillation steps of each candidate of a search."""
  context: int = 4096
  """Length in tokens of the text on which `shrink.target_decode_rate` is measured."""
  decode: DecodeTimingOptions = DecodeTimingOptions()
  """Measurement of the decoding speed for `shrink.target_decode_rate`."""
  chunk: int = 128
  """Number of positions of each sequence whose logits are in memory at once during measurements."""
  dtype: str = "bfloat16"
  """Dtype of the weights in the folder: "float32", "bfloat16" or "float16"."""
  shard_bytes: int = 5_000_000_000
  """Maximum size in bytes of one weight file of the folder."""


@dataclasses.dataclass(frozen=True)
class LinkOptions:
  """One student of a chain, distilled from the model before it: see commands/chain.py."""

  student: StudentOptions = StudentOptions()
  """The student. Without a source and a shape it is cut from the model before it, by `shrink`."""
  shrink: ShrinkOptions = ShrinkOptions()
  """Sizes of a student that is cut from the model before it."""
  steps: int = 0
  """Number of training steps. 0: train.steps."""
  peak_lr: float = 0.0
  """Peak learning rate. 0: optim.peak_lr."""
