"""Measures on a sample of a store what a run would do; see cross_tokenizer/student_lengths.py."""

from __future__ import annotations

import dataclasses
import time

from distill_jax.cross_tokenizer.statistics import Statistics
from distill_jax.cross_tokenizer.student_lengths import blocks
from distill_jax.records import tf_example
from distill_jax.records.manifest import Manifest
from distill_jax.records.store import Store
from distill_jax.retarget.convert import Conversion


@dataclasses.dataclass(frozen=True)
class Measured:
  """The conversion of a sample.

  Attributes:
    statistics: The statistics of its rows.
    bytes: The size of its records.
    seconds: The processor time that it took.
  """

  statistics: Statistics
  bytes: int
  seconds: float


def measure(conversion: Conversion, store: Store, target: Manifest) -> Measured:
  """Converts the sample of a store, and writes nothing.

  Args:
    conversion: How rows are converted.
    store: The store in the teacher's tokens.
    target: The manifest of the store in the student's tokens.
  """
  total, size, start = Statistics(), 0, time.process_time()
  for rows in blocks(len(store), store.manifest.seq_len):
    records, statistics = conversion.rows(store, rows, target.seq_len)
    total += statistics
    for i, record in zip(rows, records, strict=True):
      size += len(tf_example.serialize(tf_example.encode(i, record, target)))
  return Measured(total, size, time.process_time() - start)
