"""The table of the results of tools/on_policy_evidence.py."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from problem_scores import difference, interval, percent

SEEDS = (0, 1, 2)
TRAINED, VALIDATION, HELDOUT, OWN = "trained", "validation", "heldout", "own texts"  # lines


def key_of(r: dict) -> tuple[str, str, float, int]:
  """Returns what a line of the results is about."""
  return r["what"], r["target"], r["rate"], r["seed"]


def table(results: Iterable[dict]) -> str:
  """Returns a table in Markdown of all measured models, and differences between the targets.

  Intervals are those of a bootstrap over problems: the seeds have the same ones.
  """
  by = {key_of(r): r for r in results}
  lines = [
    "| target | rate (validation pass@1) | tokens | pass@1 | of each seed | maj@4 | cut off "
    "| KL on own texts, of each seed | seconds: train, generate, score |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  right: dict[str, list[dict[str, float]]] = {}
  for name, rate in dict.fromkeys((k[1], k[2]) for k in by if k[0] == HELDOUT):
    found = [r for s in SEEDS if (r := by.get((HELDOUT, name, rate, s)))]
    right[name] = [r["right"] for r in found]
    own = [r["kl"] for s in SEEDS if (r := by.get((OWN, name, rate, s)))]
    runs = [r for s in SEEDS if (r := by.get((TRAINED, name, rate, s)))]
    tried = sorted((k[2], by[k]["pass@1"]["value"]) for k in by if k[:2] == (VALIDATION, name))
    cells = [
      name,
      f"{rate:g} ({', '.join(f'{r:g}: {100 * p:.1f}%' for r, p in tried)})" if tried else "",
      f"{np.mean([r['tokens'] for r in runs]):,.0f}" if runs else "",
      percent(interval(right[name])),
      ", ".join(f"{100 * r['pass@1']['value']:.1f}%" for r in found),
      percent(interval([r["majority"] for r in found])),
      f"{100 * np.mean([r['cut_off'] for r in found]):.1f}%",
      f"{np.mean(own):.3f}: {', '.join(f'{x:.3f}' for x in own)}" if own else "",
      ", ".join(
        f"{np.mean([r['seconds'][k] for r in runs]):.0f}" for k in ("train", "generate", "score")
      )
      if runs
      else "",
    ]
    lines.append(f"| {' | '.join(cells)} |")
  for base in ("start", "supervised", "off_policy"):
    for name in [n for n in right if base in right and n not in ("teacher", "start", base)]:
      lines.append(f"{name} - {base}, pass@1: {difference(right[name], right[base])}")
  return "\n".join(lines)
