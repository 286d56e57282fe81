"""Measures the speed of one GPU in eight minutes, without a network.

  python tools/bench/gpu.py [--parts=kernels,parity,step,record,decode,head] [--small]

Each part runs in a separate process, so that it has the whole memory and an error ends only this
part. All models have random weights, and the computation is in bfloat16.

  kernels  forward and backward pass of attention over a row of 8,192 positions in documents of
           about 1,024, for each kernel of nn/attention.py: milliseconds, the time in units of
           XLA's, and the largest difference from XLA's output;
  parity   logits of a model with 4 layers of Qwen2.5-1.5B, and the gradient of its loss: the mean
           KL divergence of bfloat16 here from float32 on the CPU, and the angle between gradients;
  step     a training step of Qwen2.5-1.5B (float32 weights, AdamW): from records of 63 points, and
           with an online teacher of 7B: seconds, tokens per second and MFU;
  record   Qwen2.5-7B as the teacher: the pass that records 63 points over the pass that computes
           only the cross-entropy, tokens per second, and MFU;
  decode   Qwen2.5-1.5B with 1 and 64 rows, after prompts of 512 tokens: tokens per second, and the
           bytes of weights and cache that a token needs over the bytes that the memory delivers in
           that time;
  head     loss and gradient of the fused head of Qwen2.5-1.5B, from records and online, over the
           matrix products alone.

MFU is the number of operations of the model by preflight/flops.py, without recomputation, over the
time and the published peak of the card (PEAKS in tools/gpu_parts.py); it is missing for other
cards. Times are medians over rounds. `--small` uses tiny shapes, also on a CPU. The last line is a
JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PARTS = ("kernels", "parity", "step", "record", "decode", "head")
PARTS_FILE = Path(__file__).parents[1] / "gpu_parts.py"
LIMIT = 150  # seconds for one part
Figures = dict[str, Any]


def run_part(name: str, small: bool) -> Figures:
  """Runs a part in another process; returns its figures, or its error."""
  line = [sys.executable, str(PARTS_FILE), name, *(["--small"] if small else [])]
  start = time.perf_counter()
  try:
    done = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT, check=False)
  except subprocess.TimeoutExpired:
    return {f"{name}.error": f"not finished after {LIMIT} s"}
  if done.returncode:
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {f"{name}.error": f"exit {done.returncode}, {last}"}
  found = json.loads(done.stdout.splitlines()[-1])
  return {f"{name}.{k}": v for k, v in found.items()} | {
    f"{name}.part_seconds": time.perf_counter() - start
  }


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--parts", default=",".join(PARTS))
  parser.add_argument("--small", action="store_true", help="tiny shapes, to check the script")
  args = parser.parse_args()
  figures: Figures = {}
  for name in args.parts.split(","):
    new = run_part(name, args.small)
    for key, value in new.items():
      print(f"{key:44}{value:>20}" if isinstance(value, str) else f"{key:44}{value:20,.4f}")
    figures |= new
  print(json.dumps(figures))


if __name__ == "__main__":
  main()
