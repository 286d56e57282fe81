"""Measures best-fit packing against next-fit, and the gain of data.buckets.

  python tools/bench/packing.py [--tokens=40000000] [--steps=3]

Lengths are log-normal: around 5,000 tokens in rows of 32,768, and around 300 in rows of 4,096 (keys
that begin with chat_). waste is the share of the rows that is padding. tokens_per_second counts
packing of tokens into rows by one process, from blocks as the workers of `pack` return them. The
rival, next-fit, begins a new row for a document that does not fit into the current one.

buckets_scores is the number of attention scores of all rows with buckets over that without, if a
row of T positions computes T * T / 2 of them; segments_scores is that of scores within documents,
which is what remains where attention skips the other ones. buckets_step is the CPU time of a small
model's step per token, in the mixture of lengths with buckets over that with rows of the longest
length only, for lengths that are divided by 32 (rows of 1,024). The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from distill_jax.data.packing import BestFitPacker, PackedRow, TokenBlock
from distill_jax.losses import ce
from distill_jax.models import llama
from distill_jax.nn.layers import ComputeConfig
from distill_jax.records import collate
from distill_jax.schedules import constant
from distill_jax.training import optim
from distill_jax.training.options import OptimOptions
from distill_jax.training.step import Step

BLOCK = 250_000  # tokens, about a megabyte of text
BUCKETS = (2048, 4096, 8192, 16384, 32768)
SCALE = 32  # between these lengths and those of the small model's step
MODEL = llama.Config(
  vocab_size=256,
  hidden_size=128,
  intermediate_size=256,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=4,
  head_dim=32,
  max_position_embeddings=1024,
)


def lengths(mean: float, sigma: float, tokens: int) -> np.ndarray:
  """Returns log-normal lengths with a mean."""
  draw = np.random.default_rng(0).lognormal(np.log(mean) - sigma**2 / 2, sigma, int(tokens / mean))
  return np.maximum(1, draw.astype(np.int64))


def blocks(length_n: np.ndarray) -> list[TokenBlock]:
  """Returns documents of these lengths in blocks."""
  cuts = np.flatnonzero(np.diff(np.cumsum(length_n) // BLOCK)) + 1
  parts = np.split(length_n, cuts)
  return [TokenBlock(np.ones(part.sum(), np.int32), part) for part in parts]


def next_fit(given: Sequence[TokenBlock], size: int) -> Iterator[np.ndarray]:
  """Yields the tokens of rows of next-fit packing."""
  row: list[np.ndarray] = []
  used = 0
  for block in given:
    start = 0
    for length in block.lengths_n.tolist():
      while length:
        taken = min(length, size)
        if used + taken > size:
          yield np.pad(np.concatenate(row), (0, size - used))
          row, used = [], 0
        row.append(block.ids_X[start : start + taken])
        start, used, length = start + taken, used + taken, length - taken
  if row:
    yield np.pad(np.concatenate(row), (0, size - used))


def best_fit(given: Sequence[TokenBlock], sizes: Sequence[int]) -> Iterator[PackedRow]:
  """Yields rows of best-fit packing."""
  packer = BestFitPacker(sizes)
  for block in given:
    yield from packer.add(block)
  yield from packer.finish()


def compare(length_n: np.ndarray, size: int) -> dict[str, float]:
  """Returns waste and speed of both ways of packing."""
  given, tokens = blocks(length_n), int(length_n.sum())
  out = {}
  for name, pack in (
    ("", lambda: best_fit(given, (size,))),
    ("_next_fit", lambda: next_fit(given, size)),
  ):
    start = time.process_time()
    rows = sum(1 for _ in pack())
    out["waste" + name] = 1 - tokens / (rows * size)
    out["tokens_per_second" + name] = tokens / (time.process_time() - start)
  return out


def scores(length_n: np.ndarray) -> dict[str, float]:
  """Returns the attention scores with buckets, relative to rows of one length, and the waste."""
  given, longest = blocks(length_n), BUCKETS[-1]
  rows = [len(row.tokens_T) for row in best_fit(given, BUCKETS)]
  alone = sum(longest**2 for _ in best_fit(given, (longest,)))
  pieces = np.concatenate([np.full((length_n // longest).sum(), longest), length_n % longest])
  return {
    "buckets_waste": 1 - int(length_n.sum()) / sum(rows),
    "buckets_scores": sum(n * n for n in rows) / alone,
    "segments_scores": float((pieces.astype(float) ** 2).sum()) / alone,
  }


def step_seconds(rows: list[PackedRow], tokens: int, steps: int) -> float:
  """Returns the CPU time of a step of the small model on `tokens` tokens in rows of one length."""
  count = tokens // len(rows[0].tokens_T)
  chosen = [rows[i % len(rows)].record() for i in range(count)]
  batch = jax.tree.map(jax.numpy.asarray, collate.collate(chosen))
  options = OptimOptions()
  step = Step(
    losses={"hard": ce.Loss(weight=constant(1.0))},
    learning_rate=optim.learning_rate(options, 10),
    optimizer=optim.optimizer(options),
    student=ComputeConfig(),
    teacher=ComputeConfig(),
    chunk=128,
  )
  state = step.init(llama.Model(MODEL, jax.random.key(0)))
  run = jax.jit(step)
  jax.block_until_ready(run(state, batch, {}))
  start = time.process_time()
  for _ in range(steps):
    state, _ = jax.block_until_ready(run(state, batch, {}))
  return (time.process_time() - start) / steps


def step_share(length_n: np.ndarray, steps: int) -> float:
  """Returns the time per token of steps with buckets over that with rows of the longest length."""
  given, sizes = blocks(np.maximum(1, length_n // SCALE)), [n // SCALE for n in BUCKETS]
  longest = sizes[-1]
  alone = step_seconds(list(best_fit(given, (longest,)))[:8], longest, steps)
  rows = list(best_fit(given, sizes))
  seconds = 0.0
  for size in sizes:
    of_size = [row for row in rows if len(row.tokens_T) == size]
    seconds += len(of_size) * size / longest * step_seconds(of_size, longest, steps)
  return seconds / (sum(len(row.tokens_T) for row in rows) / longest) / alone


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--tokens", type=int, default=40_000_000)
  parser.add_argument("--steps", type=int, default=3)
  args = parser.parse_args()
  long = lengths(5000, 1.0, args.tokens)
  out = compare(long, BUCKETS[-1])
  chats = compare(lengths(300, 0.8, args.tokens // 4), 4096)
  out |= {f"chat_{key}": x for key, x in chats.items()}
  out |= scores(long) | {"buckets_step": step_share(long[:1000], args.steps)}
  print(json.dumps(out))


if __name__ == "__main__":
  main()
