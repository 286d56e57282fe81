"""Checks of the fields of a manifest."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from distill_jax.errors import bad_value

if TYPE_CHECKING:
  from distill_jax.records.manifest import Manifest

# Conventions for the mass outside the entries, by kind; the other kinds lack none in expectation.
CONVENTIONS = {"topk": ("tail_bucket", "renormalise"), "dense": ("renormalise",)}
ROLLOUT = ("round", "student", "sampling", "scalars")  # the fields of Manifest.rollout


def check(m: Manifest) -> None:
  """Raises InputError if a field of a manifest is not valid, or if fields do not fit each other."""
  _ = m.spec  # checks its own fields
  _check_distribution(m)
  _check_rollout(m)
  if m.sequences_per_shard < 1:
    raise bad_value("records.sequences_per_shard", m.sequences_per_shard, "at least 1", "Raise it")
  if m.seq_len < 1:
    raise bad_value("seq_len", m.seq_len, "at least 1", "Raise it")
  if min(m.extents, default=0) < 1:
    expected = "numbers of sequences of at least 1"
    raise bad_value("extents", m.extents, expected, "Record a corpus that is not empty")


def _check_distribution(m: Manifest) -> None:
  if m.kind == "dense" and m.n != m.vocab_size:
    expected = f"{m.vocab_size}, the number of classes, for kind 'dense'"
    raise bad_value("n", m.n, expected, "Correct it")
  conventions = CONVENTIONS.get(m.kind, ("none",))
  if m.missing_mass not in conventions:
    expected = f"{' or '.join(map(repr, conventions))} for kind {m.kind!r}"
    raise bad_value("records.missing_mass", m.missing_mass, expected, "Correct it")
  if not 0 < m.temperature < math.inf:
    raise bad_value("records.temperature", m.temperature, "a number above 0", "Correct it")
  if m.temperature != 1.0 and m.kind == "dense":
    raise bad_value(
      "records.temperature",
      m.temperature,
      "1 for kind 'dense', because losses apply their own temperature to dense records",
      "Set it to 1",
    )
  if m.temperature != 1.0 and m.missing_mass == "renormalise":
    raise bad_value(
      "records.temperature",
      m.temperature,
      "1 for missing_mass 'renormalise', because the omitted mass is unknown at others",
      "Set it to 1, or set records.missing_mass=tail_bucket",
    )


def _check_rollout(m: Manifest) -> None:
  if (m.rollout or m.kind == "labels") and m.format_version < 3:
    expected = "3 for rollouts and for kind 'labels'"
    raise bad_value("format_version", m.format_version, expected, "Correct it")
  if not m.rollout:
    return
  if sorted(m.rollout) != sorted(ROLLOUT) or not m.rollout["scalars"]:
    expected = f"the fields {', '.join(ROLLOUT)}, and the names of scalars"
    raise bad_value("rollout", m.rollout, expected, "Correct it")
  if m.labels:
    raise bad_value("rollout", m.rollout, "{} for the labels of a task", "Remove it")
