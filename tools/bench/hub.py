"""Compares import and export with transformers for the same model, and export with a plain copy.

  python tools/bench/hub.py [--layers=16] [--rounds=3] [--folder=DIR] [--only=import|export]

The model is a llama of width 2,048 in bfloat16 with random weights (16 layers: 1.2 billion
parameters, 2.4 GB), written once as a folder with several shards, which stay in the page cache.

Import ends when the bfloat16 parameters can be used; imports of Python modules of the model count.
Each import is a separate process, in turn. Export ends when the folder is synced to disk: after
transformers' `save_pretrained` and after the copy, each file and the folder are synced. Exports
are made in one process, in turn.

`*_ratio_to_*` is our speed over theirs by wall time and `*_cpu_ratio_to_*` by CPU time of the
process, the median over rounds. `*_peak_extra_bytes` is the peak of resident memory in addition to
the memory at the start and the parameters; mapped files count. The last line is a JSON object.
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

LOADERS = ("ours", "transformers")
SAVERS = (*LOADERS, "copy")
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
  """A context manager that measures wall time, CPU time, and the increase of peak memory."""

  def __enter__(self):
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    self._before, self._cpu, self._start = memory("VmRSS"), time.process_time(), time.perf_counter()
    return self

  def __exit__(self, *_):
    self.seconds = time.perf_counter() - self._start
    self.cpu = time.process_time() - self._cpu
    self.peak = memory("VmHWM") - self._before

  def figures(self) -> dict[str, float]:
    return {"seconds": self.seconds, "cpu": self.cpu, "peak": self.peak}


def our_model(source: Path):
  import jax

  from distill_jax.hub import load
  from distill_jax.hub.pretrained import open_model
  from distill_jax.nn import sharding
  from distill_jax.nn.layers import ComputeConfig

  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with Measured() as measured:
    model = load.load_model(open_model(str(source)), mesh, ComputeConfig(dtype=DTYPE), DTYPE)
    jax.block_until_ready(model)
  return model, measured


def their_model(source: Path):
  import torch
  import transformers

  with Measured() as measured:
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    for p in model.parameters():  # reads the weights, which are mapped files
      p.data = p.data.clone()
  return model, measured


def sync(folder: Path) -> None:
  """Syncs each file of a folder, and the folder."""
  for path in (*folder.iterdir(), folder):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def exports(source: Path, target: Path, rounds: int) -> list[dict[str, dict[str, float]]]:
  """Returns the figures of each saver in each round."""
  from distill_jax.hub import export

  ours, theirs = our_model(source)[0], their_model(source)[0]

  def save(name: str) -> None:
    if name == "ours":
      export.export_model(ours, target, tokenizer=None, generation={}, card="", dtype=DTYPE)
    elif name == "transformers":
      theirs.save_pretrained(target, max_shard_size="5GB")
      sync(target)
    else:
      shutil.copytree(source, target)
      sync(target)

  rows = []
  for i in range(-1, rounds):  # the first is not measured
    row = {}
    for name in SAVERS[:: 1 if i % 2 else -1]:
      with Measured() as measured:
        save(name)
      row[name] = measured.figures()
      shutil.rmtree(target)
    rows.append(row)
  return rows[1:]


def imports(source: Path, rounds: int) -> list[dict[str, dict[str, float]]]:
  """Returns the figures of each loader in each round, by processes."""
  rows = []
  for i in range(rounds):
    row = {}
    for name in LOADERS[:: 1 if i % 2 else -1]:
      line = [sys.executable, __file__, "--load", name, str(source)]
      done = subprocess.run(line, stdout=subprocess.PIPE, check=True, text=True)
      row[name] = json.loads(done.stdout.splitlines()[-1])
    rows.append(row)
  return rows


def summary(what: str, rows: list[dict[str, dict[str, float]]], size: int) -> dict[str, float]:
  """Returns the figures of import or export over the rounds."""
  figures: dict[str, float] = {}
  for name in rows[0]:
    for key in ("seconds", "cpu"):
      median = statistics.median(row[name][key] for row in rows)
      figures[f"{name}.{what}_gb_per_{key.removesuffix('s')}"] = size / 1e9 / median
    # The bytes of the parameters themselves are not counted for the import.
    extra = max(row[name]["peak"] for row in rows) - (size if what == "import" else 0)
    figures[f"{name}.{what}_peak_extra_bytes"] = extra
  for name in rows[0].keys() - {"ours"}:
    for key, text in (("seconds", ""), ("cpu", "cpu_")):
      ratio = statistics.median(row[name][key] / row["ours"][key] for row in rows)
      figures[f"{what}_{text}ratio_to_{name}"] = ratio
  return figures | {f"{what}_peak_extra_bytes": figures[f"ours.{what}_peak_extra_bytes"]}


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--layers", type=int, default=16)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--folder", help="the folder for the files; default: a temporary folder")
  parser.add_argument("--only", choices=("import", "export"))
  parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.load:
    loader = our_model if args.load[0] == "ours" else their_model
    print(json.dumps(loader(Path(args.load[1]))[1].figures()))
    return
  figures: dict[str, float] = {}
  with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    source, target = Path(folder) / "source", Path(folder) / "target"
    write_source(source, shape(args.layers))
    size = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    figures["gigabytes"] = size / 1e9
    if args.only != "export":
      figures |= summary("import", imports(source, args.rounds), size)
    if args.only != "import":
      figures |= summary("export", exports(source, target, args.rounds), size)
  for key, value in figures.items():
    print(f"{key:44}{value:18,.3f}")
  print(f"load {os.getloadavg()[0]:.1f}")
  print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


if __name__ == "__main__":
  main()
