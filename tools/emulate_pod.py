"""Emulates a pod on this machine, and compares what it writes with what one process writes.

  python tools/emulate_pod.py --store=s3 --axis=tensor [--processes=2] [--growth]

Several processes with one virtual device each (launch/local.py's, with jax.distributed) run

  pack, record -> kill -9 of a process -> record on another number of processes,
  train -> kill -9 -> train on another number of processes, evaluate, export

with every file in an object store (local_stores.py), 4 MiB of private disk, 256 open files and 2
GiB of memory per process (pod_processes.py). All devices lie on one mesh axis, which therefore
crosses the processes. With --growth the corpus and the store are also made ten times larger.

It prints one JSON object: `digests_equal` has for records, losses, evaluation and exported tensors
whether they equal those of a single process with the same mesh; `max_open_files`, `max_disk_bytes`
and `peak_rss_bytes` are maxima over processes; the ratios are the bytes that the busiest process
read over what it needs; `growth` has the quotients of the large run and the small one. The exit
code is 1 if a digest differs or a bound is exceeded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import tokenizers
from local_stores import Store
from pod_config import ROWS_PER_SHARD, SEQ_LEN
from pod_processes import Limits, Usage, run
from safetensors.numpy import save_file

from distill_jax.records import shard_index

MAX_RATIO = 1.5  # bytes read over bytes needed
MAX_GROWTH = 1.1
ROWS = 192  # of the small corpus
LARGER = 10
# Columns that differ between runs.
CLOCK = ("step_seconds", "tokens_per_second", "goodput", "generate_seconds", "score_seconds")


def write_model(folder: Path, width: int, layers: int) -> None:
  """Writes a Llama checkpoint of random weights with a byte tokenizer, as on the Hub."""
  folder.mkdir()
  vocab, mlp, heads = 256, 2 * width, 4
  config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": vocab,
    "hidden_size": width,
    "intermediate_size": mlp,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "num_key_value_heads": heads,
    "head_dim": width // heads,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "float32",
  }
  (folder / "config.json").write_text(json.dumps(config))
  rng = np.random.default_rng(width)

  def normal(*shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) / math.sqrt(width)).astype(np.float32)

  tensors = {
    "model.embed_tokens.weight": normal(vocab, width),
    "lm_head.weight": normal(vocab, width),
  }
  tensors["model.norm.weight"] = np.ones(width, np.float32)
  for i in range(layers):
    layer = f"model.layers.{i}."
    for name in ("q", "k", "v", "o"):
      tensors[f"{layer}self_attn.{name}_proj.weight"] = normal(width, width)
    tensors[f"{layer}mlp.gate_proj.weight"] = normal(mlp, width)
    tensors[f"{layer}mlp.up_proj.weight"] = normal(mlp, width)
    tensors[f"{layer}mlp.down_proj.weight"] = normal(width, mlp)
    for name in ("input_layernorm", "post_attention_layernorm"):
      tensors[f"{layer}{name}.weight"] = np.ones(width, np.float32)
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.save(str(folder / "tokenizer.json"))


def write_corpus(folder: Path, rows: int) -> None:
  """Writes documents that fill about this many rows, in files of 100."""
  folder.mkdir()
  rng = random.Random(0)
  documents = max(1, int(rows / 0.9 * SEQ_LEN / 70))
  lines = [
    json.dumps({"text": f"{i} times {n} is {i * n}. " + "So it goes. " * rng.randrange(1, 7)})
    for i, n in ((i, rng.randrange(1000)) for i in range(documents))
  ]
  for at in range(0, documents, 100):
    (folder / f"{at // 100:05d}.jsonl").write_text("\n".join(lines[at : at + 100]) + "\n")


class Rig:
  """A store with models and a corpus, and the commands on it.

  Attributes:
    usages: What each process of the pod has used, by step.
  """

  def __init__(self, store: Store, axis: str, processes: int):
    self.store, self.axis, self.processes = store, axis, processes
    self.usages: dict[str, list[Usage]] = {}
    os.environ.update(store.environment())
    self.fs = fsspec.filesystem(store.kind, **store.options(), use_listings_cache=False)

  def prepare(self, name: str, rows: int) -> str:
    """Puts models and a corpus into the store, and packs it; returns the URL."""
    url = f"{self.store.url}/{name}"
    with tempfile.TemporaryDirectory() as tmp:
      folder = Path(tmp) / name
      folder.mkdir()
      write_model(folder / "teacher", width=256, layers=4)
      write_model(folder / "student", width=64, layers=2)
      write_corpus(folder / "corpus", rows)
      for path in folder.rglob("*"):
        if path.is_file():
          self.fs.put_file(str(path), f"{url}/{path.relative_to(folder)}")
    shard = f"--config.records.tokens_per_shard={8 * ROWS_PER_SHARD * SEQ_LEN}"  # rows are small
    pack = ["pack", "--config.data.packed=", shard]
    self.step(f"{name}: pack", pack, url, url, "packed", 1, Limits())
    return url

  def step(
    self,
    name: str,
    verb: list[str],
    url: str,
    out: str,
    workdir: str,
    processes: int,
    limits: Limits | None,
    kill_when: Callable[[], bool] | None = None,
  ) -> list[Usage]:
    """Runs a command, and raises if it fails, or if it is to be killed and ends before."""
    started = time.monotonic()
    config = f"--config={Path(__file__).parent}/pod_config.py:{url},{self.axis},{out}"
    words = [*verb[:1], config, f"--workdir={out}/{workdir}", *verb[1:]]
    devices = self.processes // processes
    usages = run(self.store, words, processes, devices, limits, kill_when)
    codes = [usage.code for usage in usages]
    print(f"{name}: {time.monotonic() - started:.0f} s, exit codes {codes}", file=sys.stderr)
    if (kill_when is None and any(codes)) or (kill_when is not None and not any(codes)):
      output = "\n".join(f"[{i}] {usage.output[-3000:]}" for i, usage in enumerate(usages))
      raise RuntimeError(f"{name} has exit codes {codes}.\n{output}")
    if limits is not None:
      self.usages[name] = usages
    return usages

  def count(self, folder: str, ending: str) -> int:
    """Returns the number of files below a folder whose names have this ending."""
    return sum(path.endswith(ending) for path in self._find(folder))

  def _find(self, folder: str) -> list[str]:
    try:
      return self.fs.find(folder.partition("://")[2])
    except FileNotFoundError:
      return []

  def row_bytes(self, folder: str) -> int:
    """Returns the bytes of all records of a store, without the padding of its files."""
    indices = [self.fs.cat_file(p) for p in self._find(folder) if p.endswith(".index")]
    counts = [
      (len(data) - shard_index.size_of(0)) // shard_index.ENTRY.itemsize for data in indices
    ]
    entries = (shard_index.parse(*found) for found in zip(indices, counts, strict=True))
    return sum(int(entry["length"].sum()) for entry in entries)

  def digests(self, out: str) -> dict[str, Any]:
    """Returns what a chain of commands has written, without times and addresses."""
    root = out.partition("://")[2]
    metrics = self.fs.cat_file(f"{root}/student/metrics.jsonl").splitlines()
    models = json.loads(self.fs.cat_file(f"{root}/evaluation/evaluation.json"))["models"]
    return {
      "records": self.hashes(f"{out}/records", (".array_record", ".index")),
      "losses": [_without_clock(json.loads(row)) for row in metrics],
      "evaluation": {name: _without_clock(figures) for name, figures in models.items()},
      "exported": self.hashes(f"{out}/export", (".safetensors",)),
    }

  def hashes(self, folder: str, endings: tuple[str, ...]) -> dict[str, str]:
    """Returns the sha256 of the files below a folder with one of these endings, by name."""
    paths = [path for path in self._find(folder) if path.endswith(endings)]
    return {
      path.rpartition("/")[2]: hashlib.sha256(self.fs.cat_file(path)).hexdigest() for path in paths
    }


def _without_clock(figures: dict[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in figures.items() if name not in CLOCK}


def chain(rig: Rig, url: str, out: str, limits: Limits | None) -> None:
  """Runs record, train, evaluate and export; with limits, as a pod that loses processes."""
  label = "pod" if limits else "one process"
  several = rig.processes if limits else 1

  def step(verb: str, workdir: str, processes: int, again: str = "", kill_when=None) -> None:
    name = f"{label}: {verb}{again}"
    rig.step(name, [verb], url, out, workdir, processes, limits, kill_when)

  if limits:
    notes = ".array_record.json"
    step("record", "records", several, ", killed", lambda: rig.count(f"{out}/records", notes) >= 2)
    step("record", "records", 1, ", resumed")
    step(
      "train",
      "student",
      1,
      ", killed",
      lambda: rig.count(f"{out}/student", "_CHECKPOINT_METADATA") >= 1,
    )
    step("train", "student", several, ", resumed")
  else:
    step("record", "records", 1)
    step("train", "student", 1)
  step("evaluate", "evaluation", several)
  step("export", "student", several)


def grow(rig: Rig, small: str, large: str) -> tuple[dict[str, float], dict[str, float]]:
  """Runs record and train on both corpora; returns the ratios of reads, and the growth."""
  ratios, figures = {}, {}
  for url in (small, large):
    out = f"{url}/growth"
    of_record = rig.step(f"{url}: record", ["record"], url, out, "records", rig.processes, Limits())
    of_train = rig.step(f"{url}: train", ["train"], url, out, "student", rig.processes, Limits())
    groups = 1 if rig.axis in ("context", "tensor") else rig.processes
    rows = rig.count(f"{out}/records", ".array_record.json") * ROWS_PER_SHARD
    trained = 60 * 8 / groups / rows  # the share of the store that a process trains on
    weights = rig.fs.size(f"{url}/teacher/model.safetensors") / rig.processes
    ratios = {
      "record_read_ratio": _busiest(of_record, "/packed/")
      / (rig.row_bytes(f"{url}/packed") / groups),
      "weights_read_ratio": _busiest(of_record, "model.safetensors") / weights,
      "train_read_ratio": _busiest(of_train, "/records/")
      / (rig.row_bytes(f"{out}/records") * trained),
    }
    both = of_record + of_train
    figures[url] = {
      "max_open_files": max(u.open_files for u in both),
      "max_disk_bytes": max(u.disk_bytes for u in both),
      "peak_rss_bytes": max(u.rss_bytes for u in both),
      **ratios,
    }
  growth = {k: figures[large][k] / figures[small][k] for k in figures[small]}
  return ratios, growth


def _busiest(usages: list[Usage], part: str) -> int:
  return max(usage.read_bytes(part) for usage in usages)


def main() -> None:
  """Runs the emulation and prints its result."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--store", choices=("s3", "gs"), default="s3")
  parser.add_argument("--axis", choices=("data", "fsdp", "context", "tensor"), default="tensor")
  parser.add_argument("--processes", type=int, default=2)
  parser.add_argument("--growth", action="store_true", help="also a corpus ten times larger")
  args = parser.parse_args()
  with Store(args.store) as store:
    rig = Rig(store, args.axis, args.processes)
    url = rig.prepare("small", ROWS)
    chain(rig, url, f"{url}/one", None)
    chain(rig, url, f"{url}/pod", Limits())
    expected, found = rig.digests(f"{url}/one"), rig.digests(f"{url}/pod")
    for name in expected:
      if found[name] != expected[name]:
        print(
          f"{name} of one process: {expected[name]}\n{name} of the pod: {found[name]}",
          file=sys.stderr,
        )
    result: dict[str, Any] = {
      "store": args.store,
      "axis": args.axis,
      "processes": args.processes,
      "digests_equal": {name: found[name] == expected[name] for name in expected},
    }
    ratios, growth = {}, {}
    if args.growth:
      ratios, growth = grow(rig, url, rig.prepare("large", LARGER * ROWS))
    usages = [usage for step in rig.usages.values() for usage in step]
    result |= {
      "max_open_files": max(u.open_files for u in usages),
      "max_disk_bytes": max(u.disk_bytes for u in usages),
      "peak_rss_bytes": max(u.rss_bytes for u in usages),
      **ratios,
      "growth": growth,
    }
  print(json.dumps(result))
  passed = all(result["digests_equal"].values())
  passed &= all(ratio <= MAX_RATIO for ratio in ratios.values())
  passed &= all(value <= MAX_GROWTH for value in growth.values())
  sys.exit(0 if passed else 1)


if __name__ == "__main__":
  main()
