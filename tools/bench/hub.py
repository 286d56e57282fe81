"""Compares import and export with load and save of transformers, for the same model.

  python tools/bench/hub.py [--layers=16] [--rounds=3] [--folder=DIR]

The model is a llama of width 2,048 in bfloat16 with random weights (16 layers: 1.2 billion
parameters, 2.4 GB), written once as a folder with several shards. Each side runs in a separate
process, in turn; for both, the files are in the page cache. Import ends when the bfloat16
parameters can be used, export when the folder is synced to disk. `*_ratio_to_transformers` is our
speed over theirs, the median over rounds. `*_peak_extra_bytes` is the peak of resident memory in
addition to the memory at the start and the parameters; mapped files count. The last line is a JSON
object.
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
import time
from pathlib import Path

CONTESTANTS = ("ours", "transformers")
DTYPE = "bfloat16"


def shape(layers: int):
  from distill_jax.models import llama

  return llama.Config(
    vocab_size=49_152,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=layers,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
  )


def write_source(folder: Path, shape, shard_bytes: int = 10**9) -> None:
  """Writes a llama of this shape with random weights; remote_weights.py uses it, too."""
  import jax
  import jax.numpy as jnp

  from distill_jax.hub import export
  from distill_jax.models import llama
  from distill_jax.nn import params

  def make(key):
    return params.map_params(
      lambda v: v.replace(v[...].astype(jnp.bfloat16)), llama.Model(shape, key)
    )

  export.export_model(
    jax.jit(make)(jax.random.key(0)),
    folder,
    tokenizer=None,
    generation={},
    card="",
    dtype=DTYPE,
    shard_bytes=shard_bytes,
  )


def memory(field: str) -> int:
  lines = Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


class Measured:
  """A context manager that measures seconds and the increase of peak resident memory."""

  def __enter__(self):
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    self.before, self._start = memory("VmRSS"), time.perf_counter()
    return self

  def __exit__(self, *_):
    self.seconds = time.perf_counter() - self._start
    self.peak = memory("VmHWM") - self.before


def ours(source: Path, target: Path) -> tuple[Measured, Measured]:
  import jax

  from distill_jax.hub import export, load
  from distill_jax.hub.pretrained import open_model
  from distill_jax.nn import sharding
  from distill_jax.nn.layers import ComputeConfig

  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with Measured() as read:
    model = load.load_model(open_model(str(source)), mesh, ComputeConfig(dtype=DTYPE), DTYPE)
    jax.block_until_ready(model)
  with Measured() as wrote:
    export.export_model(model, target, tokenizer=None, generation={}, card="", dtype=DTYPE)
  return read, wrote


def theirs(source: Path, target: Path) -> tuple[Measured, Measured]:
  import torch
  import transformers

  with Measured() as read:
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    for p in model.parameters():  # reads the weights, which are mapped files
      p.data = p.data.clone()
  with Measured() as wrote:
    model.save_pretrained(target, max_shard_size="5GB")
    os.sync()
  return read, wrote


def contest(name: str, source: Path, target: Path) -> None:
  read, wrote = (ours if name == "ours" else theirs)(source, target)
  print(
    json.dumps(
      {
        "import.seconds": read.seconds,
        "import.peak": read.peak,
        "export.seconds": wrote.seconds,
        "export.peak": wrote.peak,
      }
    )
  )


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--layers", type=int, default=16)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--folder", help="the folder for the files; default: a temporary folder")
  parser.add_argument("--contest", nargs=3, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.contest:
    contest(args.contest[0], Path(args.contest[1]), Path(args.contest[2]))
    return
  with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    source, target = Path(folder) / "source", Path(folder) / "target"
    write_source(source, shape(args.layers))
    size = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for i in range(args.rounds):
      for name in CONTESTANTS[:: 1 if i % 2 else -1]:
        line = [sys.executable, __file__, "--contest", name, str(source), str(target)]
        done = subprocess.run(line, stdout=subprocess.PIPE, check=True, text=True)
        rows[name].append(json.loads(done.stdout.splitlines()[-1]))
        shutil.rmtree(target)
  figures: dict[str, float] = {"gigabytes": size / 1e9}
  for what in ("import", "export"):
    # The bytes of the parameters themselves are not counted for the import.
    made = size if what == "import" else 0
    for name in CONTESTANTS:
      seconds = statistics.median(r[f"{what}.seconds"] for r in rows[name])
      extra = max(r[f"{what}.peak"] for r in rows[name]) - made
      figures |= {f"{name}.{what}_gb_per_second": size / 1e9 / seconds}
      figures |= {f"{name}.{what}_peak_extra_bytes": extra}
    pairs = zip(*(rows[name] for name in CONTESTANTS), strict=True)
    ratios = [b[f"{what}.seconds"] / a[f"{what}.seconds"] for a, b in pairs]
    figures |= {f"{what}_ratio_to_transformers": statistics.median(ratios)}
    figures |= {f"{what}_peak_extra_bytes": figures[f"ours.{what}_peak_extra_bytes"]}
  for key, value in figures.items():
    print(f"{key:44}{value:18,.3f}")
  print(f"load {os.getloadavg()[0]:.1f}")
  print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


if __name__ == "__main__":
  main()
