"""A plot of one number of several variants with several seeds, as an SVG file.

Each variant is a row with a dot for each seed and a bar at their mean. Text and lines are grey, so
that they can be read on a light and on a dark page.
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Mapping, Sequence

from distill_jax.report.axis import axis, label

ROW, LEFT, WIDTH, RIGHT = 26, 170, 420, 80  # pixels


def svg(title: str, values: Mapping[str, Sequence[float]]) -> str:
  """Returns the plot.

  Args:
    title: What the number is, with its unit.
    values: The numbers of each variant, one per seed.
  """
  low, high, ticks = axis([x for row in values.values() for x in row], 5)
  bottom = ROW * (len(values) + 1)

  def x_of(value: float) -> float:
    return LEFT + WIDTH * (value - low) / (high - low)

  def text(x: float, y: float, anchor: str, words: str) -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{html.escape(words)}</text>'

  parts = [text(LEFT, 16, "start", title)]
  for tick in ticks:
    x = x_of(tick)
    parts.append(f'<path d="M{x:.1f} {ROW}V{bottom}" stroke="#999" stroke-opacity=".4"/>')
    parts.append(text(x, bottom + 16, "middle", label(tick, high)))
  for i, (name, row) in enumerate(values.items()):
    y, mean = ROW * (i + 1.5), statistics.mean(row)
    parts.append(text(LEFT - 12, y + 4, "end", name))
    parts += [
      f'<circle cx="{x_of(x):.1f}" cy="{y}" r="4" fill="#3b82f6" fill-opacity=".6"/>' for x in row
    ]
    parts.append(f'<path d="M{x_of(mean):.1f} {y - 8}v16" stroke="#ef6c00" stroke-width="2"/>')
    parts.append(text(LEFT + WIDTH + 12, y + 4, "start", f"{mean:.4g}"))
  size = f'width="{LEFT + WIDTH + RIGHT}" height="{bottom + 26}"'
  font = 'font-family="sans-serif" font-size="13" fill="#888"'
  return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>{"".join(parts)}</svg>\n'
