"""Compares loading a model from a bucket by ranges with downloading it first and then reading it.

  python tools/bench/remote_weights.py [--layers=4] [--rounds=5]

The store is a GCS server on this machine. The model is a llama of width 1,024 in bfloat16 with
random weights (4 layers: 130 million parameters, 0.26 GB). Both sides end with parameters in
bfloat16 and the model's digest. `download` is what this project did before: it copies the files one
after the other, hashes their bytes, and reads the parameters from the disk. `ranges` takes the
checksum of the store and reads the tensors by ranges. The two alternate. `ratio` is the time of
`download` over that of `ranges`, the median over rounds. The bytes that each writes to the disk are
counted, too. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from local_stores import Store

SIDES = ("ranges", "download")


def write_model(folder: Path, layers: int) -> None:
  from hub import write_source

  from distill_jax.models import llama

  shape = llama.Config(
    vocab_size=32_768,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=layers,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
  )
  write_source(folder, shape, shard_bytes=10**8)


def load(source: str) -> str:
  """Loads the model; returns its digest."""
  import jax

  from distill_jax.hub import load as loading
  from distill_jax.hub import pretrained
  from distill_jax.nn import sharding
  from distill_jax.nn.layers import ComputeConfig

  pretrained._open_folder.cache_clear()
  opened = pretrained.open_model(source)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  jax.block_until_ready(
    loading.load_model(opened, mesh, ComputeConfig(dtype="bfloat16"), "bfloat16")
  )
  return opened.digest


def run(side: str, url: str) -> tuple[float, int]:
  """Returns the seconds, and the bytes written to the disk."""
  from distill_jax.runtime import remote_files

  with tempfile.TemporaryDirectory() as folder:
    os.environ["DISTILL_JAX_CACHE"] = folder  # no digest is known
    start = time.perf_counter()
    if side == "ranges":
      load(url)
      return time.perf_counter() - start, 0
    fs, root = remote_files.resolve(url)
    copy = Path(folder) / "copy"
    copy.mkdir()
    for name in fs.ls(root, detail=False):
      fs.get_file(name, str(copy / name.rpartition("/")[2]))
    load(str(copy))
    seconds = time.perf_counter() - start
    return seconds, sum(p.stat().st_size for p in copy.iterdir())


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--layers", type=int, default=4)
  parser.add_argument("--rounds", type=int, default=5)
  args = parser.parse_args()
  with Store("gs") as store, tempfile.TemporaryDirectory() as folder:
    os.environ |= store.environment()
    from distill_jax.runtime import files

    source = Path(folder) / "model"
    write_model(source, args.layers)
    size, url = 0, f"{store.url}/model"
    for path in source.iterdir():
      files.upload(path, f"{url}/{path.name}")
      size += path.stat().st_size
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    written = {}
    for i in range(args.rounds + 1):
      for side in SIDES[:: 1 if i % 2 else -1]:
        took, written[side] = run(side, url)
        if i:  # the first round warms up
          seconds[side].append(took)
  figures = {"gigabytes": size / 1e9}
  for side in SIDES:
    figures[f"{side}.gb_per_second"] = size / 1e9 / statistics.median(seconds[side])
    figures[f"{side}.disk_bytes"] = written[side]
  pairs = zip(seconds["ranges"], seconds["download"], strict=True)
  figures["ratio"] = statistics.median(b / a for a, b in pairs)
  for key, value in figures.items():
    print(f"{key:44}{value:18,.3f}")
  print(f"load {os.getloadavg()[0]:.1f}")
  print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


if __name__ == "__main__":
  main()
