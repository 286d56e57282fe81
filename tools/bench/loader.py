"""Compares the loader's tokens per second with those of a training step.

  python tools/bench/loader.py [--sequences=64] [--seq_len=4096] [--seconds=10]

The store has sampled records (63 points, vocabulary 151,936; see records_io.py). Batches are
shuffled, read, decoded, collated and put on the device, as in training. In turn with the loader, a
training step of a 12-layer SmolLM2 runs on the CPU (the records step of step.py).
`loader_over_step` is the ratio of the speeds. `loader_over_v5p_host` compares with a host of four
v5p chips that train a student with 7 billion parameters at half of the published peak, 459 bfloat16
TFLOP/s per chip, with 6 FLOPs per parameter and token: 21,857 tokens per second. That host has 208
vCPUs, but the loader is measured on the cores of this machine. The last line is a JSON object.
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
V5P_HOST = 0.5 * V5P_FLOPS * CHIPS / (6 * STUDENT)  # tokens per second


def load(stores: list, seconds: float, batch_size: int = 8) -> float:
  """Returns the loader's tokens per second, without the first batch."""
  rows = sharding.rows(sharding.make_mesh(devices=jax.devices()[:1]), batch_size)
  batches = loader.batches(stores, batch_size=batch_size, seed=0)
  first = collate.to_device(next(batches), rows)
  start, n = time.perf_counter(), 0
  while time.perf_counter() - start < seconds:
    jax.block_until_ready(collate.to_device(next(batches), rows))
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
