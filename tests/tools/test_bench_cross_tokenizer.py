"""The figures of tools/bench/cross_tokenizer.py, on samples of a known mean and variance."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parents[2] / "tools" / "bench" / "cross_tokenizer.py"


@pytest.fixture(scope="module")
def bench():
  spec = importlib.util.spec_from_file_location("bench_cross_tokenizer", PATH)
  module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def problem():
  """Samples with standard deviation 1 around the exact gradient, of rows of two masses."""
  rng = np.random.default_rng(0)
  exact = rng.normal(size=(40, 50))
  samples = exact + rng.normal(size=(16, 40, 50))
  masses = np.broadcast_to(np.where(np.arange(40) < 10, 0.03, 0.6), (16, 40))
  return samples, masses, exact


def test_bias_is_found_and_absent_without_it(bench):
  samples, _, exact = problem()
  assert abs(bench.bias_over_variance(samples, exact)) < 0.01
  assert bench.bias_over_variance(samples + 0.5, exact) == pytest.approx(0.25, rel=0.05)


def test_rows_are_counted_by_their_mass_and_thresholds_replace_them(bench):
  samples, masses, exact = problem()
  label = -exact
  bins = bench.by_mass(samples, masses, exact, label)
  assert {low: b["share"] for low, b in bins.items() if b["share"]} == {0.02: 0.25, 0.3: 0.75}
  # A sample is the sum of two orthogonal vectors of the same length; half of it is the nearest.
  assert bins[0.3]["one"] == pytest.approx(45, abs=1) and bins[0.3]["label"] == pytest.approx(180)
  assert bins[0.3]["weight"] == pytest.approx(0.5, abs=0.02)
  assert bins[0.3]["mean"] < bins[0.3]["one"] / 3
  limits = bench.by_limit(samples, masses, exact, label)
  assert limits["0"] == limits["0.02"] != limits["0.05"]
  assert limits["1"]["one"] == pytest.approx(180)
  flat = bench.flat({"a": {"b": 1.23456, "c": "x"}})
  assert flat == {"a.b": 1.235, "a.c": "x"}
