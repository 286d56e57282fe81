"""The optimizer and the run."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class OptimOptions:
  """AdamW and the learning-rate schedule."""

  peak_lr: float = 3e-4
  schedule: str = "cosine"  # cosine | linear | constant | wsd
  warmup_steps: int = 0
  decay_fraction: float = 0.2  # wsd: the last part of training, in which the rate falls
  end_fraction: float = 0.0  # of the peak, at the end
  plateau_patience: int = 0  # steps without a better loss until the rate halves; 0: never
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  accumulate: int = 1  # microbatches a step
  balance_every: int = 0  # re-balances the losses every so many steps, so that their gradient
  # norms are in the ratio of their weights; 0: never


@dataclasses.dataclass(frozen=True)
class TrainOptions:
  """The length of a run and where its data lies."""

  records: tuple[str, ...] = ()  # stores; several are mixed
  mixture: tuple[float, ...] = ()  # their weights; (): by size
  teachers: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # name: the
  # stores of one more teacher, of the same text, one for each of `records`
  online: bool = False  # the teacher runs in the step, and its records are not read
  steps: int = 1000
  batch_size: int = 8  # sequences a step, over all devices
  chunk: int = 128  # positions of each sequence whose logits exist at once
  checkpoint_every: int = 500
  keep: int = 2  # checkpoints, the last ones
  keep_every: int = 0  # and each whose step is a multiple of this; 0: none
