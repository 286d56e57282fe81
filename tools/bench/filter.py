"""Measures `filter` on samples of 5,000 tokens, and how long 800,000 of them take on 16 cores.

  python tools/bench/filter.py [--prompts=250] [--workers=2]
  python tools/bench/filter.py --compare=800000

The samples are synthetic: 3,200 words of reasoning (18 kB) and an answer, four for each prompt. Of
the answers, 70% are integers, 30% other expressions; a third of them are wrong, and 0.5% let sympy
work until the time limit of 5 s. All times are CPU times, of all processes together, so that other
work on the machine matters less. `filters` has the milliseconds per sample of each filter alone,
`read` those for reading and `write` those for writing a sample. `chain_ms` is measured on the whole
command with the filters of configs/_r1_sft.py and near_duplicates, without the start of the
processes (`start_seconds`), and `chain_hours` is the projection to 800,000 samples on 16 cores. The
last line is a JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np

from distill_jax import config, registry
from distill_jax.commands import filter as filter_command
from distill_jax.data import jsonl
from distill_jax.filters import ComparingFilter, _segments, near_duplicates

SAMPLES, CORES = 800_000, 16
WORDS, VOCABULARY = 3200, 20_000
HOPELESS = 0.005
PR_SET_CHILD_SUBREAPER = 36
TEST = "def check(f):\n  assert f(2) == 4"
CODE = "```python\ndef f(x):\n  return x * x\n```"


def texts_of(rng: random.Random, words: list[str]) -> str:
  """Returns reasoning of WORDS words, in sentences and lines."""
  chosen = rng.choices(
    words, cum_weights=list(itertools.accumulate(1 / (i + 1) for i in range(len(words)))), k=WORDS
  )
  pieces = [f"{word}{rng.choice(['', '', '', ',', '.'])}" for word in chosen]
  return "".join(word + (" " if i % 17 else "\n") for i, word in enumerate(pieces, 1))


def write_samples(path: Path, prompts: int) -> None:
  """Writes a file of samples, four for each prompt."""
  rng = random.Random(0)
  letters = "abcdefghijklmnopqrstuvwxyz"
  words = ["".join(rng.choices(letters, k=rng.randrange(2, 9))) for _ in range(VOCABULARY)]
  with path.open("wb") as f:
    for number in range(prompts):
      a, b = rng.randrange(2, 999), rng.randrange(2, 99)
      key = (
        str(a)
        if rng.random() < 0.7
        else rng.choice([rf"\frac{{{a}}}{{{b}}}", rf"{a}\sqrt{{{b}}}", f"({a},{b})"])
      )
      for i in range(4):
        answer = key if rng.random() < 0.67 else key.replace(str(a), str(a + 1))
        if rng.random() < HOPELESS:
          answer = rf"{a}^{{9^{{9^{{{b}}}}}}}+1"
        row = {
          "id": number,
          "sample": i,
          "prompt": " ".join(rng.choices(words, k=60)),
          "about": {"answer": key, "test": TEST, "entry_point": "f"},
          "text": f"<think>\n{texts_of(rng, words)}\n</think>\nThe answer is \\boxed{{{answer}}}.",
          "reason": "eos",
          "logprob_mean": -0.3,
        }
        f.write(jsonl.to_line(row))


def judge(name: str, path: Path, against: Path) -> None:
  """Reads samples, judges them with one filter, and writes them; "": only reads and writes."""
  fields = {
    "decontaminate": {"against": (str(against),)},
    "pseudo_label": {"labels": ("yes", "no")},
    "regex": {"must": (r"answer is",), "must_not": (r"as an AI",)},
  }
  one_filter = registry.load("filters", name).Filter(**fields.get(name, {})) if name else None
  if one_filter is not None:
    one_filter.prepare()
  size = path.stat().st_size
  with Path(os.devnull).open("wb") as f:
    for lines in _segments.prompts(_segments.Range(str(path), 0, size, size)):
      samples = [line.sample | {"of": len(lines)} for line in lines]
      if name == "code":
        samples = [s | {"text": s["text"] + CODE, "prompt": ""} for s in samples]
      if isinstance(one_filter, ComparingFilter):
        for sample in samples:
          one_filter.signature(sample)
      elif one_filter is not None:
        list(one_filter.select(samples))
      f.writelines(map(jsonl.to_line, samples))


def chain(path: Path, against: Path, workers: int) -> None:
  """Runs the whole command."""
  c = config.base()
  c.filter.samples, c.filter.on_bad, c.filter.workers = str(path), "skip", workers
  c.filters.format = config.filter("format")
  c.filters.right = config.filter("math")
  c.filters.fresh = config.filter("repetition")
  c.filters.unseen = config.filter("decontaminate", against=(str(against),))
  c.filters.new = config.filter("near_duplicates")
  c.filter.order = ("format", "right", "fresh", "unseen", "new")
  with tempfile.TemporaryDirectory() as folder:
    filter_command.run(config.resolve(c), Path(folder))


def compare(texts: int) -> None:
  """Compares signatures with near_duplicates, of which a tenth are near an earlier one.

  The last line is a JSON object: the number of rejected texts, the seconds, and how many bytes of
  memory the comparison takes per text, without the file of signatures.
  """
  one_filter = near_duplicates.Filter()
  shape, rng = (texts, near_duplicates.PERMUTATIONS), np.random.default_rng(0)
  with tempfile.NamedTemporaryFile() as f:
    for at in range(0, texts, 2**16):
      block = rng.integers(0, 2**32, (min(2**16, texts - at), shape[1]), np.uint32)
      copies = rng.integers(1, len(block), len(block) // 10)
      block[copies, 8:] = block[copies // 2, 8:]
      f.write(block.tobytes())
    f.flush()
    signatures = np.memmap(f.name, np.uint32, "r", shape=shape)
    tracemalloc.start()
    start = time.process_time()
    found = one_filter.compare(signatures, np.zeros(texts, np.uint64), np.arange(texts))
    rejected = sum(1 for _ in found)
    seconds = time.process_time() - start
    peak = tracemalloc.get_traced_memory()[1]
  print(
    json.dumps(
      {
        "texts": texts,
        "rejected": rejected,
        "seconds": round(seconds, 1),
        "bytes_per_text": round(peak / texts),
      }
    )
  )


def cpu_seconds(*arguments: object) -> float:
  """Returns the CPU time of this script with other arguments and of all processes that it starts.

  This process must be the subreaper of its descendants.
  """

  def used() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime

  before = used()
  subprocess.run([sys.executable, __file__, *map(str, arguments)], check=True)
  with contextlib.suppress(ChildProcessError):
    while True:
      os.waitpid(-1, 0)  # workers that outlived it
  return used() - before


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--prompts", type=int, default=250)
  parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
  parser.add_argument("--judge")
  parser.add_argument("--compare", type=int)
  parser.add_argument("--chain", action="store_true")
  parser.add_argument("files", nargs="*", type=Path)
  arguments = parser.parse_args()
  if arguments.chain:
    chain(*arguments.files, arguments.workers)
    return
  if arguments.compare:
    compare(arguments.compare)
    return
  if arguments.judge is not None:
    judge(arguments.judge, *arguments.files)
    return
  ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
  with tempfile.TemporaryDirectory() as tmp:
    small, large, against = (Path(tmp, f"{name}.jsonl") for name in ("small", "large", "against"))
    counts = {small: 8, large: arguments.prompts}
    for path, prompts in counts.items():
      write_samples(path, prompts)
    rng = random.Random(1)
    questions = [" ".join(str(rng.random()) for _ in range(60)) for _ in range(1000)]
    jsonl.write(against, [{"question": question} for question in questions])

    def milliseconds(*options: object) -> tuple[float, float]:
      """Returns the milliseconds per sample, and the seconds of the start."""
      first, both = (cpu_seconds(*options, path, against) for path in (small, large))
      per_sample = (both - first) / (4 * (counts[large] - counts[small]))
      return round(1000 * per_sample, 2), round(first, 2)

    io, _ = milliseconds("--judge=")
    filters = {"read_and_write": io}
    for name in registry.names("filters"):
      filters[name] = round(milliseconds(f"--judge={name}")[0] - io, 2)
    chain_ms, start = milliseconds("--chain", f"--workers={arguments.workers}")
    result = {
      "filters": filters,
      "sample_bytes": large.stat().st_size // (4 * counts[large]),
      "samples": 4 * counts[large],
      "workers": arguments.workers,
      "start_seconds": start,
      "chain_ms": chain_ms,
      "chain_hours": round(chain_ms * SAMPLES / CORES / 3.6e6, 3),
      "worker_rss_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
    }
  print(json.dumps(result))


if __name__ == "__main__":
  main()
