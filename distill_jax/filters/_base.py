"""The interfaces of filters."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence

import numpy as np

from distill_jax.filters.samples import Judged, Sample


class Filter(abc.ABC):
  """Selects the samples to train on. The samples of one prompt are judged together.

  A filter is called in several processes, each of which judges other prompts.
  """

  def prepare(self) -> str:
    """Checks what the filter needs, e.g. files, once per run and before any sample is judged.

    Returns:
      An identity of what the filter reads besides its config. Samples that were judged with another
      identity are judged again.

    Raises:
      InputError: The filter cannot use its config or this machine.
    """
    return ""

  @abc.abstractmethod
  def select(self, samples: Sequence[Sample]) -> Iterator[Judged]:
    """Judges the samples of a prompt.

    Args:
      samples: The samples of one prompt that the earlier filters kept; at least one.

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

  def select(self, samples: Sequence[Sample]) -> Iterator[Judged]:
    return (Judged(sample, self.reject_reason(sample)) for sample in samples)


class ComparingFilter(abc.ABC):
  """A filter that compares the samples of all prompts, by a short signature of each.

  Signatures are computed in several processes, for the samples that the other filters kept. Then
  one process compares all of them, so this kind of filter is the last in filter.order.
  """

  def prepare(self) -> str:
    """See `Filter.prepare`."""
    return ""

  @abc.abstractmethod
  def signature(self, sample: Sample) -> np.ndarray:
    """Returns the signature of a sample; the shape and dtype are the same for all samples."""

  @abc.abstractmethod
  def compare(
    self, signatures_NP: np.ndarray, prompts_N: np.ndarray, rows: np.ndarray
  ) -> Iterator[tuple[int, int, float]]:
    """Compares samples.

    Args:
      signatures_NP: The signatures of all samples, in order. They are in a file, mapped into
      memory.
      prompts_N: A hash of the prompt of each sample.
      rows: The samples to compare, in increasing order.

    Yields:
      (sample, other sample, value) for each sample to reject, in order: the sample is rejected
      because of the other one, and the value is for the reason.
    """

  @abc.abstractmethod
  def reason(self, other: str, value: float) -> str:
    """Returns the reason to reject a sample, in the form of `Filter.select`.

    Args:
      other: The name of the other sample, "prompt P, sample S".
      value: The value that `compare` yielded.
    """
