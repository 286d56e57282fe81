"""The contract of a filter."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator

from distill_jax.filters.samples import Judged, Sample


class Filter(abc.ABC):
  """Tells samples worth training on from others."""

  @abc.abstractmethod
  def select(self, samples: Iterable[Sample]) -> Iterator[Judged]:
    """Judges a stream of samples.

    Args:
      samples: those of one prompt come together.

    Yields:
      Each sample once and in order, with the reason to reject it, or None. It may have more
      fields than before. A reason is a few words, which are counted, and then, after ": ", what
      they are about in this case. `Unjudgeable` says that the sample cannot be judged at all, and
      filter.on_bad decides what follows.
    """


class SampleFilter(Filter):
  """A filter that judges each sample by itself."""

  @abc.abstractmethod
  def reject_reason(self, sample: Sample) -> str | None:
    """Returns the reason to reject a sample, or None; see `Filter.select`."""

  def select(self, samples: Iterable[Sample]) -> Iterator[Judged]:
    return (Judged(sample, self.reject_reason(sample)) for sample in samples)
