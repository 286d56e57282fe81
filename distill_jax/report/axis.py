"""The axes of the report's plots: round limits, ticks and their labels."""

from __future__ import annotations

import math
from collections.abc import Sequence


def axis(values: Sequence[float], n: int) -> tuple[float, float, list[float]]:
  """Returns (low, high, about n round ticks) of an axis that includes the values."""
  lo, hi = (min(values), max(values)) if values else (0.0, 1.0)
  if hi - lo <= 1e-6 * abs(hi) or hi == lo:
    half = 0.5 * abs(hi) or 0.5
    lo, hi = lo - half, hi + half
  raw = (hi - lo) / n
  base = 10 ** math.floor(math.log10(raw))
  step = next(s * base for s in (1, 2, 5, 10) if s * base >= raw * (1 - 1e-9))
  first, last = math.floor(lo / step + 1e-9), math.ceil(hi / step - 1e-9)
  ticks = [float(f"{i * step:.10g}") for i in range(first, last + 1)]
  return ticks[0], ticks[-1], ticks


def label(tick: float, high: float) -> str:
  """Returns a tick in a few characters, e.g. "0.05", "12k" or "3e-5".

  Args:
    tick: The tick.
    high: The end of the axis, which decides between the forms.
  """
  for least, unit, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
    if high >= least and tick:
      return f"{tick / unit:g}{suffix}"
  if tick and abs(high) < 0.01:
    mantissa, exponent = f"{tick:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
  return f"{tick:g}"
