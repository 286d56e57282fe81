"""Writes short problems of reasoning-gym with their answers, for tools/self_training_evidence.py.

  pip install reasoning-gym==0.1.25
  python tools/reasoning_gym_problems.py runs/reasoning_gym

writes practice.jsonl (640 problems), validation.jsonl (160) and heldout.jsonl (160), with one
{"prompt": ..., "answer": ..., "kind": ...} per line. It always writes the same problems, each of
them once. The answers are whole numbers, which the filter and the benchmark compare as numbers. The
kinds are some of which SmolLM2-135M-Instruct solves 5 to 45% without training.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import reasoning_gym

KINDS = {  # kind: settings
  "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
  "gcd": {"min_value": 1, "max_value": 60},
  "lcm": {"min_value": 1, "max_value": 30},
  "products": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
}
PARTS = {"practice": 640, "validation": 160, "heldout": 160}  # problems of all kinds
SEED = 0


def problems(kind: str, n: int) -> list[dict[str, str]]:
  """Returns problems with distinct questions.

  Args:
    kind: The name of a task in reasoning-gym.
    n: The number of problems.
  """
  made = reasoning_gym.create_dataset(kind, size=4 * n, seed=SEED, **KINDS[kind])
  answers = {row["question"]: str(row["answer"]) for row in made}
  if len(answers) < n:
    raise ValueError(f"{kind} has {len(answers)} questions; expected {n}. Widen its settings.")
  rows = [{"prompt": q, "answer": a, "kind": kind} for q, a in answers.items()]
  return rows[:n]


def main(folder: Path) -> None:
  """Writes all files into `folder`."""
  folder.mkdir(parents=True, exist_ok=True)
  of_kinds = [problems(kind, sum(PARTS.values()) // len(KINDS)) for kind in KINDS]
  start, rng = 0, random.Random(SEED)
  for name, size in PARTS.items():
    end = start + size // len(KINDS)
    rows = [row for rows in of_kinds for row in rows[start:end]]
    rng.shuffle(rows)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = end


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("folder", type=Path, help="the folder to write")
  main(parser.parse_args().folder)
