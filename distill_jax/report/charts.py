"""The plots of the report, as HTML elements positioned by percent, with SVG paths for curves.

Text keeps its size at any width of the page, and a plot takes only a few kilobytes.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from distill_jax.report.numbers import COLUMNS, cell, tone

if TYPE_CHECKING:
  from distill_jax.report.html_report import ReportedRun

POINTS = 600  # maximum per curve
escape = html.escape


def dots(labels: Mapping[str, str], models: Mapping[str, Mapping[str, float | None]]) -> str:
  """Returns dot plots: one panel for each number, with one dot per model."""
  panels = ""
  for key in ("ce", "kl", "agreement"):
    name, note, write = COLUMNS[key]
    known = [x for m in models.values() if (x := m[key]) is not None and math.isfinite(x)]
    lo, hi, ticks = _axis([*known, 0.0] if key == "kl" else known, 3)
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
    axis = "".join(
      f'<span style="left:{place:.2f}%">{form.format(t)}</span>'
      for t, place in zip(ticks, places, strict=True)
    )
    panels += (
      f"<figure><figcaption>{escape(name)}<small>{escape(note)}</small></figcaption>{rows}"
      f'<div class="row axis"><span></span><div class="track">{axis}</div><b></b></div></figure>'
    )
  return f'<div class="panels">{panels}</div>'


def _percent_of_axis(x: float, lo: float, hi: float) -> float:
  return 100 * (x - lo) / (hi - lo)


def curves(labels: Mapping[str, str], runs: Mapping[str, ReportedRun]) -> str:
  """Returns training curves of the metrics that all runs have logged, so that they compare."""
  if not runs:
    return '<p class="bad">There are no training curves: no run has a metrics.jsonl.</p>'
  shared = set.intersection(*({k for row in r.rows for k in row} for r in runs.values()))
  kls = sorted(k for k in shared if k.startswith("kl/"))
  keys = [k for k in ("ce", *kls[:1]) if k in shared] or [k for k in ("loss",) if k in shared]
  if not keys:
    return f'<p class="bad">The runs {escape(", ".join(runs))} share no metric.</p>'
  names = {"ce": "Cross-entropy on training data", "loss": "Training loss (differs between runs)"}
  charts = "".join(
    _chart(k, names.get(k, "KL to the teacher on training data"), runs) for k in keys
  )
  legend = "".join(
    f'<span><i class="dot {tone(name)}"></i>{escape(labels.get(name, name))}, '
    f"{len(run.rows):,} steps</span>"
    for name, run in runs.items()
  )
  return f'<p class="legend">{legend}</p><div class="charts">{charts}</div>'


def _chart(key: str, title: str, runs: Mapping[str, ReportedRun]) -> str:
  series = {
    name: np.array([[row["step"], row[key]] for row in run.rows if key in row], float)
    for name, run in runs.items()
  }
  points = np.concatenate(list(series.values()))
  finite = points[np.isfinite(points[:, 1])]
  lo, hi, ticks = _axis(finite[:, 1].tolist(), 4)
  x_lo = float(points[:, 0].min())
  x_hi = float(max(points[:, 0].max(), x_lo + 1))
  x_ticks = [t for t in _axis([x_lo, x_hi], 4)[2] if x_lo <= t <= x_hi and t == int(t)]

  def left(x):
    return (x - x_lo) / (x_hi - x_lo)

  def top(y):
    return (hi - y) / (hi - lo)

  paths, window = "", 1
  for name, curve in series.items():
    width = max(1, len(curve) // 20)
    window = max(window, width)
    for kind, xy in (("raw", curve), ("mean", _smooth(curve, width))):
      xy = xy[:: -(-len(xy) // POINTS)]
      d = _path(1000 * left(xy[:, 0]), 1000 * top(xy[:, 1]))
      paths += f'<path class="{kind} {tone(name)}" d="{d}"/>'
  grid = "".join(f'<i class="grid" style="top:{100 * top(t):.2f}%"></i>' for t in ticks)
  y = "".join(f'<span class="y" style="top:{100 * top(t):.2f}%">{t:g}</span>' for t in ticks)
  x = "".join(f'<span class="x" style="left:{100 * left(t):.2f}%">{t:g}</span>' for t in x_ticks)
  note = f"per step; thick line: mean over {window} steps"
  if broken := len(points) - len(finite):
    note += f"; gaps: {broken} values are NaN or infinite"
  return (
    f"<figure><figcaption>{escape(title)}<small>{escape(note)}</small></figcaption>"
    f'<div class="plot">{grid}<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
    f'aria-label="{escape(title)}">{paths}</svg>{y}{x}</div></figure>'
  )


def _axis(values: Sequence[float], n: int) -> tuple[float, float, list[float]]:
  """Returns (low, high, about n round ticks) of an axis that includes the values."""
  lo, hi = (min(values), max(values)) if values else (0.0, 1.0)
  if hi - lo <= 1e-6 * max(1.0, abs(hi)):
    lo, hi = lo - 0.5, hi + 0.5
  raw = (hi - lo) / n
  base = 10 ** math.floor(math.log10(raw))
  step = next(s * base for s in (1, 2, 5, 10) if s * base >= raw)
  first, last = math.floor(lo / step), math.ceil(hi / step)
  ticks = [round(i * step, 10) for i in range(first, last + 1)]
  return ticks[0], ticks[-1], ticks


def _smooth(points: np.ndarray, width: int) -> np.ndarray:
  """Returns the running mean over `width` values, each at the middle of its window."""
  if len(points) < width:
    return points
  kernel = np.ones(width) / width
  return np.stack([np.convolve(c, kernel, "valid") for c in points.T], 1)


def _path(x: np.ndarray, y: np.ndarray) -> str:
  """Returns an SVG path with a gap where y is not finite."""
  d, pen = [], "M"
  for a, b in zip(x, y, strict=True):
    if not math.isfinite(b):
      pen = "M"
      continue
    d.append(f"{pen}{a:.1f} {b:.1f}")
    pen = "L"
  return "".join(d)
