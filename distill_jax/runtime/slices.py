"""Shares of the work of a command, for several machines that work in one workdir."""

from __future__ import annotations

import re

from distill_jax.errors import bad_value

_SLICE = re.compile(r"([0-9]+)/([1-9][0-9]*)")


def parse(key: str, text: str) -> tuple[int, int]:
  """Returns the index and the number of the slices that a config key names; "" is (0, 1).

  Args:
    key: The config key, e.g. "filter.slice".
    text: Its value, e.g. "3/16" for the numbers whose remainder modulo 16 is 3.
  """
  if not text:
    return 0, 1
  match = _SLICE.fullmatch(text)
  if not match or int(match[1]) >= int(match[2]):
    expected = "INDEX/COUNT with an index below the count, e.g. 3/16"
    raise bad_value(key, text, expected, "Correct it")
  return int(match[1]), int(match[2])
