"""The shapes that tools/bench/peers.py compares, and a clock for steps.

It needs the standard library alone, so that the interpreter of any library can import it.
"""

from __future__ import annotations

import json
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any

# Models like Qwen3, in float32, with a tied embedding.
SHAPES: dict[str, dict[str, Any]] = {
  # The layers and the logits both matter.
  "small32k": {
    "vocab": 32_768,
    "batch": 4,
    "seq": 256,
    "steps": 8,
    "warmup": 2,
    "student": {"d": 256, "layers": 4, "heads": 4, "kv": 2, "head_dim": 64, "ffn": 768},
    "teacher": {"d": 512, "layers": 8, "heads": 8, "kv": 4, "head_dim": 64, "ffn": 1_536},
  },
  # The vocabulary of Qwen3 with small layers: the logits dominate.
  "vocab152k": {
    "vocab": 151_936,
    "batch": 2,
    "seq": 512,
    "steps": 6,
    "warmup": 2,
    "student": {"d": 128, "layers": 2, "heads": 2, "kv": 1, "head_dim": 64, "ffn": 384},
    "teacher": {"d": 256, "layers": 4, "heads": 4, "kv": 2, "head_dim": 64, "ffn": 768},
  },
  # To check that a script runs.
  "smoke": {
    "vocab": 1_024,
    "batch": 2,
    "seq": 32,
    "steps": 4,
    "warmup": 1,
    "student": {"d": 64, "layers": 2, "heads": 2, "kv": 1, "head_dim": 32, "ffn": 128},
    "teacher": {"d": 64, "layers": 2, "heads": 2, "kv": 1, "head_dim": 32, "ffn": 128},
  },
}
TEMPERATURE, LEARNING_RATE = 2.0, 1e-4


def qwen3_config(shape: str, model: str) -> dict[str, Any]:
  """Returns the config of a model, "student" or "teacher", by the names of Hugging Face's Qwen3."""
  c = SHAPES[shape]
  sizes = c[model]
  return {
    "vocab_size": c["vocab"],
    "hidden_size": sizes["d"],
    "intermediate_size": sizes["ffn"],
    "num_hidden_layers": sizes["layers"],
    "num_attention_heads": sizes["heads"],
    "num_key_value_heads": sizes["kv"],
    "head_dim": sizes["head_dim"],
    "max_position_embeddings": c["seq"],
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
  }


def peak_bytes() -> int:
  """Returns the largest resident memory of this process since the last `reset_peak`."""
  lines = Path("/proc/self/status").read_text().splitlines()
  return 1_024 * int(next(x for x in lines if x.startswith("VmHWM")).split()[1])


def reset_peak() -> None:
  """Restarts the kernel's mark of the largest resident memory."""
  Path("/proc/self/clear_refs").write_text("5")


class StepClock:
  """Measures the steps of a trainer. `tick` is called when the result of a step is on the host.

  Args:
    warmup: The number of first steps that do not count.
  """

  def __init__(self, warmup: int):
    self._warmup, self._first_peak = warmup, 0
    self._wall: list[float] = []
    self._cpu: list[float] = []
    self.start()

  def start(self) -> None:
    """Begins the first step."""
    self._begun = time.perf_counter(), time.process_time()

  def tick(self) -> None:
    """Ends a step, and begins the next one."""
    now = time.perf_counter(), time.process_time()
    self._wall.append(now[0] - self._begun[0])
    self._cpu.append(now[1] - self._begun[1])
    if len(self._wall) == self._warmup:
      self._first_peak = peak_bytes()
      reset_peak()
    self.start()

  def report(self, shape: str, packages: tuple[str, ...]) -> None:
    """Prints the figures of the steps after the first ones, as one line of JSON."""
    wall = statistics.median(self._wall[self._warmup :])
    tokens = SHAPES[shape]["batch"] * SHAPES[shape]["seq"]
    figures = {
      "step_seconds": wall,
      "cpu_seconds": statistics.median(self._cpu[self._warmup :]),
      "tokens_per_second": tokens / wall,
      "peak_bytes": max(self._first_peak, peak_bytes()),
      "compile_seconds": max(self._wall[0] - wall, 0.0),
      "versions": {name: metadata.version(name) for name in packages},
    }
    print(json.dumps(figures), flush=True)
