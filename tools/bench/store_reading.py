"""Compares reading records by range with array_record's reader, on a disk and over a network.

  python tools/bench/store_reading.py [--sequences=64] [--seq_len=4096] [--delay=0.05]

The records are those of records_io.py, sampled with 63 points. On the disk, single records are read
in random order: `read_ratio` is the time of array_record's reader over that of a Store, for bytes
only, and `decoded_ratio` for decoded records; the rounds alternate, and each figure is a median.
`many_shards_ratio` is the time of a batch of 128 short records, of 4 tokens, from 40 shards of 512
records over that from one shard, in random order.

Over the network, a GCS server on this machine answers each request after `delay` seconds. The
training loader, with batches of 16 rows, runs in a separate process. `rows_per_second` is its
speed, `over_disk` compares with its speed on the disk, `over_one_by_one` with single rows that are
read one after the other, and `over_v5p_host` with the 7.6 rows per second that a host of four v5p
chips trains of record R1. `read_ratio_network` is the bytes of all responses over those of the
rows. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import records_io
from array_record.python import array_record_module

from distill_jax.records import shards, tf_example
from distill_jax.records.store import Store, open_store
from distill_jax.runtime import files
from distill_jax.training import loader

sys.path.insert(0, str(Path(__file__).parents[1]))
import local_stores  # noqa: E402

BATCH, ROUNDS, R1_ROWS = 16, 7, 7.6
SHORT, SHORT_BATCH, SHARDS = 4, 128, 40  # tokens of a short record, records of a batch, shards


def seconds(fn: Callable[[int], object], order: np.ndarray) -> float:
  """Returns the mean time of fn(i)."""
  start = time.perf_counter()
  for i in order.tolist():
    fn(i)
  return (time.perf_counter() - start) / len(order)


def local(store: Store) -> dict[str, float]:
  """Returns the ratios on the disk."""
  (shard,), m = store.manifest.shards, store.manifest
  reader = array_record_module.ArrayRecordReader(
    str(Path(store.folder, shard.name)), "readahead_buffer_size:0"
  )
  by_range = shards.open_shards(store.folder, m)
  contestants: list[Callable[[int], object]] = [
    lambda i: reader.read([i]),
    lambda i: by_range.read([(shard, i)]),
    lambda i: tf_example.decode(i, tf_example.parse(reader.read([i])[0]), m),
    lambda i: store[i],
  ]
  order = np.random.default_rng(0).permutation(len(store))
  times = []
  for _ in range(ROUNDS):
    times.append([seconds(fn, order) for fn in contestants])
  raw, ours, decoded, ours_decoded = (list(t) for t in zip(*times, strict=True))
  return {
    "read_ratio": statistics.median(a / b for a, b in zip(raw, ours, strict=True)),
    "decoded_ratio": statistics.median(a / b for a, b in zip(decoded, ours_decoded, strict=True)),
    "microseconds_per_read": statistics.median(ours) * 1e6,
    "milliseconds_per_decoded_read": statistics.median(ours_decoded) * 1e3,
  }


def short(folder: Path) -> dict[str, float]:
  """Returns the ratio of short records, written into a folder."""
  rows = [records_io.teacher(SHORT, i) for i in range(256)] * (SHARDS * 2)
  opened = []
  for count in (SHARDS, 1):
    records_io.write_ours(folder / f"{count}", rows, count)
    opened.append(open_store(folder / f"{count}"))
  batches = np.random.default_rng(0).permutation(len(rows)).reshape(-1, SHORT_BATCH)[:16]
  turns = np.arange(len(batches))
  readers = [lambda i, store=store: store.read_many(batches[i].tolist()) for store in opened]
  times = [[seconds(read, turns) for read in readers] for _ in range(ROUNDS)]
  return {
    "many_shards_ratio": statistics.median(many / single for many, single in times),
    "milliseconds_per_short_batch": statistics.median(many for many, _ in times) * 1e3,
  }


def speeds(url: str, folder: str, limit: float) -> list[float]:
  """Returns rows per second of the loader at a URL and on the disk, and of single reads."""
  stores = [open_store(where) for where in (url, folder)]
  loaders = [loader.batches([store], batch_size=BATCH, seed=0) for store in stores]
  steps = [lambda batches=batches: next(batches) for batches in loaders]
  for step in steps:
    step()
  rates = [rate(step, limit) * BATCH for step in steps]
  turn = itertools.cycle(range(len(stores[0])))
  return [*rates, rate(lambda: stores[0].read_many([next(turn)]), limit / 4)]


def rate(fn: Callable[[], object], limit: float) -> float:
  """Returns the calls per second."""
  start, calls = time.perf_counter(), 0
  while time.perf_counter() - start < limit:
    fn()
    calls += 1
  return calls / (time.perf_counter() - start)


def network(folder: Path, delay: float, limit: float) -> dict[str, float]:
  """Returns the figures with a delayed store."""
  with local_stores.Store("gs") as server, local_stores.Proxy(server.port) as proxy:
    environment = os.environ | server.environment(proxy.port)
    command = [sys.executable, __file__, f"--folder={folder}", f"--url={server.url}/s"]
    subprocess.run([*command, "--upload"], env=environment, check=True)
    proxy.delay = delay
    proxy.requests.clear()
    command.append(f"--seconds={limit}")
    out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    rows, on_disk, single = json.loads(out.stdout.splitlines()[-1])
    records = [r.read_bytes for r in proxy.requests if ".array_record" in r.path]
    return {
      "rows_per_second": rows,
      "over_disk": rows / on_disk,
      "over_one_by_one": rows / single,
      "over_v5p_host": rows / R1_ROWS,
      "read_ratio_network": proxy.read_bytes / sum(records),
    }


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--sequences", type=int, default=64)
  parser.add_argument("--seq_len", type=int, default=4096)
  parser.add_argument("--delay", type=float, default=0.05)
  parser.add_argument("--seconds", type=float, default=10)
  for name in ("--folder", "--url"):
    parser.add_argument(name, help="of the store; set in processes that this one starts")
  parser.add_argument("--upload", action="store_true")
  args = parser.parse_args()
  if args.upload:
    for path in Path(args.folder).glob("[!.]*"):
      files.upload(path, files.join(args.url, path.name))
  elif args.url:
    print(json.dumps(speeds(args.url, args.folder, args.seconds)))
  else:
    with tempfile.TemporaryDirectory() as tmp:
      folder = Path(tmp, "records")
      rows = [records_io.teacher(args.seq_len, i) for i in range(args.sequences)]
      records_io.write_ours(folder, rows)
      store = open_store(folder)
      size = store.manifest.shards[0].bytes / len(store)
      on_disk = local(store) | short(Path(tmp, "short"))
      figures = {"bytes_per_row": size, **on_disk, **network(folder, args.delay, args.seconds)}
    for key, value in figures.items():
      print(f"{key:32}{value:16,.2f}")
    print(f"load {os.getloadavg()[0]:.1f}")
    print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


if __name__ == "__main__":
  main()
