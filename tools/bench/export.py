"""Compares an export straight from the checkpoint with one of the model in memory.

  python tools/bench/export.py [--millions=400] [--rounds=3] [--folder=/tmp]

A llama of about this many million parameters is saved in float32, and exported in bfloat16 by a
separate process for each measurement. `memory` restores the model on one device and writes it,
as a LoRA student is exported; `stream` copies the checkpoint by slices, checksums included. Seconds
and MB/s of what is written are medians over rounds, without the start of the process; peak RSS is
above that of the same process after it exported a tiny model. The last line is a JSON object with
`stream_over_memory_seconds` and `stream_over_memory_peak_rss`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = """
import dataclasses, shutil, sys, time
from pathlib import Path
import jax
from distill_jax.hub import export
from distill_jax.models import llama
from distill_jax.nn import layers, sharding
from distill_jax.runtime import checkpoint, saved_arrays

SHAPE = dict(vocab_size=32_000, hidden_size=1024, intermediate_size=4096, head_dim=64,
             num_attention_heads=16, num_key_value_heads=8)
verb, millions, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
extra = dict(tokenizer=None, generation={}, card="")
L = max(1, round((millions * 1e6 - 2 * 32_000 * 1024) / 15.7e6))
LARGE = dataclasses.replace(llama.TINY, num_hidden_layers=L, **SHAPE)
CONFIGS = {"tiny": llama.TINY, "large": LARGE}

def peak():
  return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

def init(c):
  return lambda key: llama.Model(c, key)

def run(name):
  abstract = jax.eval_shape(init(CONFIGS[name]), jax.random.key(0))
  where, to = folder / name, folder / f"out-{name}"
  shutil.rmtree(to, ignore_errors=True)
  began = time.perf_counter()
  if verb == "stream":
    with saved_arrays.open_arrays(where) as saved:
      export.export_model(abstract, to, saved=saved, **extra)
  else:
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    shardings = sharding.shardings(abstract, mesh, layers.ComputeConfig().rules)
    model = checkpoint.restore_params(where, sharding.with_shardings(abstract, shardings))
    export.export_model(model, to, **extra)
  return time.perf_counter() - began

if verb == "save":
  for name, c in CONFIGS.items():
    with checkpoint.manager(folder / name) as saves:
      checkpoint.save(saves, 1, {"params": jax.jit(init(c))(jax.random.key(0))}, {})
else:
  run("tiny")
  before = peak()
  seconds = run("large")
  print(seconds, peak() - before, sum(p.stat().st_size for p in (folder / "out-large").iterdir()))
"""


def child(verb: str, millions: int, folder: Path) -> list[float]:
  line = [sys.executable, "-c", SCRIPT, verb, str(millions), str(folder)]
  env = os.environ | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(line, check=True, env=env, stdout=subprocess.PIPE, text=True)
  return [float(x) for x in done.stdout.split()]


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--millions", type=int, default=400)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--folder", default=tempfile.gettempdir())
  args = parser.parse_args()
  rows: dict[str, list[list[float]]] = {"memory": [], "stream": []}
  folder = Path(tempfile.mkdtemp(dir=args.folder))
  try:
    child("save", args.millions, folder)
    for _ in range(args.rounds):
      for verb, measured in rows.items():
        measured.append(child(verb, args.millions, folder))
  finally:
    shutil.rmtree(folder)
  figures = {}
  for verb, measured in rows.items():
    seconds, peak = (statistics.median(row[i] for row in measured) for i in (0, 1))
    written = measured[0][2]
    figures[f"{verb}_seconds"], figures[f"{verb}_peak_rss_mb"] = seconds, peak / 2**20
    figures[f"{verb}_mb_per_second"] = written / 1e6 / seconds
  for key in ("seconds", "peak_rss"):
    i = ("seconds", "peak_rss").index(key)
    pairs = zip(rows["stream"], rows["memory"], strict=True)
    figures[f"stream_over_memory_{key}"] = statistics.median(a[i] / b[i] for a, b in pairs)
  for key, value in figures.items():
    print(f"{key:34}{value:12.2f}")
  print(f"load {os.getloadavg()[0]:.1f}")
  print(json.dumps({key: round(value, 3) for key, value in figures.items()}))


if __name__ == "__main__":
  main()
