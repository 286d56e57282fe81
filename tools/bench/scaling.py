"""Computes the memory and the communication of a 7B student on 16, 64, 256 and 1,024 TPU chips.

  python tools/bench/scaling.py [--chip=v5p] [--tensor=4] [--small]

A TPU is not needed: preflight compiles the training step for each slice (libtpu, from the extra
`tpu`). The student has the shape of Mistral-7B, whose width of 4,096 is divisible by all these
numbers of chips, and computes in bfloat16 with float32 parameters and moments. It is trained on
sampled records of 4,096 tokens, with one sequence per group of `tensor` chips: the number of tokens
is proportional to the number of chips.

For each slice with N chips, the results are `N.state_bytes` (parameters and optimizer),
`N.peak_bytes`, and `N.collective_bytes` by kind and in total, all per device.
`state_times_chips_ratio` is the maximum over the minimum of state bytes times chips; it is 1 if the
state is proportional to 1/N. `collective_growth` is the ratio of bytes sent on the last slice and
the first, `collective_growth_from_64` of the last and the second. A ring over n devices sends
(n-1)/n of an array, so an increase by a quarter from 16 chips (4 groups) to 64 (16 groups) is
expected. --small uses two slices and a tiny model. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from distill_jax import config
from distill_jax.preflight import chips, collectives, compiler, programs, topology

CHIPS = (16, 64, 256, 1024)


def student(shape: str, seq_len: int, rows: int, tensor: int) -> config.Config:
  """Returns the config of the run."""
  c = config.base()
  c.student.family, c.student.shape = "llama", shape
  c.student.dtype, c.student.remat = "bfloat16", "full"
  c.mesh.tensor = tensor
  c.data.seq_len = seq_len
  c.losses.soft, c.losses.hard = config.loss("kd", weight=0.9), config.loss("ce", weight=0.1)
  c.train.batch_size, c.train.chunk = rows, min(512, seq_len)
  return config.resolve(c)


def measure(name: str, c: config.Config) -> dict[str, Any]:
  """Returns the bytes per device on a slice."""
  program = programs.lower(c, "train", topology.make_mesh(c.mesh, name))
  memory, compiled = compiler.compile_step(program)
  sent = collectives.HloText(compiled.as_text()).sent()
  state = sum(program.arguments[part] for part in ("parameters", "optimizer"))
  return {
    "state_bytes": state,
    "peak_bytes": memory.peak,
    "collective_bytes": sum(sent.values()),
    **{f"collective_bytes.{kind}": n for kind, n in sent.items()},
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--chip", default="v5p", choices=sorted(chips.CHIPS))
  parser.add_argument("--tensor", type=int, default=4)
  parser.add_argument("--small", action="store_true", help="use two slices and a tiny model")
  args = parser.parse_args()
  topology.prepare()
  sizes = {chips.parse(name)[1]: name for name in chips.CHIPS[args.chip].topologies}
  tensor = 2 if args.small else args.tensor
  out: dict[str, Any] = {"chip": args.chip, "tensor": tensor}
  counts = [n for n in ((4, 8) if args.small else CHIPS) if n in sizes]
  for n in counts:
    began = time.monotonic()
    shape, seq_len = ("tiny", 128) if args.small else ("mistral-7b-v0.1", 4_096)
    found = measure(sizes[n], student(shape, seq_len, n // tensor, tensor))
    print(f"{sizes[n]:<12} {time.monotonic() - began:5.0f} s  {found}", flush=True)
    out |= {f"{n}.{key}": value for key, value in found.items()}
  whole = [out[f"{n}.state_bytes"] * n for n in counts]
  sent = [out[f"{n}.collective_bytes"] for n in counts]
  out["state_times_chips_ratio"] = round(max(whole) / min(whole), 4)
  out["collective_growth"] = round(sent[-1] / sent[0], 4)
  out["collective_growth_from_64"] = round(sent[-1] / sent[1], 4)
  print(json.dumps(out))


if __name__ == "__main__":
  main()
