"""Compares writing and reading records with a store of tf.train.Example, on one core.

  python tools/bench/records_io.py [--sequences=64] [--seq_len=1024]

Our records are sampled with 63 points and a vocabulary of 151,936, about 12.7 entries per token.
The other store is that of public offline distillation: tokens, and the ids (int64) and
log-probabilities (float32) of the top 64, in a tf.train.Example, in the same container
(array_record, with its compression), read to numpy by protobuf without TensorFlow. The teacher is
random: each position has a few likely tokens and a tail. Ids are Zipf-distributed and permuted over
the vocabulary, which is the worst case for our coding of ids, because in real vocabularies frequent
ids are low. Times are CPU times of this process, for reading the best of three. Bytes are those of
complete files. The last line is a JSON object.
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


def write_ours(folder: Path, data: list[dict[str, np.ndarray]]) -> None:
  m = store.Manifest(
    kind="sampled",
    n=N,
    vocab_size=V,
    seq_len=len(data[0]["tokens_T"]),
    teacher={},
    tokenizer="random",  # without one it would be a task
    corpus="",
    sequences_per_shard=len(data),
    extents=(len(data),),
  )
  with store.Writer(folder, m) as w:
    for r in w.missing():
      w.write_shard(r, (data[i] for i in r))
    w.complete()


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


def cpu_seconds(fn: Callable[[], Any], repeat: int = 1) -> float:
  best = float("inf")
  for _ in range(repeat):
    start = time.process_time()
    fn()
    best = min(best, time.process_time() - start)
  return best


def main() -> None:
  args = argparse.ArgumentParser()
  args.add_argument("--sequences", type=int, default=64)
  args.add_argument("--seq_len", type=int, default=1024)
  args = args.parse_args()
  data = [teacher(args.seq_len, i) for i in range(args.sequences)]
  tokens = args.sequences * args.seq_len
  with tempfile.TemporaryDirectory() as tmp:
    ours, rival = Path(tmp) / "ours", Path(tmp) / "rival.array_record"
    written = cpu_seconds(lambda: write_ours(ours, data))
    rival_written = cpu_seconds(lambda: write_rival(rival, data))
    opened = store.open_store(ours)
    read = cpu_seconds(lambda: [opened[i] for i in range(len(opened))], 3)
    rival_read = cpu_seconds(lambda: list(read_rival(rival)), 3)
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
