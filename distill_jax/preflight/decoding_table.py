"""The result of `preflight --verb=generate` as text."""

from __future__ import annotations

from distill_jax.generation import placement
from distill_jax.preflight import table
from distill_jax.types import JsonObject


def text(r: JsonObject) -> str:
  """Formats the result of decoding.estimate for the terminal, with the verdict first."""
  at = r["at"]
  lines = [_verdict(r), ""]
  lines += [f"generate on {table.slices(r)}: {r['chips']} chips, mesh {table.mesh(r)}", ""]
  lines.append("bytes per device (by formula)")
  lines += [f"  {name:<22}{table.size(n):>12}" for name, n in r["bytes_per_device"].items()]
  lines.append(f"  {'memory':<22}{table.size(r['hbm_bytes_per_device']):>12}")
  lines += ["", f"seconds per token of {at['batch_size']:,} rows (lower bounds)"]
  lines += [f"  {name:<22}{n:>12.4f}" for name, n in at["bounds"].items() if n]
  lines.append(f"  At most {_rate(at)} with generate.batch_size={at['batch_size']}.")
  if r["largest"] is not None and r["largest"]["batch_size"] != at["batch_size"]:
    most = r["largest"]
    lines.append(f"  At most {_rate(most)} with {most['batch_size']}, the largest batch that fits.")
  lines += ["", _weights(r), _hours(r)]
  if r["best"] is not None:
    best = r["best"]
    lines.append(
      f"The best mesh is {table.mesh(best)}: at most {_rate(best)} with {best['batch_size']} rows."
    )
  if r["slices"] > 1:
    lines.append(
      "All slices decode in step and wait for each other at every token. Start one `generate` per "
      "slice instead, each with its part of the prompts."
    )
  return "\n".join([*lines, _server(r)])


def _verdict(r: JsonObject) -> str:
  need, hbm = sum(r["bytes_per_device"].values()), table.size(r["hbm_bytes_per_device"])
  if r["fits"]:
    return f"Fits: {table.size(need)} of {hbm} per device, weights gathered {_when(r)}."
  largest = r["largest"]["batch_size"] if r["largest"] else 0
  advice = f"At most {largest} rows fit." if largest else "Increase mesh.tensor."
  return (
    f"Does not fit: {table.size(need)} needed, {hbm} available per device, of which "
    f"{placement.ROOM:.0%} are for weights and caches. {advice}"
  )


def _when(r: JsonObject) -> str:
  return "once" if r["gather"] == placement.ONCE else "for every token"


def _weights(r: JsonObject) -> str:
  gathered, stored = table.size(r["weights_gathered"]), table.size(r["weights_stored"])
  return (
    f"The weights of {r['model']} take {gathered} per device gathered and {stored} spread over "
    f"the mesh; they are gathered {_when(r)}."
  )


def _hours(r: JsonObject) -> str:
  return (
    f"{r['tokens']:,} tokens, the maximum for 1,000 prompts, take at least "
    f"{r['chip_hours']:,.2f} chip-hours{table.cost(r)}."
  )


def _server(r: JsonObject) -> str:
  """Returns the sentence that compares the own decoder with a server."""
  here, best, server = r["assumed_tokens_per_second"].values()
  rates = (
    f"at a quarter of its bound, which servers reach, the own decoder does {_number(here)} tokens "
    f"per second and chip ({_number(best or 0)} with the best mesh and batch), and a server (vLLM) "
    f"{_number(server)} per H200"
  )
  if here >= server:
    return f"The own decoder is no worse than a server: {rates}."
  if best and best >= server:
    return f"A server is better (generate.server), unless mesh and batch are changed: {rates}."
  return f"A server is the better choice (generate.server): {rates}."


def _rate(speed: JsonObject) -> str:
  return f"{speed['tokens_per_second_bound']:,.0f} tokens per second"


def _number(n: float) -> str:
  return f"{n:,.0f}" if n >= 10 else f"{n:.1f}"
