"""Compares writing and reading records with a store of tf.train.Example, on one core.

  python tools/bench/records_io.py [--sequences=64] [--seq_len=1024]

Our records are sampled with 63 points and a vocabulary of 151,936, about 12.7 entries per token.
The other store is that of public offline distillation: tokens, and the ids (int64) and
log-probabilities (float32) of the top 64, in a tf.train.Example, in the same container
(array_record, with its compression), read to numpy by protobuf without TensorFlow. The teacher is
random: each position has a few likely tokens and a tail. Ids are Zipf-distributed and permuted over
the vocabulary, which is the worst case for our coding of ids, because in real vocabularies frequent
ids are low. Our records are read 8 at a time, as the loader reads those of a batch. Times are CPU
times of this process, for reading the best of several rounds, in which both stores are read in
turn. Bytes are those of complete files. The last line is a JSON object.

Reading with --rounds=8 on one of two cores that other processes used (load 2.3 to 2.5, two runs):
1.26 and 1.48 million tokens per second, 1.72 and 1.82 times as fast as the other store. The version
that decoded each record alone: 1.12 million, 1.41 times. records/elias_fano.py names the bound.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from distill_jax.records import describe, store

V, N, TOP = 151_936, 63, 64
BATCH = 8  # records that are read at once


def teacher(seq_len: int, seed: int) -> dict[str, np.ndarray]:
  """Returns a sequence of the random teacher: its records, and its top 64 for the other store."""
  rng = np.random.default_rng(seed)
  p = 0.93 * rng.dirichlet(np.full(TOP, 0.05), seq_len)
  p += 0.07 * rng.dirichlet(np.full(TOP, 0.5), seq_len)
  zipf = np.cumsum(1 / np.arange(1, V + 1))
  ids = np.searchsorted(zipf / zipf[-1], rng.random((seq_len, TOP)))
  ids = np.sort(np.random.default_rng(0).permutation(V)[np.minimum(ids, V - 1)], 1)
  x = (rng.random((seq_len, 1)) + np.arange(N)) / N
  which = (np.cumsum(p, 1)[:, None, :] <= x[:, :, None]).sum(-1).clip(0, TOP - 1)
  at = np.arange(seq_len)
  label = (np.cumsum(p, 1) <= rng.random((seq_len, 1))).sum(-1).clip(0, TOP - 1)
  return {
    "tokens_T": ids[at, label],
    "segments_T": np.ones(seq_len, np.int32),
    "mask_T": np.ones(seq_len, bool),
    "ids_TN": np.take_along_axis(ids, which, 1),
    "argmax_T": ids[at, p.argmax(1)],
    "label_logp_T": np.log(p[at, label] + 1e-9),
    "entropy_T": -(p * np.log(p + 1e-30)).sum(1),
    "top_ids": ids,
    "top_logp": np.log(p + 1e-30),
  }


def write_ours(folder: Path, data: list[dict[str, np.ndarray]], shards: int = 1) -> None:
  m = store.Manifest(
    kind="sampled",
    n=N,
    vocab_size=V,
    seq_len=len(data[0]["tokens_T"]),
    teacher={},
    tokenizer="random",  # without one it would be a task
    corpus="",
    sequences_per_shard=len(data) // shards,
    extents=(len(data),),
  )
  with store.Writer(folder, m) as w:
    for r in w.missing():
      w.write_shard(r, (data[i] for i in r))
    w.complete()


def read_ours(opened: store.Store) -> list[dict[str, np.ndarray]]:
  firsts = range(0, len(opened), BATCH)
  return [x for i in firsts for x in opened.read_many(range(i, min(i + BATCH, len(opened))))]


def write_rival(path: Path, data: list[dict[str, np.ndarray]]) -> None:
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for seq in data:
    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature["tokens"].int64_list.value.extend(seq["tokens_T"].tolist())
    feature["ids"].int64_list.value.extend(seq["top_ids"].ravel().tolist())
    feature["logp"].float_list.value.extend(seq["top_logp"].ravel().tolist())
    writer.write(example.SerializeToString())
  writer.close()


def read_rival(path: Path) -> Iterator[dict[str, np.ndarray]]:
  reader = array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0")
  for i in range(reader.num_records()):
    feature = tf_example_pb2.Example.FromString(reader.read([i])[0]).features.feature
    yield {
      "tokens": np.array(feature["tokens"].int64_list.value, np.int32),
      "ids": np.array(feature["ids"].int64_list.value, np.int32).reshape(-1, TOP),
      "logp": np.array(feature["logp"].float_list.value, np.float32).reshape(-1, TOP),
    }


def cpu_seconds(fn: Callable[[], Any]) -> float:
  start = time.process_time()
  fn()
  return time.process_time() - start


def main() -> None:
  args = argparse.ArgumentParser()
  args.add_argument("--sequences", type=int, default=64)
  args.add_argument("--seq_len", type=int, default=1024)
  args.add_argument("--rounds", type=int, default=5, help="of reading")
  args = args.parse_args()
  data = [teacher(args.seq_len, i) for i in range(args.sequences)]
  tokens = args.sequences * args.seq_len
  with tempfile.TemporaryDirectory() as tmp:
    ours, rival = Path(tmp) / "ours", Path(tmp) / "rival.array_record"
    written = cpu_seconds(lambda: write_ours(ours, data))
    rival_written = cpu_seconds(lambda: write_rival(rival, data))
    opened = store.open_store(ours)
    ways = lambda: read_ours(opened), lambda: list(read_rival(rival))
    rounds = [[cpu_seconds(way) for way in ways] for _ in range(args.rounds)]
    read, rival_read = (min(times) for times in zip(*rounds, strict=True))
    figures = describe.describe(opened)
    size, rival_size = figures["bytes"], rival.stat().st_size
  entries = figures["entries_per_target"]
  print("\n".join(f"{name}  {value}" for name, value in figures.items()))
  print(
    json.dumps(
      {
        "read_tokens_per_second_per_core": tokens / read,
        "read_ratio_to_tf_example": rival_read / read,
        "bytes_ratio_to_tf_example": size / rival_size,
        "write_tokens_per_second_per_core": tokens / written,
        "write_ratio_to_tf_example": rival_written / written,
        "bytes_per_token": size / tokens,
        "tf_example_bytes_per_token": rival_size / tokens,
        "entries_per_token": entries,
        "bytes_allowed_per_token": 3 * entries + 6,
      }
    )
  )


if __name__ == "__main__":
  main()
