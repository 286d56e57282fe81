"""Counts the blocks of pairs that splash attention computes in rows of packed documents.

  python tools/bench/attention.py [--rows=32] [--mean=5000] [--lengths=4096,32768,131072]

Documents have log-normal lengths with this mean and a sigma of 1; longer ones than a row are cut
off, and a document that does not fit begins the next row (next-fit). Counts are means over rows,
for one head and one pass, from the list that the kernel itself follows (splash.visited_blocks). For
each length of rows T it prints

  T.block            the size of blocks, splash.block_size;
  T.computed_share   the pairs in computed blocks, divided by those of the whole triangle, which
                     jax's own mask computes with blocks of 512;
  T.attended_share   the pairs within documents, divided by those of the triangle, the least
                     possible;
  T.step_share       the steps of the grid, with a block or without, divided by those of jax's own
                     mask;
  T.windowed_share   the pairs in computed blocks with a window of 1,024, divided by those of
                     jax's own mask with this window.

The last line is a JSON object. The counts depend neither on the machine nor on a TPU.
"""

from __future__ import annotations

import argparse
import json

import jax.numpy as jnp
import numpy as np

from distill_jax.nn import splash

SIGMA, BEFORE, WINDOW = 1.0, 512, 1_024


def packed_segments(rows: int, T: int, mean: float) -> np.ndarray:
  """Returns the segments of next-fit packed rows, [rows, T]; 0 is padding."""
  rng = np.random.default_rng(0)
  segments_BT = np.zeros((rows, T), np.int32)
  row, used, number = 0, 0, 1
  while True:
    size = int(np.clip(rng.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA), 1, T))
    if used + size > T:
      row, used, number = row + 1, 0, 1
      if row == rows:
        return segments_BT
    segments_BT[row, used : used + size] = number
    used, number = used + size, number + 1


def computed_pairs(segments_BT: np.ndarray, block: int, window: int | None) -> float:
  """Returns the mean number of pairs in the computed blocks of a row."""
  index_T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
  first, last = splash.visited_blocks(jnp.asarray(segments_BT), index_T, window, block, block)
  return float((last - first + 1).sum() / len(segments_BT)) * block**2


def main(rows: int, mean: float, lengths: tuple[int, ...]) -> dict[str, float]:
  """Returns the shares by their names."""
  result: dict[str, float] = {}
  for T in lengths:
    segments_BT, one_segment_1T = packed_segments(rows, T, mean), np.ones((1, T), np.int32)
    block = splash.block_size(T, None)
    changes = np.pad(np.diff(segments_BT) != 0, ((0, 0), (1, 1)), constant_values=True)
    edges = [np.flatnonzero(row) for row in changes]
    attended = np.mean([(np.diff(e) * (np.diff(e) + 1.0) / 2).sum() for e in edges])
    before = computed_pairs(one_segment_1T, BEFORE, None)
    windowed = computed_pairs(segments_BT, splash.block_size(T, WINDOW), WINDOW)
    result |= {
      f"{T}.block": block,
      f"{T}.computed_share": computed_pairs(segments_BT, block, None) / before,
      f"{T}.attended_share": attended / (T * (T + 1) / 2),
      f"{T}.step_share": (BEFORE / block) ** 2,
      f"{T}.windowed_share": windowed / computed_pairs(one_segment_1T, BEFORE, WINDOW),
    }
  return result


if __name__ == "__main__":
  parser = argparse.ArgumentParser()
  parser.add_argument("--rows", type=int, default=32)
  parser.add_argument("--mean", type=float, default=5_000)
  parser.add_argument("--lengths", default="4096,32768,131072")
  args = parser.parse_args()
  shares = main(args.rows, args.mean, tuple(map(int, args.lengths.split(","))))
  for name, value in shares.items():
    print(f"{name:<24}{value:>10.4g}")
  print(json.dumps(shares))
