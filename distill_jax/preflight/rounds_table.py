"""The result of `preflight --verb=on_policy` as text."""

from __future__ import annotations

from collections.abc import Iterable

from distill_jax.generation import placement
from distill_jax.preflight import table
from distill_jax.types import JsonObject


def text(r: JsonObject) -> str:
  """Formats the result of rounds.estimate_rounds for the terminal, with the verdict first."""
  lines = [_verdict(r), ""]
  lines += [f"on_policy on {table.slices(r)}: {r['chips']} chips, mesh {table.mesh(r)}", ""]
  sizes, peaks = r["bytes_per_device"], r["peak_bytes_per_device"]
  lines.append(_row("bytes per device", {part: part for part in sizes}, sizes))
  for name in dict.fromkeys(name for of_part in sizes.values() for name in of_part):
    of_name = {
      part: table.size(of_part[name]) for part, of_part in sizes.items() if name in of_part
    }
    lines.append(_row(f"  {name}", of_name, sizes))
  lines.append(_row("  peak", {part: table.size(n) for part, n in peaks.items()}, sizes))
  lines.append(_row("  memory", dict.fromkeys(sizes, table.size(r["hbm_bytes_per_device"])), sizes))
  lines += ["", _decoding(r)]
  if r["seconds_per_round"] is not None:
    lines += ["", *_seconds(r)]
  return "\n".join(lines)


def _row(name: str, values: JsonObject, parts: Iterable[str]) -> str:
  """Returns a line with a value for each part of a round."""
  return (f"{name:<24}" + "".join(f"{values.get(part, ''):>12}" for part in parts)).rstrip()


def _verdict(r: JsonObject) -> str:
  peaks, hbm = r["peak_bytes_per_device"], table.size(r["hbm_bytes_per_device"])
  part = max(peaks, key=lambda name: peaks[name])
  most = f"{table.size(peaks[part])} per device to {part}"
  if r["fits"]:
    return f"Fits: at most {most}, of {hbm}."
  return (
    f"Does not fit: at most {most}, of {hbm}. While texts are generated, weights and caches can "
    f"take {placement.ROOM:.0%} of the memory that the training state leaves: at most "
    f"{r['decode']['largest_batch']} rows fit."
  )


def _decoding(r: JsonObject) -> str:
  decode = r["decode"]
  when = "once per round" if decode["gather"] == placement.ONCE else "for every token"
  return (
    f"{decode['batch_size']:,} rows are decoded at once (generate.batch_size), and at most "
    f"{decode['largest_batch']:,} fit. The weights are gathered {when}. A token of each row takes "
    f"at least {1e3 * decode['step_seconds_bound']:.2f} ms, bound by {decode['bound_by']}."
  )


def _seconds(r: JsonObject) -> list[str]:
  seconds, whole = r["seconds_per_round"], r["round_seconds_bound"]
  steps = "step" if r["every"] == 1 else "steps"
  lines = [f"seconds per round of {r['every']} {steps} (lower bounds)"]
  lines += [f"  {part:<22}{n:>12.2f}{n / whole:>8.0%}" for part, n in seconds.items() if n]
  lines += [
    f"  A step takes {r['step_seconds_bound']:.2f}, with a model FLOPs utilization of "
    f"{100 * r['mfu_bound']:.1f}%.",
    f"  At most {r['tokens_per_second_bound']:,.0f} generated tokens per second.",
    f"  The run takes at least {r['chip_hours']:,.1f} chip-hours{table.cost(r)}.",
    "  If the decoder reaches a quarter of its bound, as servers do, it takes "
    f"{r['generate_seconds_assumed']:,.1f} seconds per round, and the run "
    f"{r['chip_hours_assumed']:,.1f} chip-hours.",
  ]
  if r["evaluation_share"]:
    lines.append(
      f"  The hours include {r['evaluation_share']:.1%} for evaluation on held-out rows."
    )
  if len(r["teacher_shares"]) > 1:
    lines.append(f"  {_shares(r)}")
  if r["served"]:
    lines.append(f"  {_served(r)}")
  return lines


def _served(r: JsonObject) -> str:
  rate = r["rows_per_round"] * r["row_tokens"] / r["round_seconds_bound"]
  if r["lag"]:
    return f"Servers that score {rate:,.0f} tokens per second keep up, and do not delay the rounds."
  return (
    "The time of the servers that score is not included, and the rounds wait for them. With "
    f"on_policy.lag=1 they do not if the servers score {rate:,.0f} tokens per second."
  )


def _shares(r: JsonObject) -> str:
  parts = ", ".join(f"{name} {share:.0%}" for name, share in r["teacher_shares"].items())
  known = "as in the prompts" if r["prompts_found"] else "assumed, since there are no prompts yet"
  return f"The teachers score these parts of the texts ({known}): {parts}."
