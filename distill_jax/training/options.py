"""Options of the optimizer and of a training run."""

from __future__ import annotations

import dataclasses
import math

from distill_jax.errors import bad_value


@dataclasses.dataclass(frozen=True)
class OptimOptions:
  """Options of AdamW and the learning-rate schedule."""

  peak_lr: float = 3e-4
  """Peak learning rate, reached after the warm-up."""
  schedule: str = "cosine"
  """Learning-rate schedule after the warm-up: "cosine", "linear", "constant" or "wsd".

  "wsd" (warm-up, stable, decay) stays at the peak and falls linearly at the end.
  """
  warmup_steps: int = 0
  """Number of linear warm-up steps."""
  decay_fraction: float = 0.2
  """Fraction of all steps, at the end, in which the rate of "wsd" falls."""
  end_fraction: float = 0.0
  """Learning rate at the last step, as a fraction of the peak."""
  plateau_patience: int = 0
  """Number of steps without a lower loss after which the rate is halved; 0 for never.

  With `plateau_metric`, the number of evaluations without a lower value of that metric.
  """
  plateau_metric: str = ""
  """Held-out metric that `plateau_patience` follows, e.g. "heldout/loss"; "": the training loss."""
  b1: float = 0.9
  """Adam's decay rate of the first moment."""
  b2: float = 0.95
  """Adam's decay rate of the second moment."""
  eps: float = 1e-8
  """Adam's epsilon."""
  weight_decay: float = 0.1
  """Decoupled weight decay of matrices; norms and biases are not decayed."""
  clip_norm: float = 1.0
  """Global gradient norm above which gradients are clipped; 0 for no clipping."""
  accumulate: int = 1
  """Number of microbatches per step. The gradient is that of the whole batch."""
  balance_every: int = 0
  """Number of steps between re-balancings of the losses; 0 for never.

  Re-balancing scales the losses so that their gradient norms are in the ratio of their weights.
  """

  def __post_init__(self) -> None:
    any_size = "peak_lr", "weight_decay", "clip_norm", "eps", "plateau_patience", "balance_every"
    fractions = "decay_fraction", "end_fraction", "b1", "b2"
    for name in (*any_size, *fractions):
      value = getattr(self, name)
      if not 0 <= value < math.inf or (name in fractions and value > 1):
        expected = "a number from 0 to 1" if name in fractions else "a number of at least 0"
        raise bad_value(f"optim.{name}", value, expected, "Correct it")


@dataclasses.dataclass(frozen=True)
class TrainOptions:
  """Options of a training run: its data, length and checkpoints."""

  records: tuple[str, ...] = ()
  """Folders or URLs of the record stores to train on; several are mixed, also those of different
  sequence lengths.

  With `tasks`: one store for each task, in their order, or () to train on labels alone or from an
  online teacher.
  """
  mixture: tuple[float, ...] = ()
  """Sampling weights of the stores, one each; () for weights in proportion to their sizes. With
  sequences of several lengths, they are the shares of the tokens."""
  teachers: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  """Further recorded teachers, by name: stores of the same text, one for each of `records`."""
  heldout: tuple[str, ...] = ()
  """Folders or URLs of the held-out stores on which the student is evaluated during training.

  With `tasks`: one store for each task, in their order. Tasks trained without records are evaluated
  on their own held-out examples if `eval_every` is above 0, and need no stores.
  """
  heldout_teachers: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  """Held-out stores of the further teachers in `teachers`, one for each of `heldout`."""
  eval_every: int = 0
  """Number of steps between evaluations; there is always one after the last step.

  0: the smallest interval at which evaluation costs at most 2% of the computation.
  """
  eval_benchmarks: tuple[str, ...] = ()
  """Benchmarks, as names in `evals`, that evaluations also run on the student; small ones, because
  their time is not part of the 2%. Their accuracy is the held-out metric "heldout/NAME/accuracy".
  """
  best_metric: str = ""
  """Held-out metric of the best checkpoint, which is kept, e.g. "heldout/loss"; "" for none.

  Accuracy (also of benchmarks) and agreement are maximised, all others are minimised.
  """
  patience: int = 0
  """Number of evaluations without a better `best_metric` after which training ends; 0 for never."""
  online: bool = False
  """True to run the teacher in the training step and ignore its recorded targets.

  The text can be in the tokens of a teacher with another tokenizer than the student's, which is
  that of student.source or retarget.tokenizer.
  """
  steps: int = 1000
  """Number of training steps."""
  batch_size: int = 8
  """Number of sequences per step, over all devices. With stores of several lengths (data.buckets),
  it is that of the longest; each batch has sequences of one length, and all have as many tokens."""
  chunk: int = 128
  """Number of positions per sequence whose logits are in memory at once. With stores of several
  lengths, it is that of the longest; the logits of the others take as much memory."""
  checkpoint_minutes: float = 10.0
  """Minutes between checkpoints, by the clock of process 0; 0 for none by time."""
  checkpoint_every: int = 0
  """Number of steps between additional checkpoints; 0 for none by steps."""
  keep: int = 2
  """Number of most recent checkpoints to keep, besides the best one; at least 1."""
  keep_every: int = 0
  """Interval in steps of additional checkpoints that are all kept; 0 for none."""
  tracker: str = ""
  """Tracker that gets the metrics too, if its package is installed: "trackio", "wandb" or "mlflow";
  "" for none."""

  def __post_init__(self) -> None:
    for name in ("chunk", "keep"):
      if (value := getattr(self, name)) < 1:
        raise bad_value(f"train.{name}", value, "at least 1", "Raise it")
    for name in ("checkpoint_minutes", "checkpoint_every", "keep_every"):
      if (value := getattr(self, name)) < 0:
        raise bad_value(f"train.{name}", value, "a positive number, or 0", "Correct it")
    if not all(0 < weight < math.inf for weight in self.mixture):
      raise bad_value("train.mixture", self.mixture, "positive weights", "Correct it")
