"""The order of sampling and training: which student samples the texts of a round, and when."""

from __future__ import annotations

import dataclasses

from distill_jax.config import Config
from distill_jax.errors import bad_value


@dataclasses.dataclass(frozen=True)
class Order:
  """The order of a run's rounds.

  Round r has the steps r * every up to (r + 1) * every. Its texts are sampled before the first
  step of round r - lag, by the student of that time; those of round 0 before step 0.

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
    """Returns the rounds whose texts must be there before a step: its own and, with a lag, one."""
    number = self.round_of(step)
    return range(number, min(number + self.lag + 1, self.rounds))

  def carried(self, step: int) -> list[int]:
    """Returns the rounds that a checkpoint before a step needs, sampled by students before it.

    If their texts were deleted, they could not be sampled again.
    """
    return [number for number in self.needed(step) if self.sampled_before(number) < step]


def check(config: Config) -> None:
  """Checks the keys that determine the order.

  Raises:
    InputError: A key cannot be used.
  """
  c = config.on_policy
  if c.lag not in (0, 1):
    raise bad_value("on_policy.lag", c.lag, "0 or 1", "Choose one of them")
  if c.keep_rounds < 0:
    expected = "a positive number, or 0 to keep all"
    raise bad_value("on_policy.keep_rounds", c.keep_rounds, expected, "Correct it")
