"""The texts of each round, and the steps that train on them: a pure function of the config.

Round r has the steps from r * every to (r + 1) * every - 1, and its texts are complete before they
begin. A step trains on texts of one teacher. Teachers take turns in proportion to their prompts,
and the steps of a round are sorted by teacher, so that each teacher is needed once. The prompts of
a teacher are shuffled in each epoch by a permutation that is computed, not stored.

Row i of a teacher's store in a round is one text, given by its prompt and the index of its sample.
So what is in a row does not depend on which rows are already written. Sample indices count on over
the epochs: if a prompt occurs twice in a round, its texts differ.
"""

from __future__ import annotations

import dataclasses
import functools
from fractions import Fraction
from typing import NamedTuple

from distill_jax.config import Config
from distill_jax.errors import bad_value
from distill_jax.on_policy.prompt_index import PromptIndex
from distill_jax.runtime import extras

with extras.needed("train"):
  import grain


class StepRows(NamedTuple):
  """The rows that a step trains on: batch_size of them from `first` on, in a teacher's store.

  Attributes:
    teacher: The name of the teacher: "teacher", or a key of `teachers`.
    first: The first row.
  """

  teacher: str
  first: int


class RoundPlan(NamedTuple):
  """The plan of a round.

  Attributes:
    steps: What each step of the round trains on, in order; None for a step that trains on
      train.records.
    rows: The rows of each teacher's store, as (prompt, sample) with the number of the prompt in its
      files. Teachers are in the order of their steps.
  """

  steps: tuple[StepRows | None, ...]
  rows: dict[str, list[tuple[int, int]]]


@dataclasses.dataclass(frozen=True)
class Plan:
  """The plan of a run.

  Attributes:
    prompts: The prompts.
    seed: The seed of the order of the prompts.
    steps: The number of training steps.
    every: The number of steps of a round.
    batch_size: The number of texts of a step.
    samples: The number of texts of a prompt in a step, which divides batch_size.
    records_fraction: The fraction of steps that train on train.records.
  """

  prompts: PromptIndex
  seed: int
  steps: int
  every: int
  batch_size: int
  samples: int = 1
  records_fraction: float = 0.0

  @classmethod
  def from_config(cls, config: Config, prompts: PromptIndex) -> Plan:
    """Returns the plan of a run. Call `check` before the prompts are read."""
    train, c = config.train, config.on_policy
    samples = config.generate.samples
    return cls(
      prompts, config.seed, train.steps, c.every, train.batch_size, samples, c.records_fraction
    )

  @property
  def rounds(self) -> int:
    """The number of rounds."""
    return -(-self.steps // self.every)

  def of_round(self, n: int) -> RoundPlan:
    """Returns the plan of round `n`, from 0. It takes time and memory for this round only."""
    numbers = range(n * self.every, min((n + 1) * self.every, self.steps))
    sampled = [i for i in numbers if not uses_records(i, self.records_fraction)]
    turns = sorted(self._turns[i - records_before(i, self.records_fraction)] for i in sampled)
    rows: dict[str, list[tuple[int, int]]] = {}
    at = {}
    for step, (teacher, turn) in zip(sampled, turns, strict=True):
      name = self._teachers[teacher]
      own = rows.setdefault(name, [])
      at[step] = StepRows(name, len(own))
      own += self._rows(name, turn)
    return RoundPlan(tuple(at.get(i) for i in numbers), rows)

  def _rows(self, teacher: str, turn: int) -> list[tuple[int, int]]:
    """Returns the rows of a step, by its number `turn` among all steps of its teacher."""
    size = self.batch_size // self.samples
    out = []
    for place in range(turn * size, (turn + 1) * size):
      number = self.prompts.number(teacher, int(self._orders[teacher][place]))
      epoch = place // self.prompts.counts[teacher]
      first = epoch * self.samples
      out += [(number, sample) for sample in range(first, first + self.samples)]
    return out

  @functools.cached_property
  def _teachers(self) -> list[str]:
    return [name for name, count in self.prompts.counts.items() if count]

  @functools.cached_property
  def _orders(self) -> dict[str, grain.MapDataset]:
    """The prompts of each teacher, as indices among them, in the order of the run."""
    return {
      name: grain.MapDataset.range(self.prompts.counts[name]).shuffle(seed=self.seed).repeat()
      for name in self._teachers
    }

  @functools.cached_property
  def _turns(self) -> grain.MapDataset:
    """The number of the teacher, and of its step, of each step that trains on sampled texts."""
    turns = [
      grain.MapDataset.range(self.steps + 1).map(functools.partial(_turn, i))
      for i in range(len(self._teachers))
    ]
    if len(turns) == 1:
      return turns[0]
    weights = [self.prompts.counts[name] for name in self._teachers]
    return grain.MapDataset.mix(turns, weights=weights)


def check(config: Config) -> None:
  """Checks the keys that determine the plan, and the mesh, before the prompts are read.

  Raises:
    InputError: A key cannot be used.
  """
  c, size, samples = config.on_policy, config.train.batch_size, config.generate.samples
  for key, value in (
    ("train.steps", config.train.steps),
    ("train.batch_size", size),
    ("on_policy.every", c.every),
    ("generate.samples", samples),
  ):
    if value < 1:
      raise bad_value(key, value, "a positive integer", "Increase it")
  if size % samples:
    expected = f"a multiple of generate.samples ({samples}), the texts of a prompt in a step"
    raise bad_value("train.batch_size", size, expected, "Change one of them")
  if not 0 <= c.records_fraction < 1:
    expected = "at least 0 and less than 1"
    raise bad_value("on_policy.records_fraction", c.records_fraction, expected, "Correct it")
  if config.mesh.context != 1:
    expected = "1, because texts are sampled without the axis context"
    raise bad_value("mesh.context", config.mesh.context, expected, "Set it to 1")


def uses_records(step: int, fraction: float) -> bool:
  """Returns True if a step trains on train.records; these steps are spread evenly over the run."""
  return records_before(step + 1, fraction) > records_before(step, fraction)


def records_before(step: int, fraction: float) -> int:
  """Returns the number of steps before `step` that train on train.records."""
  return int(step * Fraction(fraction).limit_denominator(10**6))  # 0.1 as 1/10, so exactly


def _turn(teacher: int, turn: int) -> tuple[int, int]:
  return teacher, int(turn)
