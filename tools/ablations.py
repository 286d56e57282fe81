"""Compares students of the demo that differ in one setting: targets, loss, size or amount of text.

  nice python tools/ablations.py runs/ablations [--tables=targets,losses,text,size] [--seeds=0,1,2]
  nice python tools/ablations.py runs/novels --tables=records --text=runs/novels/chapters

The teacher, the text and the losses are those of configs/demo.py, on half of its text: 16 sequences
of 512 tokens, read twice. Another text is a folder of .txt files, such as that of tools/novels.py.
A step has one sequence. Students of labels have the demo's learning rate; students that learn from
the teacher have a lower one than in the demo, whose steps are twice as large. All are compared on 8
held-out sequences, from all logits. `online` has the teacher in the training step, so that its
targets are the teacher's whole distribution. Each seed has separate records; it chooses their
samples, and the order of the sequences. The tables are

  targets  labels, records with N points, the top 10, and the teacher in the step
  losses   temperatures, weights and divergences, with the teacher in the step
  text     labels on two and four times the text, against records
  size     students of 6, 12 and 20 layers, from labels and from records
  records  labels, records with 63 and 255 points, and the teacher in the step

`share` is the mean over seeds of the gain over `hard` in KL divergence, over the same of `online`.
A student is trained and evaluated once, and its checkpoints are then deleted, because each has 0.3
to 1.2 GB. Results are in FOLDER/results.jsonl, from which the tables are printed, and a plot of
each table is in FOLDER/TABLE.svg.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import seed_plot
from experiments import ROOT, Results, once, run_command

from distill_jax.records import describe, store

CONFIG = ROOT / "configs" / "demo.py"
SEQUENCES, PASSES, HELDOUT = 16, 2, 8
RATES = {"hard": 3e-4, "distilled": 6e-4}  # in the demo 3e-4 and 1e-3, for steps of 1,024 tokens
TEACHER_LAYERS = 30
ONLINE = "--config.train.online=True"
SAMPLED = {n: ("--config.records.kind=sampled", f"--config.records.n={n}") for n in (8, 63, 255)}
TOP = ("--config.records.kind=topk", "--config.records.n=10")
TEXT = ("--config.records.kind=text",)


class Variant(NamedTuple):
  """A kind of student.

  Attributes:
    student: The student of configs/demo.py, "hard" or "distilled".
    records: The flags of its records.
    flags: The flags of training.
    layers: The number of layers; None for those of the demo.
    times: The amount of text, in units of SEQUENCES.
  """

  student: str = "distilled"
  records: tuple[str, ...] = TEXT
  flags: tuple[str, ...] = ()
  layers: int | None = None
  times: int = 1


def online(*keys: str) -> Variant:
  """Returns a student with the teacher in the step, and config keys, each as KEY=VALUE."""
  return Variant(flags=(ONLINE, *(f"--config.{key}" for key in keys)))


VARIANTS = {
  "hard": Variant("hard"),
  "points-8": Variant(records=SAMPLED[8]),
  "points-63": Variant(records=SAMPLED[63]),
  "points-255": Variant(records=SAMPLED[255]),
  "top-10": Variant(records=TOP),
  "online": online(),
  "temperature-2": online("losses.soft.temperature=2.0"),
  "weight-50": online("losses.soft.weight=0.5", "losses.hard.weight=0.5"),
  "weight-100": online("losses.soft.weight=1.0", "losses.hard.weight=0.0"),
  "reverse-kl": online("losses.soft.divergence=reverse_kl"),
  "jensen-shannon": online("losses.soft.divergence=jensen_shannon"),
  "hard-text-2": Variant("hard", times=2),
  "hard-text-4": Variant("hard", times=4),
  "hard-layers-6": Variant("hard", layers=6),
  "points-63-layers-6": Variant(records=SAMPLED[63], layers=6),
  "hard-layers-20": Variant("hard", layers=20),
  "points-63-layers-20": Variant(records=SAMPLED[63], layers=20),
}
TABLES = {
  "targets": ("hard", "points-8", "points-63", "points-255", "top-10", "online"),
  "losses": (
    "hard",
    "online",
    "temperature-2",
    "weight-50",
    "weight-100",
    "reverse-kl",
    "jensen-shannon",
  ),
  "text": ("hard", "hard-text-2", "hard-text-4", "points-63"),
  "size": (
    "hard-layers-6",
    "points-63-layers-6",
    "hard",
    "points-63",
    "hard-layers-20",
    "points-63-layers-20",
  ),
  "records": ("hard", "points-63", "points-255", "online"),
}
DEFAULT_TABLES = ("targets", "losses", "text", "size")
FIGURES = ("kl", "ce", "agreement")
COLUMNS = "bytes per token | KL, mean | of each seed | cross-entropy | same top token | share"


def shared_flags(variant: Variant, seed: int) -> tuple[str, ...]:
  """Returns the flags that `record` and `train` share."""
  flags = (f"--config.seed={seed}", f"--config.data.sequences={SEQUENCES * variant.times}")
  if variant.layers is None:
    return flags
  first = variant.layers // 4  # as in the demo
  kept = (*range(first), *range(TEACHER_LAYERS - (variant.layers - first), TEACHER_LAYERS))
  return (*flags, f"--config.student.keep_layers={kept}")


def records_of(variant: Variant, seed: int) -> str:
  """Returns the name of the folder of a student's records."""
  values = "-".join(flag.rpartition("=")[2] for flag in variant.records)
  return f"records/{values}-{SEQUENCES * variant.times}-{seed}"


def text_flags(text: str) -> tuple[str, ...]:
  """Returns the flags of a folder of .txt files; none for "", the demo's text."""
  return ("--config.data.kind=text", f"--config.data.path={text}") if text else ()


def train(folder: Path, name: str, seed: int, text: str = "") -> None:
  """Makes the records and the student of a variant and a seed if they are missing."""
  variant, log = VARIANTS[name], folder / "log.txt"
  config, records = f"{CONFIG}:{variant.student}", records_of(variant, seed)
  shared = (*shared_flags(variant, seed), *text_flags(text))

  def command(verb: str, workdir: str, *flags: str) -> None:
    line = (f"--workdir={workdir}", *shared, *flags)
    run_command(verb, config, *line, folder=folder, log=log)

  make_records = functools.partial(command, "record", records, *variant.records)
  once(folder / f"{records}.finished", make_records)
  command(
    "train",
    f"{name}-{seed}",
    *variant.flags,
    f'--config.train.records=("{records}",)',
    "--config.train.heldout=()",
    "--config.train.batch_size=1",
    f"--config.train.steps={PASSES * SEQUENCES * variant.times}",
    f"--config.optim.peak_lr={RATES[variant.student]}",
  )
  print(f"{name}-{seed} is trained.", flush=True)


def evaluate(folder: Path, students: list[str], text: str = "") -> dict[str, dict[str, float]]:
  """Returns the figures of students by name. All are in memory together, with 0.5 GB each."""
  workdir = folder / "evaluation"
  shutil.rmtree(workdir, ignore_errors=True)  # of other students
  models = {student: f"run:{student}" for student in students}
  flags = (
    f"--workdir={workdir}",
    f"--config.evaluate.models={models}",
    f"--config.evaluate.sequences={HELDOUT}",
    "--config.evaluate.examples=0",
    *text_flags(text),
  )
  run_command("evaluate", str(CONFIG), *flags, folder=folder, log=folder / "log.txt")
  return json.loads((workdir / "evaluation.json").read_text())["models"]


def measure(
  folder: Path, results: Results, names: Sequence[str], seed: int, text: str = ""
) -> None:
  """Trains and evaluates the students of a seed that have no results yet."""
  missing = [name for name in names if (name, seed) not in results.done]
  for name in missing:
    train(folder, name, seed, text)
  models = evaluate(folder, [f"{name}-{seed}" for name in missing], text) if missing else {}
  for name in missing:
    figures = models[f"{name}-{seed}"]
    results.write(student=name, seed=seed, text=text, **{key: figures[key] for key in FIGURES})
    shutil.rmtree(folder / f"{name}-{seed}" / "checkpoints")


def markdown(
  done: Mapping[tuple, Mapping[str, float]],
  names: Sequence[str],
  seeds: Sequence[int],
  sizes: Sequence[str],
) -> str:
  """Returns a table in Markdown.

  Args:
    done: The figures of each student, by variant and seed.
    names: The variants.
    seeds: The seeds.
    sizes: The bytes per token of the records of each variant.
  """

  def mean(name: str, key: str) -> float:
    return statistics.mean(done[name, seed][key] for seed in seeds)

  lines = [f"| student | {COLUMNS} |", "|" + "---|" * 7]
  for name, size in zip(names, sizes, strict=True):
    kl, ce, same = (mean(name, key) for key in FIGURES)
    each = ", ".join(f"{done[name, seed]['kl']:.3f}" for seed in seeds)
    share = ""
    if {"hard", "online"} <= set(names):
      share = f"{(mean('hard', 'kl') - kl) / (mean('hard', 'kl') - mean('online', 'kl')):.1%}"
    lines.append(f"| {name} | {size} | {kl:.3f} | {each} | {ce:.3f} | {same:.1%} | {share} |")
  return "\n".join(lines)


def bytes_per_token(folder: Path, variant: Variant, seeds: list[int]) -> str:
  """Returns the mean size of a token in the records of a variant; "" if it does not read them.

  Files are larger, because array_record fills them up to a multiple of 64 KiB.
  """
  if variant.records == TEXT:
    return ""
  sizes = [payload_per_token(folder / records_of(variant, seed)) for seed in seeds]
  return f"{statistics.mean(sizes):.1f}"


def payload_per_token(folder: Path) -> float:
  """Returns the bytes of records per token of a store."""
  sizes = describe.describe(store.open_store(folder))
  return sizes["bytes_per_token"] - sizes["container"]


def main() -> None:
  """Makes the students that are missing, and prints the table of their evaluation with a plot."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("folder", type=Path)
  parser.add_argument("--tables", default=",".join(DEFAULT_TABLES))
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--text", type=Path, help="folder of .txt files; without it, the demo's text")
  args = parser.parse_args()
  folder = args.folder.resolve()
  text = str(args.text.resolve()) if args.text else ""
  results = Results(folder, lambda r: (r["student"], r["seed"]))
  if {r.get("text", "") for r in results.done.values()} - {text}:
    parser.error(f"{folder} has results of another text; expected the same text. Choose a folder.")
  seeds = [int(seed) for seed in args.seeds.split(",")]
  for table in args.tables.split(","):
    names = TABLES[table]
    for seed in seeds:
      measure(folder, results, names, seed, text)
    sizes = [bytes_per_token(folder, VARIANTS[name], seeds) for name in names]
    print(f"\n{table}\n\n{markdown(results.done, names, seeds, sizes)}\n", flush=True)
    kl = {name: [results.done[name, seed]["kl"] for seed in seeds] for name in names}
    plot = seed_plot.svg("KL divergence to the teacher, nats per token", kl)
    (folder / f"{table}.svg").write_text(plot)


if __name__ == "__main__":
  main()
