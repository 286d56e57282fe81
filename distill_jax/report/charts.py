"""The dot plots of the report, as HTML elements positioned by percent.

Text keeps its size at any width of the page.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping

from distill_jax.report.axis import axis
from distill_jax.report.numbers import COLUMNS, cell, tone

escape = html.escape


def dots(labels: Mapping[str, str], models: Mapping[str, Mapping[str, float | None]]) -> str:
  """Returns dot plots: one panel for each number, with one dot per model."""
  panels = ""
  for key in ("ce", "kl", "agreement"):
    name, note, write = COLUMNS[key]
    known = [x for m in models.values() if (x := m[key]) is not None and math.isfinite(x)]
    lo, hi, ticks = axis([*known, 0.0] if key == "kl" else known, 3)
    if key == "agreement":
      lo, hi, ticks = 0.0, 1.0, [0.0, 0.5, 1.0]
    places = [_percent_of_axis(t, lo, hi) for t in ticks]
    lines = "".join(f'<i class="grid" style="left:{place:.2f}%"></i>' for place in places)
    rows = ""
    for model, numbers in models.items():
      x = numbers[key]
      track, value = cell(write(x)), ""
      if x is not None and math.isfinite(x):
        left = _percent_of_axis(x, lo, hi)
        track = f'{lines}<i class="dot {tone(model)}" style="left:{left:.2f}%"></i>'
        value = cell(write(x))
      rows += (
        f'<div class="row"><span>{escape(labels[model])}</span><div class="track">{track}</div>'
        f"<b>{value}</b></div>"
      )
    form = "{:.0%}" if key == "agreement" else "{:g}"
    scale = "".join(
      f'<span style="left:{place:.2f}%">{form.format(t)}</span>'
      for t, place in zip(ticks, places, strict=True)
    )
    panels += (
      f"<figure><figcaption>{escape(name)}<small>{escape(note)}</small></figcaption>{rows}"
      f'<div class="row axis"><span></span><div class="track">{scale}</div><b></b></div></figure>'
    )
  return f'<div class="panels">{panels}</div>'


def _percent_of_axis(x: float, lo: float, hi: float) -> float:
  return 100 * (x - lo) / (hi - lo)
