"""How the report looks: one HTML page, drawn by hand, that asks for nothing else.

Plots are HTML boxes placed by percent, with SVG paths only for curves: text keeps its
size at any width, and a page is some tens of kilobytes. Colours and type are in page.css.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
  from distill_jax.report import Gap, Run

POINTS = 600  # of one curve, at most
escape = html.escape


def text(x: float | None, digits: int = 3) -> str:
  """A number, or the word for why there is none."""
  if x is None:
    return "not measured"
  return f"{x:,.{digits}f}" if math.isfinite(x) else "NaN" if math.isnan(x) else "infinite"


def percent(x: float | None) -> str:
  return f"{100 * x:.1f}%" if x is not None and math.isfinite(x) else text(x)


def size(x: float | None, unit: str = "") -> str:
  """134,515,008 as "134.5 M": three or four digits and a power of a thousand."""
  if x is None or not math.isfinite(x):
    return text(x)
  for power, prefix in ((9, "G"), (6, "M"), (3, "k")):
    if abs(x) >= 10**power:
      return f"{x / 10**power:.1f} {prefix}{unit}"
  return f"{x:,.0f} {unit}".rstrip()


# key: (name, what it is, how it is written)
COLUMNS: dict[str, tuple[str, str, Callable[[float | None], str]]] = {
  "ce": ("Cross-entropy", "nats a token; lower is better", text),
  "perplexity": ("Perplexity", "e to the cross-entropy", lambda x: text(x, 2)),
  "kl": ("KL to the teacher", "nats a token; 0 is the teacher itself", text),
  "agreement": ("Top-1 agreement", "same first choice as the teacher", percent),
  "entropy": ("Entropy", "of its own predictions, nats", text),
  "parameters": ("Parameters", "", size),
  "bytes": ("Bytes", "of its weights", lambda x: size(x, "B")),
  "tokens_per_second": ("Tokens a second", "forward pass, this machine", lambda x: text(x, 0)),
}


def render(
  headline: str,
  about: str,
  labels: Mapping[str, str],
  models: Mapping[str, Mapping[str, float | None]],
  gaps: Sequence[Gap],
  runs: Mapping[str, Run],
  records: Mapping[str, Any] | None,
  export_dir: str,
  commands: Mapping[str, str],
) -> str:
  """The page. `models` holds every number of every model shown, None where not measured."""
  style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
  sections = [
    ("Held-out results", _dots(labels, models) + _table(labels, models)),
    ("Share of the gap closed", _gaps(gaps)),
    ("Training", _curves(runs)),
    ("Teacher records", _records(records)),
    ("To repeat it", _repeat(runs, commands, export_dir)),
  ]
  body = "".join(f"<section><h2>{escape(name)}</h2>{part}</section>" for name, part in sections)
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta name="color-scheme" content="light dark">'
    f"<title>distill_jax report</title><style>{style}</style></head>\n<body><main><header>"
    f'<p class="kicker">distill_jax · report</p><h1>{escape(headline)}</h1>'
    f'<p class="about">{escape(about)}</p>{_tiles(models, gaps, records)}</header>\n'
    f"{body}</main></body></html>\n"
  )


def _tiles(models: Mapping, gaps: Sequence[Gap], records: Mapping[str, Any] | None) -> str:
  """Four figures to take away."""
  teacher, ours = models["teacher"], models["distilled"]

  def ratio(key: str) -> str:
    a, b = ours[key], teacher[key]
    return text(None) if a is None or b is None else f"{a / b:.2f}×" if b else "not defined"

  closed = gaps[0].share
  tiles = [
    (percent(closed) if closed is not None else "—", "of the hard-label student's KL gap closed"),
    (ratio("parameters"), "the teacher's parameters"),
    (ratio("tokens_per_second"), "the teacher's tokens a second"),
    (text((records or {}).get("bytes_per_token"), 1), "bytes a token of the records"),
  ]
  return '<dl class="tiles">{}</dl>'.format(
    "".join(f"<div><dd>{escape(v)}</dd><dt>{escape(k)}</dt></div>" for v, k in tiles)
  )


def _table(labels: Mapping[str, str], models: Mapping[str, Mapping[str, float | None]]) -> str:
  head = "".join(
    f'<th scope="col"><i class="dot {_tone(m)}"></i>{escape(labels[m])}</th>' for m in models
  )
  rows = ""
  for key, (name, note, write) in COLUMNS.items():
    cells = "".join(f"<td>{_cell(write(numbers[key]))}</td>" for numbers in models.values())
    small = f"<small>{escape(note)}</small>" if note else ""
    rows += f'<tr><th scope="row">{escape(name)}{small}</th>{cells}</tr>'
  return f'<div class="wide"><table class="results"><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table></div>'  # noqa: E501


def _cell(written: str) -> str:
  bad = written in ("not measured", "NaN", "infinite")
  return f'<span class="bad">{written}</span>' if bad else escape(written)


def _tone(model: str) -> str:
  """The colour of a model, the same everywhere on the page."""
  return model if model in ("teacher", "start", "hard", "distilled") else "other"


def _dots(labels: Mapping[str, str], models: Mapping[str, Mapping[str, float | None]]) -> str:
  """One dot a model and a panel a number."""
  panels = ""
  for key in ("ce", "kl", "agreement"):
    name, note, write = COLUMNS[key]
    known = [x for m in models.values() if (x := m[key]) is not None and math.isfinite(x)]
    lo, hi, ticks = _axis([*known, 0.0] if key == "kl" else known, 3)
    if key == "agreement":
      lo, hi, ticks = 0.0, 1.0, [0.0, 0.5, 1.0]
    place = lambda x, lo=lo, hi=hi: 100 * (x - lo) / (hi - lo)
    lines = "".join(f'<i class="grid" style="left:{place(t):.2f}%"></i>' for t in ticks)
    rows = ""
    for m, numbers in models.items():
      x = numbers[key]
      at = place(x) if x is not None and math.isfinite(x) else None
      dot = "" if at is None else f'<i class="dot {_tone(m)}" style="left:{at:.2f}%"></i>'
      rows += (
        f'<div class="row"><span>{escape(labels[m])}</span><div class="track">{lines}{dot}</div>'
        f"<b>{_cell(write(x))}</b></div>"
      )
    form = "{:.0%}" if key == "agreement" else "{:g}"
    axis = "".join(f'<span style="left:{place(t):.2f}%">{form.format(t)}</span>' for t in ticks)
    panels += (
      f"<figure><figcaption>{escape(name)}<small>{escape(note)}</small></figcaption>{rows}"
      f'<div class="row axis"><span></span><div class="track">{axis}</div><b></b></div></figure>'
    )
  return f'<div class="panels">{panels}</div>'


def _axis(values: Sequence[float], n: int) -> tuple[float, float, list[float]]:
  """(low, high, about n round ticks) that hold the values."""
  lo, hi = (min(values), max(values)) if values else (0.0, 1.0)
  if hi <= lo:
    lo, hi = lo - 0.5, hi + 0.5
  raw = (hi - lo) / n
  base = 10 ** math.floor(math.log10(raw))
  step = next(s * base for s in (1, 2, 5, 10) if s * base >= raw)
  first, last = math.floor(lo / step), math.ceil(hi / step)
  ticks = [round(i * step, 10) for i in range(first, last + 1)]
  return ticks[0], ticks[-1], ticks


def _gaps(gaps: Sequence[Gap]) -> str:
  rows = ""
  for gap in gaps:
    share = f"<b>{percent(gap.share)}</b>" if gap.share is not None else "<b>—</b>"
    note = gap.why or _in_words(gap.share)
    bar = 0.0 if gap.share is None else 100 * min(max(gap.share, 0.0), 1.0)
    rows += (
      f'<div class="gap"><div><strong>{escape(gap.name)}</strong>'
      f"<small>{escape(gap.meaning[0].upper() + gap.meaning[1:])}.</small></div>"
      f'<div class="bar"><i style="width:{bar:.1f}%"></i></div>{share}<em>{escape(note)}</em></div>'
    )
  return rows


def _in_words(share: float | None) -> str:
  if share is None:
    return ""
  if share < 0:
    return "the gap grew"
  return "past the teacher" if share > 1 else ""


def _curves(runs: Mapping[str, Run]) -> str:
  """Curves of the quantities that every run wrote, since only those can be compared."""
  if not runs:
    return '<p class="bad">No run with a metrics.jsonl was given.</p>'
  shared = set.intersection(*({k for row in r.rows for k in row} for r in runs.values()))
  kls = sorted(k for k in shared if k.startswith("kl/"))
  keys = [k for k in ("ce", *kls[:1]) if k in shared] or [k for k in ("loss",) if k in shared]
  if not keys:
    return f'<p class="bad">The runs {escape(", ".join(runs))} wrote no number in common.</p>'
  names = {"ce": "Cross-entropy of the training labels", "loss": "Total training loss"}
  charts = "".join(_chart(k, names.get(k, "KL to the teacher, training text"), runs) for k in keys)
  legend = "".join(
    f'<span><i class="dot {_tone(name)}"></i>{escape(name)}, {len(run.rows):,} steps</span>'
    for name, run in runs.items()
  )
  return f'<p class="legend">{legend}</p><div class="charts">{charts}</div>'


def _chart(key: str, title: str, runs: Mapping[str, Run]) -> str:
  series = {
    name: np.array([[row["step"], row[key]] for row in run.rows if key in row], float)
    for name, run in runs.items()
  }
  every = np.concatenate(list(series.values()))
  finite = every[np.isfinite(every[:, 1])]
  lo, hi, ticks = _axis(finite[:, 1].tolist(), 4)
  x_lo, x_hi = float(every[:, 0].min()), float(max(every[:, 0].max(), every[:, 0].min() + 1))
  x_ticks = [t for t in _axis([x_lo, x_hi], 4)[2] if x_lo <= t <= x_hi and t == int(t)]
  across, up = lambda x: (x - x_lo) / (x_hi - x_lo), lambda y: (hi - y) / (hi - lo)
  paths, window = "", 1
  for name, points in series.items():
    width = max(1, len(points) // 20)
    window = max(window, width)
    for kind, xy in (("raw", points), ("mean", _smooth(points, width))):
      xy = xy[:: -(-len(xy) // POINTS)]
      d = _path(1000 * across(xy[:, 0]), 1000 * up(xy[:, 1]))
      paths += f'<path class="{kind} {_tone(name)}" d="{d}"/>'
  grid = "".join(f'<i class="grid" style="top:{100 * up(t):.2f}%"></i>' for t in ticks)
  y = "".join(f'<span class="y" style="top:{100 * up(t):.2f}%">{t:g}</span>' for t in ticks)
  x = "".join(f'<span class="x" style="left:{100 * across(t):.2f}%">{t:g}</span>' for t in x_ticks)
  note = f"by step; thick: mean over {window} steps"
  if broken := len(every) - len(finite):
    note += f"; {broken} values are NaN or infinite and leave a hole"
  return (
    f"<figure><figcaption>{escape(title)}<small>{escape(note)}</small></figcaption>"
    f'<div class="plot">{grid}<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
    f'aria-label="{escape(title)}">{paths}</svg>{y}{x}</div></figure>'
  )


def _smooth(points: np.ndarray, width: int) -> np.ndarray:
  """Running mean over `width` values, each at the middle of its window."""
  if len(points) < width:
    return points
  kernel = np.ones(width) / width
  return np.stack([np.convolve(c, kernel, "valid") for c in points.T], 1)


def _path(x: np.ndarray, y: np.ndarray) -> str:
  """An SVG path that breaks where y is not finite."""
  d, pen = [], "M"
  for a, b in zip(x, y, strict=True):
    if not math.isfinite(b):
      pen = "M"
      continue
    d.append(f"{pen}{a:.1f} {b:.1f}")
    pen = "L"
  return "".join(d)


def _records(records: Mapping[str, Any] | None) -> str:
  """Bytes a token beside those of a teacher stored in full and of its 64 best."""
  if not records or records.get("bytes_per_token") is None:
    return '<p class="bad">The bytes a token of the records were not measured.</p>'
  ours, vocab = float(records["bytes_per_token"]), records.get("vocab_size")
  entries = records.get("entries_per_token")
  about = f"Kind {records.get('kind')}, n = {records.get('n')}"
  if entries is not None:
    about += f": {text(float(entries), 1)} entries a token on average"
  costs = [("These records", ours), ("Top 64, int32 ids and float32 log-probabilities", 64 * 8.0)]
  if vocab is not None:
    costs.append((f"All {int(vocab):,} logits in float32", 4.0 * int(vocab)))
  rows = "".join(
    f'<tr><th scope="row">{escape(name)}</th><td>{text(cost, 1 if cost < 1000 else 0)}</td>'
    f"<td>{f'{cost / ours:,.1f}×' if ours > 0 else 'not defined'}</td></tr>"
    for name, cost in costs
  )
  return (
    f'<p>{escape(about)}.</p><table class="costs"><thead><tr><td></td><th>bytes a token</th>'
    f"<th>beside these</th></tr></thead><tbody>{rows}</tbody></table>"
  )


def _repeat(runs: Mapping[str, Run], commands: Mapping[str, str], export_dir: str) -> str:
  parts = "".join(
    f"<h3>{escape(name)}</h3><pre>{escape(command)}</pre>" for name, command in commands.items()
  )
  if export_dir:
    parts += f"<p>The distilled student lies in <code>{escape(export_dir)}</code>.</p>"
  for name, run in runs.items():
    said = run.versions
    packages = ", ".join(f"{k} {v}" for k, v in said.get("packages", {}).items())
    facts = [
      f"git {said.get('git') or 'unknown'}", f"Python {said.get('python', 'unknown')}",
      packages or "package versions unknown", str(said.get("platform", "platform unknown")),
      f"started {said.get('started', 'at an unknown time')}",
    ]  # fmt: skip
    config = json.dumps(run.config, indent=1, sort_keys=True)
    parts += (
      f"<details><summary>{escape(name)}: config and versions</summary>"
      f'<p class="facts">{escape("; ".join(facts))}.</p><pre>{escape(config)}</pre></details>'
    )
  return parts or '<p class="bad">No run folder was given.</p>'
