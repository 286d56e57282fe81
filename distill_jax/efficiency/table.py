"""The results of `efficiency` as text."""

from __future__ import annotations

from typing import Any

from distill_jax.report.numbers import size
from distill_jax.types import JsonObject


def text(r: JsonObject) -> str:
  """Returns the results as text: a summary, then the numbers behind it."""
  lines = [*claims(r), "", *_by_formula(r), "", *_bounds(r)]
  if r["measured"]:
    lines += ["", *_measured(r["measured"])]
  if r["quality"]:
    lines += ["", "quality (from evaluation.json)"]
    for name, row in r["quality"].items():
      numbers = [f"{k} {_number(x)}" for k, x in row.items()]
      lines.append(f"  {name:<22}{', '.join(numbers)}")
  return "\n".join(lines)


def claims(r: JsonObject) -> list[str]:
  """Returns the student's savings, one sentence for each kind."""
  t, s, ratios = r["models"]["teacher"], r["models"]["student"], r["ratios"]
  memory, latency = ratios["memory"], ratios["latency"]
  cached, speed = memory["with_cache"], ratios["throughput_per_chip"]
  lines = [
    f"memory: 1/{memory['same_dtype']:.3g} at equal dtype, 1/{memory['weights']:.3g} when served "
    f"({t['dtype']} for the teacher, {s['dtype']} for the student), {_each(cached, '1/')} with the "
    f"cache of {_batches(cached)} rows of {r['context']:,} positions",
    f"operations: {_times(ratios['flops']['prefill'])} fewer per token in prefill, "
    f"{_times(ratios['flops']['decode'])} fewer in decoding",
    f"speed (upper bounds on {r['chip']}): {_each(speed)} times the decoded tokens per second and "
    f"chip, at batch sizes {_batches(speed)}",
    f"latency (upper bounds on {r['chip']}): one row's token is {_times(latency['same_chips'])} as "
    f"fast on the same chips, {_times(latency['own_chips'])} on the fewest chips for each model",
  ]
  if r["measured"]:
    rows = r["measured"]["ratios"]
    spans = [
      _each([{"ratio": row[k]["median"]} for row in rows]) + f" times in {k}"
      for k in ("prefill", "decode")
    ]
    lines.append(
      f"speed (measured on this machine): {', '.join(spans)}, at batch sizes {_batches(rows)}"
    )
  return lines


def _by_formula(r: JsonObject) -> list[str]:
  t, s = r["models"]["teacher"], r["models"]["student"]
  rows = [
    ("", "teacher", "student"),
    ("served in", t["dtype"], s["dtype"]),
    *(
      (name, size(t[key], unit), size(s[key], unit))
      for name, key, unit in (
        ("parameters", "parameters", ""),
        ("active per token", "active_parameters", ""),
        ("weights", "weight_bytes", "B"),
        ("cache per token", "cache_bytes_per_token", "B"),
        ("cache per row", "cache_bytes", "B"),
        ("… in `generate`", "decoder_cache_bytes", "B"),
      )
    ),
    *(
      (f"{k} FLOPs per token", size(t["flops_per_token"][k]), size(s["flops_per_token"][k]))
      for k in ("prefill", "decode")
    ),
  ]
  head = f"computed for a context of {r['context']:,} and a {t['cache_dtype']} cache"
  return [
    f"teacher: {t['name']}",
    f"student: {s['name']}",
    "",
    head,
    *(f"  {a:<24}{b:>12}{c:>12}" for a, b, c in rows),
  ]


def _bounds(r: JsonObject) -> list[str]:
  lines = [
    f"upper bounds on decoding, on the fewest {r['chip']} chips that hold weights and cache",
    f"  {'':<8}{'batch':>6}{'chips':>7}{'experts':>9}{'read/step':>13}{'tokens/s':>12}"
    f"{'per chip':>10}  bound by",
  ]
  for name, model in r["models"].items():
    for b in model["decode_bounds"]:
      experts = "" if b["experts_read"] is None else f"{b['experts_read']:.1f}"
      lines.append(
        f"  {name:<8}{b['batch_size']:>6,}{b['chips']:>7,}{experts:>9}"
        f"{size(b['bytes_read'], 'B'):>13}{b['tokens_per_second']:>12,.0f}"
        f"{b['tokens_per_second_per_chip']:>10,.0f}  {b['bound_by']}"
      )
  return lines


def _measured(m: JsonObject) -> list[str]:
  dtypes = " and ".join(dict.fromkeys(model["dtype"] for model in m["models"].values()))
  head = f"measured on {m['device']} in {dtypes}, {m['prompt']} tokens read and {m['new']} decoded "
  lines = [head + "per row: tokens per second, median (minimum to maximum)"]
  lines.append(f"  {'':<8}{'batch':>6}{'weights':>10}{'cache':>10}{'prefill':>26}{'decode':>26}")
  for name, model in m["models"].items():
    for b in model["batches"]:
      rates = [_rate(b[f"{k}_tokens_per_second"]) for k in ("prefill", "decode")]
      lines.append(
        f"  {name:<8}{b['batch_size']:>6,}{size(model['weight_bytes'], 'B'):>10}"
        f"{size(b['cache_bytes'], 'B'):>10}{rates[0]:>26}{rates[1]:>26}"
      )
  for row in m["ratios"]:
    rates = [_rate(row[k], 2) for k in ("prefill", "decode")]
    lines.append(f"  {'ratio':<8}{row['batch_size']:>6,}{'':>20}{rates[0]:>26}{rates[1]:>26}")
  return lines


def _number(x: Any) -> str:
  """Formats a score like `evaluate`: a number, with its interval if it has one."""
  if isinstance(x, dict) and x.keys() == {"value", "low", "high"}:
    return f"{x['value']:.4g} ({x['low']:.4g} to {x['high']:.4g})"
  return f"{x:.4g}" if isinstance(x, int | float) else str(x)


def _rate(x: dict[str, float], digits: int = 0) -> str:
  return f"{x['median']:,.{digits}f} ({x['least']:,.{digits}f} to {x['most']:,.{digits}f})"


def _times(x: float) -> str:
  return f"{x:.3g} times"


def _each(rows: list[JsonObject], before: str = "") -> str:
  """Returns the ratios for all batch sizes, as text."""
  return ", ".join(f"{before}{row['ratio']:.3g}" for row in rows)


def _batches(rows: list[JsonObject]) -> str:
  return ", ".join(f"{row['batch_size']:,}" for row in rows)
