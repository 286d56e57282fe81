"""What preflight found, in words."""

from __future__ import annotations

from distill_jax.types import JsonObject

GiB = 2**30


def text(r: JsonObject) -> str:
  """For a person: the verdict first."""
  lines = [verdict(r), ""]
  lines += [f"{r['verb']} on {_slices(r)}: {r['chips']} chips, mesh {_mesh(r)}", ""]
  lines.append("bytes a device")
  lines += [f"  {name:<22}{_size(n):>12}" for name, n in r["bytes_per_device"].items()]
  lines.append(f"  {'peak':<22}{_size(r['peak_bytes_per_device']):>12}")
  lines.append(f"  {'memory':<22}{_size(r['hbm_bytes_per_device']):>12}")
  if r["flops"] is not None:
    lines += ["", "operations a step"]
    lines += [f"  {name:<22}{n:>12.3e}" for name, n in r["flops"].items() if n]
  if r["collectives"] is not None:
    lines += ["", "sent by a device a step"]
    lines += [f"  {name:<22}{_size(n):>12}" for name, n in r["collectives"].items()]
  if r["bounds"] is not None:
    lines += ["", "seconds a step, at the least"]
    lines += [f"  {name:<22}{n:>12.4f}" for name, n in r["bounds"].items() if n]
    lines += [
      f"  so at most {r['tokens_per_second_bound']:,.0f} tokens a second, "
      f"{100 * r['mfu_bound']:.1f}% of peak on the model's own operations",
    ]
  if r["chip_hours"] is not None:
    lines.append(f"  {r['tokens']:,} tokens take at least {r['chip_hours']:,.1f} chip-hours")
  lines.append("")
  if r["store_bytes_per_token"] is not None:
    lines.append(_store(r))
  lines.append(_smallest(r))
  return "\n".join(lines)


def verdict(r: JsonObject) -> str:
  largest = max(r["bytes_per_device"], key=lambda name: r["bytes_per_device"][name])
  largest_part = f"the largest part is {largest}, {_size(r['bytes_per_device'][largest])}"
  peak, hbm = _size(r["peak_bytes_per_device"]), _size(r["hbm_bytes_per_device"])
  if r["fits"]:
    return f"fits: {peak} of {hbm} a device; {largest_part}"
  return f"does not fit: {peak} are needed of {hbm} a device; {largest_part}"


def _store(r: JsonObject) -> str:
  whole = f", at most {r['store_bytes'] / 1e9:,.1f} GB in all" if r["store_bytes"] else ""
  return f"records take about {r['store_bytes_per_token']} bytes a token{whole}"


def _smallest(r: JsonObject) -> str:
  slice_ = r["smallest"]
  if slice_ is None:
    return (
      "no smaller listed slice fits with this config's batch"
      if r["fits"]
      else "no larger listed slice fits with this config's batch"
    )
  if slice_["proven"]:
    peak = _size(slice_["peak_bytes_per_device"])
    return f"the smallest listed slice that fits is {_on(slice_)}, by a compile: {peak}"
  return (
    f"{slice_['tried']} slices were compiled and did not fit; {_on(slice_)} is the next that "
    "holds the arguments"
  )


def _on(slice_: JsonObject) -> str:
  return f"{slice_['topology']} with mesh {_mesh(slice_)}"


def _slices(r: JsonObject) -> str:
  return r["topology"] if r["slices"] == 1 else f"{r['slices']} slices of {r['topology']}"


def _mesh(r: JsonObject) -> str:
  return " ".join(f"{axis}={n}" for axis, n in r["mesh"].items())


def _size(n: float) -> str:
  return f"{n / GiB:.2f} GiB" if n >= GiB / 10 else f"{n / 2**20:.2f} MiB"
