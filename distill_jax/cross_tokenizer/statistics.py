"""Statistics of rows that were converted to another tokenizer."""

from __future__ import annotations

import dataclasses
from collections import Counter


@dataclasses.dataclass
class Statistics:
  """Sums over rows. `a + b` are those of the rows of both.

  Attributes:
    rows: Number of rows.
    teacher_tokens: Number of tokens of the source.
    teacher_targets: Number of its positions with targets.
    tokens: Number of student tokens that were kept.
    targets: Number of student positions with targets.
    positions: Number of positions of the student rows, padding included.
    cut_tokens: Number of student tokens that did not fit.
    cut_targets: Number of labels with a distribution among them.
    kinds: Number of targets by kind (align.KINDS).
    skipped: Number of segments without student tokens, by reason (align.REASONS).
    cut_chains: Number of targets of exact records whose chain is cut at chains.DEPTH.
    hard_targets: Number of targets that are the hard label.
    lost_mass: Sum over targets of the mass that reached no student token.
    unresolved_mass: See project.Projected, summed over targets.
    opened_mass: See project.Projected, summed over targets.
    beyond_mass: See project.Projected, summed over targets.
  """

  rows: int = 0
  teacher_tokens: int = 0
  teacher_targets: int = 0
  tokens: int = 0
  targets: int = 0
  positions: int = 0
  cut_tokens: int = 0
  cut_targets: int = 0
  kinds: Counter[str] = dataclasses.field(default_factory=Counter)
  skipped: Counter[str] = dataclasses.field(default_factory=Counter)
  cut_chains: int = 0
  hard_targets: int = 0
  lost_mass: float = 0.0
  unresolved_mass: float = 0.0
  opened_mass: float = 0.0
  beyond_mass: float = 0.0

  def __add__(self, other: Statistics) -> Statistics:
    names = [f.name for f in dataclasses.fields(self)]
    return Statistics(**{name: getattr(self, name) + getattr(other, name) for name in names})

  @property
  def misplaced_mass(self) -> float:
    """Estimated mass per target that phi gets and that belongs to a longer student token.

    It is the unresolved mass, times the share that longer tokens get where the next distribution is
    known.
    """
    share = self.beyond_mass / self.opened_mass if self.opened_mass else 0.0
    return self.unresolved_mass * share / max(self.targets, 1)
