"""The schedule of rounds: when the texts of a round are sampled, and when steps train on them."""

from __future__ import annotations

import dataclasses

from distill_jax.config import Config
from distill_jax.errors import bad_value


@dataclasses.dataclass(frozen=True)
class RoundSchedule:
  """The schedule of a run's rounds.

  Round r has the steps from r * every to (r + 1) * every - 1. Its texts are sampled by the student
  before the first step of round r - lag; those of round 0 before step 0.

  Attributes:
    every: Number of steps of a round.
    lag: See OnPolicyOptions.
    rounds: Number of rounds.
  """

  every: int
  lag: int
  rounds: int

  def round_of(self, step: int) -> int:
    """Returns the round of a step."""
    return step // self.every

  def begins(self, step: int) -> bool:
    """Returns whether a step is the first of its round."""
    return step % self.every == 0

  def sampled_before(self, number: int) -> int:
    """Returns the step before which the texts of a round are sampled."""
    return max(0, number - self.lag) * self.every

  def needed(self, step: int) -> range:
    """Returns the rounds whose texts a step needs: its own and, with a lag, the next one."""
    number = self.round_of(step)
    return range(number, min(number + self.lag + 1, self.rounds))

  def already_sampled(self, step: int) -> list[int]:
    """Returns the rounds whose texts a step needs and an earlier student has sampled.

    A checkpoint before the step needs them: if they were deleted, they could not be sampled again.
    """
    return [number for number in self.needed(step) if self.sampled_before(number) < step]


def check(config: Config) -> None:
  """Checks the keys that determine the schedule.

  Raises:
    InputError: A key cannot be used.
  """
  c = config.on_policy
  if c.lag not in (0, 1):
    raise bad_value("on_policy.lag", c.lag, "0 or 1", "Choose one of them")
  if c.keep_rounds < 0:
    expected = "a positive number, or 0 to keep all"
    raise bad_value("on_policy.keep_rounds", c.keep_rounds, expected, "Correct it")
