"""The names of the numbers on the page, and their formats."""

from __future__ import annotations

import html
import math
from collections.abc import Callable


def text(x: float | None, digits: int = 3) -> str:
  """Formats a number, or returns the reason for its absence."""
  if x is None:
    return "not measured"
  return f"{x:,.{digits}f}" if math.isfinite(x) else "NaN" if math.isnan(x) else "infinite"


def percent(x: float | None) -> str:
  return f"{100 * x:.1f}%" if x is not None and math.isfinite(x) else text(x)


def size(x: float | None, unit: str = "") -> str:
  """Formats a large number with three or four digits, e.g. 134,515,008 as "134.5 M"."""
  if x is None or not math.isfinite(x):
    return text(x)
  for power, prefix in ((9, "G"), (6, "M"), (3, "k")):
    if abs(x) >= 10**power:
      return f"{x / 10**power:.1f} {prefix}{unit}"
  return f"{x:,.0f} {unit}".rstrip()


def short(x: float | None) -> str:
  """Formats a number with two decimals, or with none from 1,000 on."""
  return text(x, 0 if x is not None and abs(x) >= 1000 else 2)


def cell(written: str) -> str:
  """Returns the HTML of a formatted number; missing and infinite values are highlighted."""
  bad = written in ("not measured", "NaN", "infinite")
  return f'<span class="bad">{written}</span>' if bad else html.escape(written)


def tone(model: str) -> str:
  """Returns the CSS class for the colour of a model."""
  return model if model in ("teacher", "start", "hard", "distilled") else "other"


# Key in evaluation.json: (name, explanation, format).
COLUMNS: dict[str, tuple[str, str, Callable[[float | None], str]]] = {
  "ce": ("Cross-entropy", "nats per token; lower is better", text),
  "perplexity": ("Perplexity", "exponential of the cross-entropy", short),
  "kl": ("KL to the teacher", "nats per token; lower is better", text),
  "agreement": ("Top-1 agreement", "tokens with the teacher's top prediction", percent),
  "entropy": ("Entropy", "of the predictions, nats per token", text),
  "parameters": ("Parameters", "", size),
  "bytes": ("Size", "bytes of the weights", lambda x: size(x, "B")),
  "tokens_per_second": (
    "Tokens per second",
    "forward pass on this machine",
    lambda x: text(x, 0),
  ),
}
