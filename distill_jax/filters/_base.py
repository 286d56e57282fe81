"""The interface of a filter."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator

from distill_jax.filters.samples import Judged, Sample


class Filter(abc.ABC):
  """Selects the samples to train on."""

  @abc.abstractmethod
  def select(self, samples: Iterable[Sample]) -> Iterator[Judged]:
    """Judges a stream of samples.

    Args:
      samples: The samples, those of each prompt in succession.

    Yields:
      Each sample in order, with the reason to reject it or None to keep it. The filter may add
      fields to a sample. A reason has the form "CATEGORY" or "CATEGORY: DETAIL"; the categories are
      counted. The reason is an `Unjudgeable` if the sample cannot be judged; filter.on_bad
      determines what happens then.
    """


class SampleFilter(Filter):
  """A filter that judges each sample independently of the others."""

  @abc.abstractmethod
  def reject_reason(self, sample: Sample) -> str | None:
    """Returns the reason to reject a sample, or None to keep it; see `Filter.select`."""

  def select(self, samples: Iterable[Sample]) -> Iterator[Judged]:
    return (Judged(sample, self.reject_reason(sample)) for sample in samples)
