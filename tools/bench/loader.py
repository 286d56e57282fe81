"""The loader's tokens a second, beside what a training step needs.

  python tools/bench/loader.py [--sequences=64] [--seq_len=4096] [--seconds=10]

A store of sampled records as records_io.py makes it (63 points, vocabulary 151,936); batches
come from loader.py as loop.py asks for them, shuffled, read, decoded and collated, and
are put on the device. In turn with it, round after round, runs one CPU training step of a
12-layer SmolLM2 (step.py's records step). `loader_over_step` is how many times what that step
needs the loader gives. `loader_over_v5p_host` is the same of a host of four v5p chips that
train a 7-billion-parameter student at half of 459 bfloat16 TFLOP/s a chip (Google Cloud's
published peak), at 6 FLOPs a parameter and token: 21,857 tokens a second. That host has 208
vCPUs and this figure is from the cores here. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
import records_io
import step as step_bench

from distill_jax.models import llama
from distill_jax.nn import sharding
from distill_jax.records import collate
from distill_jax.records.store import open_store
from distill_jax.training import loader

V5P_FLOPS, CHIPS, STUDENT = 459e12, 4, 7e9
V5P_HOST = 0.5 * V5P_FLOPS * CHIPS / (6 * STUDENT)  # tokens a second


def load(stores: list, seconds: float, batch_size: int = 8) -> float:
  """Tokens a second over a while, after the first batch."""
  where = sharding.batch_sharding(sharding.make_mesh(devices=jax.devices()[:1]))
  batches = loader.batches(stores, batch_size=batch_size, seed=0)
  first = collate.to_device(next(batches), where)
  start, n = time.perf_counter(), 0
  while time.perf_counter() - start < seconds:
    jax.block_until_ready(collate.to_device(next(batches), where))
    n += first.mask_BT.size
  return n / (time.perf_counter() - start)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--sequences", type=int, default=64)
  parser.add_argument("--seq_len", type=int, default=4096)
  parser.add_argument("--seconds", type=float, default=10)
  parser.add_argument("--rounds", type=int, default=3)
  args = parser.parse_args()
  teacher = llama.CONFIGS["smollm2-135m"]
  student = dataclasses.replace(teacher, num_hidden_layers=12)
  batch = step_bench.batch_of(student.vocab_size, 2, 512)
  records = step_bench.contestants(student, llama.TINY, batch, 64)["records"]
  step_bench.run(records)  # warms up
  with tempfile.TemporaryDirectory() as tmp:
    folder = Path(tmp) / "records"
    records_io.write_ours(
      folder, [records_io.teacher(args.seq_len, i) for i in range(args.sequences)]
    )
    stores = [open_store(folder)]
    loads, needs = [], []
    for _ in range(args.rounds):
      loads.append(load(stores, args.seconds))
      needs.append(batch.mask_BT.size / step_bench.run(records)[0])
  figures = {
    "loader_tokens_per_second": statistics.median(loads),
    "step_tokens_per_second": statistics.median(needs),
    "loader_over_step": statistics.median(a / b for a, b in zip(loads, needs, strict=True)),
    "loader_over_v5p_host": statistics.median(loads) / V5P_HOST,
    "cores": os.cpu_count(),
  }
  for key, value in figures.items():
    print(f"{key:32}{value:16,.2f}")
  print(f"load {os.getloadavg()[0]:.1f}")
  print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


if __name__ == "__main__":
  main()
