"""Config section `on_policy`: rounds in which the student is trained on texts that it samples."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class OnPolicyOptions:
  """Options of rounds: the student samples texts, the teacher scores them, the steps train on them.

  Prompts, sampling and decoding are those of `generate`, and the steps those of `train`.
  """

  every: int = 1
  """Number of training steps of a round. They train on texts that the student has sampled before
  the first of them. With 1 and train.online=True, each step trains on texts of the current
  student."""
  lag: int = 0
  """Number of rounds, 0 or 1, by which texts are older than the student that trains on them. 1: the
  texts of a round are sampled before the steps of the round before it, so that a server can score
  them meanwhile."""
  records_fraction: float = 0.0
  """Fraction of the steps, in [0, 1), that train on train.records instead of sampled texts. These
  steps are spread evenly over the run."""
  reward: str = ""
  """Name of the entry of `filters`, of the module math or code, whose verdict (1 or 0) on each text
  is its reward. "": no rewards."""
  max_truncated: float = 1.0
  """Largest fraction of a round's texts that may be cut off at generate.max_new_tokens or
  generate.cache_len; above it, the run stops."""
  max_repetition: float = 0.5
  """Largest fraction of a round's texts that may end in a loop (generate.repetition); above it,
  the run stops."""
  max_drift: float = 0.0
  """Largest mean of |log q(token) in training - log q(token) in sampling|, in nats, before the
  first step of a round; above it, the run stops. 0: no limit."""
  min_overlap: float = 0.0
  """Smallest fraction of the teacher's most probable tokens that must be among the student's;
  below it, the run stops, since the student should be trained on the teacher's texts first. 0: no
  limit."""
  keep_rounds: int = 2
  """Number of rounds whose texts and scores are kept on the disk. 0: all."""
