"""Filters for generated samples.

A filter is a module of this package with a frozen dataclass `Filter`, a subclass of `Filter`,
`SampleFilter` or `ComparingFilter` below, whose fields are its config keys. All public modules
except those in SHARED are filters. A sample is a line that `generate` writes, as a dict with an
additional key `of`, the number of samples of its prompt.
"""

from distill_jax.filters._base import ComparingFilter, Filter, SampleFilter
from distill_jax.filters._parallel import judge_in_parallel
from distill_jax.filters.samples import Judged, Sample, Unjudgeable

__all__ = [
  "ComparingFilter",
  "Filter",
  "Judged",
  "Sample",
  "SampleFilter",
  "Unjudgeable",
  "judge_in_parallel",
]

SHARED = ("answers", "pipeline", "samples")
