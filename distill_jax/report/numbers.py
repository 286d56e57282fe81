"""How numbers are written on the page, and what they are called."""

from __future__ import annotations

import html
import math
from collections.abc import Callable


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


def short(x: float | None) -> str:
  """Two digits after the point, where that many mean anything."""
  return text(x, 0 if x is not None and abs(x) >= 1000 else 2)


def cell(written: str) -> str:
  """Returns the text for HTML; what is not a number is marked."""
  bad = written in ("not measured", "NaN", "infinite")
  return f'<span class="bad">{written}</span>' if bad else html.escape(written)


def tone(model: str) -> str:
  """The colour of a model, the same everywhere on the page."""
  return model if model in ("teacher", "start", "hard", "distilled") else "other"


# key: (name, what it is, how it is written)
COLUMNS: dict[str, tuple[str, str, Callable[[float | None], str]]] = {
  "ce": ("Cross-entropy", "nats a token; lower is better", text),
  "perplexity": ("Perplexity", "e to the cross-entropy", short),
  "kl": ("KL to the teacher", "nats a token; 0 is the teacher itself", text),
  "agreement": ("Top-1 agreement", "same first choice as the teacher", percent),
  "entropy": ("Entropy", "of its own predictions, nats", text),
  "parameters": ("Parameters", "", size),
  "bytes": ("Bytes", "of its weights", lambda x: size(x, "B")),
  "tokens_per_second": ("Tokens a second", "forward pass, this machine", lambda x: text(x, 0)),
}
