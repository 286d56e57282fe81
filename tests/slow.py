"""Parameters of tests that are not in the fast tests."""

import pytest


def param(*values):
  """Returns one parameter, marked as slow."""
  return pytest.param(*values, marks=pytest.mark.slow)


def all_but(fast, values):
  """Returns the values as parameters, marked as slow except for those in `fast`."""
  return [v if v in fast else param(v) for v in values]
