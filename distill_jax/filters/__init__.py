"""Filters of generated samples. One filter a file; the folder is the registry.

A filter is a module with a frozen dataclass `Filter`, a subclass of `Filter` or `SampleFilter`
below, whose fields are its config keys. A sample is an object of the samples.jsonl that `generate`
writes, with `of`, the number of samples that its prompt has.
"""

from distill_jax.filters._base import Filter, SampleFilter
from distill_jax.filters.samples import Judged, Sample, Unjudgeable

__all__ = ["Filter", "Judged", "Sample", "SampleFilter", "Unjudgeable"]

SHARED = ("answers", "samples")
