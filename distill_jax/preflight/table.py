"""The result of preflight as text."""

from __future__ import annotations

from distill_jax.types import JsonObject

GiB = 2**30


def text(r: JsonObject) -> str:
  """Formats the result for the terminal, with the verdict first."""
  lines = [verdict(r), ""]
  lines += [f"{r['verb']} on {slices(r)}: {r['chips']} chips, mesh {mesh(r)}", ""]
  lines.append("bytes per device")
  lines += [f"  {name:<22}{size(n):>12}" for name, n in r["bytes_per_device"].items()]
  lines.append(f"  {'peak':<22}{size(r['peak_bytes_per_device']):>12}")
  lines.append(f"  {'memory':<22}{size(r['hbm_bytes_per_device']):>12}")
  if r["flops"] is not None:
    lines += ["", "operations per step"]
    lines += [f"  {name:<22}{n:>12.3e}" for name, n in r["flops"].items() if n]
  if r["collectives"] is not None:
    lines += ["", "bytes sent per device and step"]
    lines += [f"  {name:<22}{size(n):>12}" for name, n in r["collectives"].items()]
  if r["bounds"] is not None:
    lines += ["", "seconds per step (lower bounds)"]
    lines += [f"  {name:<22}{n:>12.4f}" for name, n in r["bounds"].items() if n]
    lines += [
      f"  At most {r['tokens_per_second_bound']:,.0f} tokens per second, with a model FLOPs "
      f"utilization of {100 * r['mfu_bound']:.1f}%.",
    ]
  if r["chip_hours"] is not None:
    lines.append(
      f"  {r['tokens']:,} tokens take at least {r['chip_hours']:,.1f} chip-hours{cost(r)}."
    )
    if r["evaluation_share"]:
      lines.append(f"  They include {r['evaluation_share']:.1%} for evaluation on held-out rows.")
  lines.append("")
  if r["store_bytes_per_token"] is not None:
    lines.append(_store(r))
  lines.append(_smallest(r))
  return "\n".join(lines)


def verdict(r: JsonObject) -> str:
  """Returns one line: whether the config fits, and the largest part of the memory."""
  largest = max(r["bytes_per_device"], key=lambda name: r["bytes_per_device"][name])
  largest_part = f"The largest part is {largest}, {size(r['bytes_per_device'][largest])}."
  peak, hbm = size(r["peak_bytes_per_device"]), size(r["hbm_bytes_per_device"])
  if r["fits"]:
    return f"Fits: {peak} of {hbm} per device. {largest_part}"
  return f"Does not fit: {peak} needed, {hbm} available per device. {largest_part}"


def _store(r: JsonObject) -> str:
  whole = f", at most {r['store_bytes'] / 1e9:,.1f} GB in total" if r["store_bytes"] else ""
  return f"The records take about {r['store_bytes_per_token']} bytes per token{whole}."


def _smallest(r: JsonObject) -> str:
  slice_ = r["smallest"]
  if slice_ is None:
    kind = "smaller" if r["fits"] else "larger"
    return f"This config does not fit on any {kind} slice with the same batch size."
  if slice_["proven"]:
    peak = size(slice_["peak_bytes_per_device"])
    return f"The smallest slice that it fits on is {_on(slice_)}: compiled with a peak of {peak}."
  return (
    f"{slice_['tried']} slices were compiled and do not fit. {_on(slice_)} is the next one that is "
    "large enough for the arguments; it was not compiled."
  )


def _on(slice_: JsonObject) -> str:
  return f"{slice_['topology']} with mesh {mesh(slice_)}"


def slices(r: JsonObject) -> str:
  """Returns the topology, with the number of slices if there are several."""
  return r["topology"] if r["slices"] == 1 else f"{r['slices']} slices of {r['topology']}"


def mesh(r: JsonObject) -> str:
  """Returns the sizes of the mesh axes, e.g. "data=1 fsdp=16 tensor=4"."""
  return " ".join(f"{axis}={n}" for axis, n in r["mesh"].items())


def cost(r: JsonObject) -> str:
  """Returns the cost of the chip-hours as a part of a sentence; "" if their price is not set."""
  if not (price := r["dollars_per_chip_hour"]):
    return ""
  return f", ${r['chip_hours'] * price:,.2f} at ${price:.2f} each"


def size(n: float) -> str:
  """Returns a number of bytes in a readable unit."""
  return f"{n / GiB:.2f} GiB" if n >= GiB / 10 else f"{n / 2**20:.2f} MiB"
