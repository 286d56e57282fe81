"""The curves of runs over their steps, as small multiples: a panel for each metric, one x axis.

The size of the page does not grow with the length of a run. A curve has at most 2 * BUCKETS points
for the least and the greatest value of each bucket of rows, so that no spike is lost, and BUCKETS
points for the running mean. With about 11 bytes per point, that is 3.3 kB per curve: 15 panels of
three runs take at most 150 kB.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from distill_jax.report.axis import axis, label
from distill_jax.report.numbers import tone
from distill_jax.report.runs import ReportedRun
from distill_jax.training.best import PREFIX

BUCKETS = 100  # per curve; a panel is about 300 pixels wide
WINDOWS = 20  # the running mean covers one in WINDOWS of the rows
escape = html.escape

TITLES = {
  "ce": ("Cross-entropy", "nats per token"),
  "loss": ("Loss", "weighted sum of all losses"),
  "learning_rate": ("Learning rate", ""),
  "grad_norm": ("Gradient norm", "before clipping"),
  "tokens_per_second": ("Tokens per second", "of all devices"),
  "goodput": ("Goodput", "fraction of the time spent in steps"),
}
# Metrics of the student's own texts; "/TEACHER" may follow. See on_policy/diagnosis.py and
# on_policy/round_counts.py; the entropies are of every step.
OWN = {
  "reverse_kl": ("Reverse KL", "KL(student || teacher), nats per token"),
  "overlap": ("Overlap", "share of the teacher's top tokens among the student's"),
  "student_mass": ("Student's mass", "probability of the teacher's top tokens"),
  "teacher_mass": ("Teacher's mass", "probability of the student's top tokens"),
  "drift": ("Drift", "mean |log q in training - log q in sampling|, nats"),
  "entropy": ("Entropy of the student", "nats per token"),
  "teacher_entropy": ("Entropy of the teacher", "nats per token"),
  "text_length": ("Length of texts", "mean, in tokens"),
  "text_length_p90": ("Length of texts, 90% quantile", "in tokens"),
  "truncated": ("Truncated", "fraction of the texts"),
  "repetition": ("Ended in a loop", "fraction of the texts"),
  "reward": ("Reward", "mean over the texts"),
}
ROUND = "round"  # the metric of all runs of on_policy
CLOCK = ("tokens_per_second", "goodput")  # 0 in the first row of a process
SMOOTH = ("learning_rate", "goodput")  # drawn as one line


class Panel(NamedTuple):
  """A panel: the curves of one metric.

  Attributes:
    title: The displayed name.
    note: The small print.
    curves: By run, an array [n, 2] of steps and values.
    is_smooth: True to draw one line, without a running mean.
  """

  title: str
  note: str
  curves: dict[str, np.ndarray]
  is_smooth: bool = False


def sections(labels: Mapping[str, str], runs: Mapping[str, ReportedRun]) -> list[tuple[str, str]]:
  """Returns the (title, HTML) of each section with curves."""
  runs = {name: run for name, run in runs.items() if run.series}
  if not runs:
    return [("Training", '<p class="bad">There are no training curves: no run has begun.</p>')]
  groups = {
    "Held-out data during training": list(_losses(labels, runs, PREFIX)),
    "Student and teacher on the student's own texts": list(_own(runs)),
    "Training": [*_losses(labels, runs, ""), *_weights(runs)],
    "Optimisation and speed": [_plain(runs, key) for key in ("learning_rate", "grad_norm", *CLOCK)],
  }
  last = max(run.done for run in runs.values()) - 1
  drawn = []
  for title, panels in groups.items():
    figures = "".join(_draw(panel, last) for panel in panels if panel.curves)
    if figures:
      drawn.append((title, _legend(labels, runs) + f'<div class="charts">{figures}</div>'))
  return drawn or [("Training", '<p class="bad">The runs have no metric that can be drawn.</p>')]


def _legend(labels: Mapping[str, str], runs: Mapping[str, ReportedRun]) -> str:
  entries = "".join(
    f'<span><i class="dot {tone(name)}"></i>{escape(labels.get(name, name))}, '
    f"{run.done:,} steps</span>"
    for name, run in runs.items()
  )
  return (
    f'<p class="legend">{entries}<span>thin: single steps; thick: mean over 1/{WINDOWS} of them'
    "</span></p>"
  )


def _curves(runs: Mapping[str, ReportedRun], key: str) -> dict[str, np.ndarray]:
  """Returns the curves of a metric with at least one finite value."""
  found = {name: run.series[key] for name, run in runs.items() if key in run.series}
  if key in CLOCK:
    found = {name: xy[xy[:, 1] > 0] for name, xy in found.items()}
  return {name: xy for name, xy in found.items() if np.isfinite(xy[:, 1]).any()}


def _plain(runs: Mapping[str, ReportedRun], key: str) -> Panel:
  return Panel(*TITLES[key], _curves(runs, key), key in SMOOTH)


def _keys(runs: Mapping[str, ReportedRun]) -> list[str]:
  return list(dict.fromkeys(key for run in runs.values() for key in run.series))


def _losses(
  labels: Mapping[str, str], runs: Mapping[str, ReportedRun], prefix: str
) -> Iterator[Panel]:
  """Yields panels of the cross-entropy, the KLs, every loss by its name, and their sum."""
  keys = _keys(runs)
  kls = sorted(k.removeprefix(prefix) for k in keys if k.startswith(f"{prefix}kl"))
  for name in ["ce", *kls]:
    title = TITLES.get(name) or (_divergence(name), "nats per token")
    yield Panel(*title, _curves(runs, prefix + name))
  for name in [key.removeprefix("weight/") for key in keys if key.startswith("weight/")]:
    curves = _curves(runs, prefix + name)
    yield Panel(f"Loss {name}", _weight(labels, runs, name, curves), curves)
  yield Panel(*TITLES["loss"], _curves(runs, f"{prefix}loss"))


def _own(runs: Mapping[str, ReportedRun]) -> Iterator[Panel]:
  """Yields panels of the metrics of the student's own texts, by teacher."""
  runs = {name: run for name, run in runs.items() if ROUND in run.series}
  for kind, (title, note) in OWN.items():
    for key in _keys(runs):
      if key.partition("/")[0] == kind:
        teacher = key.partition("/")[2]
        shown = f"{title}, {teacher}" if teacher not in ("", "teacher") else title
        is_sparse = not kind.endswith("entropy")
        yield Panel(shown, note, _curves(runs, key), is_sparse)


def _divergence(key: str) -> str:
  """Returns the title of a metric such as "kl/teacher" or "kl_at_2/teacher"."""
  kind, _, teacher = key.partition("/")
  at = kind.partition("_at_")[2]
  shown = "the teacher" if teacher in ("", "teacher") else teacher
  return f"KL to {shown}" + (f" at temperature {at}" if at else "")


def _weight(
  labels: Mapping[str, str],
  runs: Mapping[str, ReportedRun],
  loss: str,
  drawn: Mapping[str, np.ndarray],
) -> str:
  """Returns the kind and the weight of a loss in words, for each run if they differ."""
  words = {}
  for name in drawn:
    kind = runs[name].config.get("losses", {}).get(loss, {}).get("loss", "")
    xy = runs[name].series.get(f"weight/{loss}")
    weight = "" if xy is None else f"weight {xy[0, 1]:.3g}" if _is_constant(xy) else "weight varies"
    words[name] = " ".join(filter(None, (kind, weight)))
  if len(set(words.values())) == 1:
    return next(iter(words.values()))
  return "; ".join(f"{labels.get(name, name)}: {w}" for name, w in words.items())


def _is_constant(xy: np.ndarray) -> bool:
  return bool(np.ptp(xy[:, 1]) == 0)


def _weights(runs: Mapping[str, ReportedRun]) -> Iterator[Panel]:
  """Yields panels of the weights that change during a run."""
  for key in _keys(runs):
    curves = _curves(runs, key) if key.startswith("weight/") else {}
    if not all(map(_is_constant, curves.values())):
      yield Panel(f"Weight of {key.removeprefix('weight/')}", "", curves, True)


def _draw(panel: Panel, last: int) -> str:
  """Returns a panel whose x axis ends at the step `last`."""
  points = np.concatenate(list(panel.curves.values()))
  finite = points[np.isfinite(points[:, 1]), 1]
  lo, hi, ticks = axis(finite.tolist(), 3)
  x_hi = max(last, 1)
  x_ticks = [t for t in axis([0, x_hi], 4)[2] if t <= x_hi and t == int(t)]

  def path(kind: str, name: str, xy: np.ndarray) -> str:
    d = _path(1000 * xy[:, 0] / x_hi, 1000 * (hi - xy[:, 1]) / (hi - lo))
    return f'<path class="{kind} {tone(name)}" d="{d}"/>'

  paths = ""
  for name, xy in panel.curves.items():
    width = max(1, len(xy) // WINDOWS)
    if panel.is_smooth or width == 1:
      paths += path("mean", name, _extremes(xy))
      continue
    paths += path("raw", name, _extremes(xy)) + path("mean", name, _thin(_smooth(xy, width)))
  notes = [panel.note] if panel.note else []
  if broken := len(points) - len(finite):
    notes.append(f"gaps: {broken:,} values are NaN or infinite")
  tops = {label(t, hi): f"top:{100 * (hi - t) / (hi - lo):.2f}%" for t in ticks}
  grid = "".join(f'<i class="grid" style="{top}"></i>' for top in tops.values())
  y = "".join(f'<span class="y" style="{top}">{tick}</span>' for tick, top in tops.items())
  x = "".join(
    f'<span class="x" style="left:{100 * t / x_hi:.2f}%">{label(t, x_hi)}</span>' for t in x_ticks
  )
  return (
    f"<figure><figcaption>{escape(panel.title)}<small>{escape('; '.join(notes))}</small>"
    f'</figcaption><div class="plot">{grid}<svg viewBox="0 0 1000 1000" '
    f'preserveAspectRatio="none" role="img" aria-label="{escape(panel.title)} over steps">{paths}'
    f"</svg>{y}{x}</div></figure>"
  )


def _smooth(xy: np.ndarray, width: int) -> np.ndarray:
  """Returns the running mean over `width` rows, each at the middle of its window."""
  finite = np.isfinite(xy[:, 1])
  columns = (xy[:, 0], np.where(finite, xy[:, 1], 0.0), finite.astype(float))
  sums = [np.cumsum(np.insert(c, 0, 0.0)) for c in columns]
  x, y, count = (s[width:] - s[:-width] for s in sums)
  return np.stack([x / width, np.where(count == width, y / width, np.nan)], 1)


def _thin(xy: np.ndarray) -> np.ndarray:
  """Returns at most about BUCKETS evenly spaced rows, among them the last one."""
  stride = -(-len(xy) // BUCKETS)
  kept = np.arange(len(xy) - 1, -1, -stride)[::-1]
  return xy[kept]


def _extremes(xy: np.ndarray) -> np.ndarray:
  """Returns the rows with the least and the greatest value of each bucket, in order.

  A bucket with a value that is not finite keeps its first such row, so that the gap is seen.
  """
  if len(xy) <= 2 * BUCKETS:
    return xy
  edges = np.linspace(0, len(xy), BUCKETS + 1).astype(int)
  kept: list[int] = []
  for first, past in zip(edges[:-1], edges[1:], strict=True):
    y = xy[first:past, 1]
    if not np.isfinite(y).all():
      kept.append(first + int(np.argmin(np.isfinite(y))))
    if np.isfinite(y).any():
      kept += sorted(
        {first + int(i) for i in (np.argmin(_or(y, np.inf)), np.argmax(_or(y, -np.inf)))}
      )
  return xy[sorted(kept)]


def _or(y: np.ndarray, other: float) -> np.ndarray:
  return np.where(np.isfinite(y), y, other)


def _path(x: np.ndarray, y: np.ndarray) -> str:
  """Returns an SVG path with a gap where y is not finite; a single point becomes a dot."""
  d: list[str] = []
  pen, alone = "M", False
  for a, b in zip(x, y, strict=True):
    if not math.isfinite(b):
      d, pen = (d + ["h0"] if alone else d), "M"
      alone = False
      continue
    d.append(f"{pen}{a:.1f} {b:.1f}")
    alone, pen = pen == "M", "L"
  return "".join(d + ["h0"] if alone else d)
