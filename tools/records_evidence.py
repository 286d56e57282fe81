"""Compares students of records with N points per token, of a teacher in the step, and of labels.

  nice python tools/records_evidence.py runs/points [--points=8,63] [--seeds=0,1,2] [--layers=6]

The teacher, the text and the losses are those of configs/demo.py. The student keeps the first and
the last of the teacher's layers, half of `--layers` each. All students make STEPS steps of one
sequence, with one learning rate for soft labels and one for `hard`, and are compared by the KL
divergence to the teacher on held-out topics, from all logits. `online` has the teacher in the
training step, so that its targets are the teacher's whole distribution. Each seed has separate
records; it chooses their samples, and the order of the sequences.

`share` is the mean over seeds of the gain over `hard`, over the same of `online`. Commands that are
finished do nothing when the script runs again, and the table is printed from the folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from experiments import ROOT, run_command

from distill_jax.records import describe, store

CONFIG = ROOT / "configs" / "demo.py"
STEPS, SEQUENCES = 32, 16
RATES = {"hard": 3e-4, "distilled": 6e-4}  # the student of the demo: 3e-4 and 1e-3 at 1,024 tokens
TEACHER_LAYERS = 30


def flags(layers: int, seed: int) -> list[str]:
  """Returns the flags that all runs of a seed share."""
  first = layers // 2
  kept = (*range(first), *range(TEACHER_LAYERS - (layers - first), TEACHER_LAYERS))
  return [
    f"--config.seed={seed}",
    f"--config.student.keep_layers={kept}",
    f"--config.data.sequences={SEQUENCES}",
    f"--config.train.steps={STEPS}",
    "--config.train.batch_size=1",
    "--config.train.heldout=()",
  ]


def train_all(folder: Path, points: list[int], seeds: list[int], layers: int) -> list[str]:
  """Makes the records and the students that are missing; returns the names of the students."""
  log, names = folder / "log.txt", []

  def command(verb: str, student: str, workdir: str, *more: str) -> None:
    line = (f"--workdir={workdir}", *flags(layers, seed), *more)
    run_command(verb, f"{CONFIG}:{student}", *line, folder=folder, log=log)

  def train(target: str, student: str, *more: str) -> None:
    names.append(f"{target}-{seed}")
    rate = f"--config.optim.peak_lr={RATES[student]}"
    command("train", student, names[-1], rate, *more)
    print(f"{names[-1]} is trained.", flush=True)

  for seed in seeds:
    for n in points:
      records = f"records-{n}-{seed}"
      command("record", "distilled", records, f"--config.records.n={n}")
      train(str(n), "distilled", f'--config.train.records=("{records}",)')
    text = f'--config.train.records=("records-{points[-1]}-{seed}",)'
    train("hard", "hard", text)
    train("online", "distilled", text, "--config.train.online=True")
  return names


def table(folder: Path, names: list[str]) -> str:
  """Returns a table in Markdown of the evaluated students and the bytes of their records."""
  models = json.loads((folder / "evaluation.json").read_text())["models"]
  kl: dict[str, list[float]] = {}
  for name in names:
    kl.setdefault(name.rpartition("-")[0], []).append(models[name]["kl"])
  mean = {target: statistics.mean(values) for target, values in kl.items()}
  lines = [
    "| targets | bytes per token | KL, mean | of each seed | share |",
    "|---|---|---|---|---|",
  ]
  for target, values in kl.items():
    each = ", ".join(f"{v:.3f}" for v in values)
    share = (mean["hard"] - mean[target]) / (mean["hard"] - mean["online"])
    size = bytes_per_token(folder, target)
    lines.append(f"| {target} | {size} | {mean[target]:.3f} | {each} | {share:.1%} |")
  return "\n".join(lines)


def bytes_per_token(folder: Path, points: str) -> str:
  """Returns the mean size of a token in the stores of N points; "" if `points` is not a number.

  Files are larger, because array_record fills them up to a multiple of 64 KiB.
  """
  stores = [s for s in folder.glob(f"records-{points}-*") if points.isdigit()]
  return f"{statistics.mean(map(payload_per_token, stores)):.1f}" if stores else ""


def payload_per_token(folder: Path) -> float:
  """Returns the bytes of records per token of a store."""
  sizes = describe.describe(store.open_store(folder))
  return sizes["bytes_per_token"] - sizes["container"]


def main() -> None:
  """Makes the runs that are missing, evaluates the students, and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("folder", type=Path)
  parser.add_argument("--points", default="8,63")
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--layers", type=int, default=6)
  args = parser.parse_args()
  folder = args.folder.resolve()
  folder.mkdir(parents=True, exist_ok=True)
  points, seeds = ([int(x) for x in given.split(",")] for given in (args.points, args.seeds))
  names = train_all(folder, points, seeds, args.layers)
  models = {name: f"run:{name}" for name in names}
  every = (
    *flags(args.layers, 0),
    f"--config.evaluate.models={models}",
    "--config.evaluate.examples=0",
  )
  run_command("evaluate", str(CONFIG), "--workdir=.", *every, folder=folder, log=folder / "log.txt")
  print(table(folder, names))


if __name__ == "__main__":
  main()
