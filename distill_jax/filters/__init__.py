"""Filters for generated samples.

A filter is a module of this package with a frozen dataclass `Filter`, a subclass of `Filter` or
`SampleFilter` below, whose fields are its config keys. All public modules except those in SHARED
are filters. A sample is a line of the samples.jsonl that `generate` writes, as a dict with an
additional key `of`, the number of samples of its prompt.
"""

from distill_jax.filters._base import Filter, SampleFilter
from distill_jax.filters.samples import Judged, Sample, Unjudgeable

__all__ = ["Filter", "Judged", "Sample", "SampleFilter", "Unjudgeable"]

SHARED = ("answers", "samples")
