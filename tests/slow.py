"""Parameters of which only some are in the fast tests."""

import pytest


def all_but(fast, values):
  """Returns the values as parameters, marked as slow except for those in `fast`."""
  return [v if v in fast else pytest.param(v, marks=pytest.mark.slow) for v in values]
