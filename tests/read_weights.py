"""A check of readers that dequantise weights."""

import numpy as np


def check_values_and_slices(weights, true):
  """Asserts that a reader has the float32 tensors of `true`, whole and in random slices."""
  assert weights.names() == true.keys()
  rng = np.random.default_rng(1)
  for name, x in true.items():
    assert weights.shape(name) == x.shape and weights.dtype(name) == np.float32
    np.testing.assert_array_equal(weights.read(name), x)
    for _ in range(4):
      at = tuple(slice(*sorted(rng.integers(0, n + 1, 2))) for n in x.shape)
      np.testing.assert_array_equal(weights.read(name, at), x[at])
