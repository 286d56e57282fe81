"""Compares ways of distilling a student: trains them with tuned rates and three seeds.

  nice python tools/on_policy_evidence.py runs/evidence [--config=configs/running_sums.py]
      [--targets=supervised,live]

The config is a module with

  PROBLEMS   the script in tools/ that writes the problems, with practice.jsonl to train on and
             validation.jsonl and heldout.jsonl to measure on, and their folder;
  PREPARE    the commands that make what all targets share, as (verb, target, folder);
  TEACHER_RUN, START_RUN    the folders of the teacher's and the start's run;
  RATES      the first learning rate by target, and ON_POLICY, the targets of `on_policy`;
  RUNS       the folder of the targets' runs;
  get_config(target).

Each target is trained from the same start with seed 0 and its first learning rate, and with the
next ones of RATES until both neighbours of the best rate have been tried. The best rate is the one
with the highest pass@1 on the validation problems. Three seeds, which determine the order of the
answers and the sampled texts, are trained with it and measured on the held-out problems: the
student generates 4 answers to each (2 to each validation problem), for pass@1 and maj@4.
KL(student || teacher) is computed on one more text of the student for each of 64 held-out problems,
sampled at temperature 1.

The script prints a table, and writes a plot of pass@1 to FOLDER/pass-at-1.svg.

Each finished training and each finished measurement appends one line to results.jsonl and is not
repeated. So the command can be stopped at any time, and continues when it is run again; an
unfinished part resumes from its own files. With `--targets=` only what all targets share is made.
After that, commands with different targets may run at the same time in one folder, e.g. each on one
core. Checkpoints that are no longer needed are removed.

The docstring of the config states what is equal for all targets. `tokens` in the results is the
number of tokens that the student is trained on.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import experiments
import jax
import numpy as np
import problem_scores
import seed_plot
from experiments import ROOT, Results
from on_policy_table import HELDOUT, OWN, SEEDS, TRAINED, VALIDATION, key_of, table

from distill_jax import config
from distill_jax.evals import next_token
from distill_jax.models.loading import open_source
from distill_jax.nn import sharding
from distill_jax.on_policy.rollouts import Rollouts
from distill_jax.records import collate
from distill_jax.training.metric_writer import read_metrics
from distill_jax.training.outputs import run_teacher

RATES = tuple(1.25e-5 * 2**i for i in range(12))
OWN_TEXTS, ROWS = 64, 8  # texts in `own_kl`, in all and of a batch
CLOCK = ("step_seconds", "generate_seconds", "score_seconds")


def own_kl(
  get_config: Callable, source: str, seed: int, prompts: Path, folder: Path
) -> dict[str, float]:
  """Returns KL(student || teacher) on texts of the student, exact at each token, and their tokens.

  Args:
    get_config: Returns the config of a target.
    source: The student.
    seed: The seed of the texts.
    prompts: The prompts; the first OWN_TEXTS are used, for one text each.
    folder: The folder for the texts.
  """
  folder.mkdir(parents=True, exist_ok=True)
  lines = prompts.read_text().splitlines(keepends=True)[:OWN_TEXTS]
  (folder / "prompts.jsonl").write_text("".join(lines))
  c = get_config("live")
  c.student.source, c.generate.prompts, c.seed = source, str(folder / "prompts.jsonl"), seed
  c.train.steps, c.train.batch_size, c.generate.batch_size = 1, len(lines), len(lines)
  resolved = config.resolve(c)
  mesh = resolved.mesh.make()
  student, teacher = open_source(resolved.student, seed), open_source(resolved.teacher, seed)
  rollouts, key = Rollouts(resolved, student, mesh, folder), jax.random.key(0)
  rollouts.check()
  store = rollouts.generate(0, student.digest, lambda: student.load(mesh, key))["teacher"]
  with jax.set_mesh(mesh):
    models = {"student": student.load(mesh, key), "teacher": teacher.load(mesh, key)}
    forward = {
      n: jax.jit(functools.partial(run_teacher, compute=m.compute)) for n, m in models.items()
    }
    # `compare` computes KL(p || q) with the p of its argument `teacher`: here, the student.
    compare = jax.jit(functools.partial(next_token.compare, chunk=64, teacher="student"))
    rows, totals = sharding.rows(mesh, ROWS), None
    for own in collate.padded_batches(store.read_many(list(range(len(store)))), rows):
      batch = collate.to_device(own, rows)
      outputs = {n: forward[n](m.model, batch.inputs)[0] for n, m in models.items()}
      means = jax.device_get(compare(outputs, batch))["teacher"]
      totals = jax.tree.map(np.add, totals, means) if totals else means
  return {"kl": float(totals["kl"].value()), "tokens": float(totals["kl"].count)}


def training_of(folder: Path) -> dict[str, object]:
  """Returns the tokens and seconds of a run, from its metrics.

  The first step of a process compiles, or is not timed, so all steps count as the median of them.
  The seconds to sample and to score contain the compilation in the first round.
  """
  rows = read_metrics(folder)
  steps, generate, score = ([r.get(key, 0.0) for r in rows] for key in CLOCK)
  seconds = {
    "train": len(rows) * float(np.median([s for s in steps if s])),
    "generate": sum(generate),
    "score": sum(score),
  }
  tokens = sum(r["tokens"] for r in rows)
  return {"steps": len(rows), "tokens": tokens, "seconds": seconds, "last": rows[-1]}


class Evidence:
  """The runs in a folder.

  Args:
    folder: The folder; it is made if necessary.
    config: The file of the config.
  """

  def __init__(self, folder: Path, config: Path):
    self.folder, self.config, self.log = folder, config, folder / "log.txt"
    self.settings: Any = experiments.load_config(config)
    self.results = Results(folder, key_of)

  def command(self, verb: str, target: str, workdir: str, *flags: str) -> None:
    """Runs a command in the folder; one that is finished does nothing."""
    flags = (f"--workdir={workdir}", *flags)
    experiments.run_command(
      verb, f"{self.config}:{target}", *flags, folder=self.folder, log=self.log
    )

  def once(self, verb: str, target: str, workdir: str) -> None:
    """Runs a command unless it has finished before."""

    def run() -> None:
      print(f"{verb} {workdir}", flush=True)
      self.command(verb, target, workdir)

    experiments.once(self.folder / f"{workdir}.finished", run)

  def prepare(self) -> None:
    """Makes what all runs share: problems, teacher, its answers and its records, and the start."""
    script, problems = self.settings.PROBLEMS
    if not (self.folder / problems / "validation.jsonl").exists():
      line = [sys.executable, str(ROOT / "tools" / script), str(self.folder / problems)]
      subprocess.run(line, check=True)
    for verb, target, folder in self.settings.PREPARE:
      self.once(verb, target, folder)

  def train(self, target: str, rate: float, seed: int) -> dict:
    """Returns the line of a run's training, which is made unless it is finished."""
    if found := self.results.done.get((TRAINED, target, rate, seed)):
      return found
    name = f"{self.settings.RUNS}/{target}-{rate:g}-{seed}-{self.results.commit}"
    flags = f"--config.optim.peak_lr={rate}", f"--config.seed={seed}"
    self.command(
      "on_policy" if target in self.settings.ON_POLICY else "train", target, name, *flags
    )
    about = training_of(self.folder / name)
    return self.results.write(what=TRAINED, target=target, rate=rate, seed=seed, run=name, **about)

  def measure(self, what: str, target: str, rate: float, seed: int, run: str) -> dict:
    """Returns the line of a measurement, which is made unless it is finished.

    Args:
      what: VALIDATION or HELDOUT: answers to these problems; or OWN: the divergence.
      target: The target, or "teacher" or "start".
      rate: The rate.
      seed: The seed.
      run: The folder of the run.
    """
    if found := self.results.done.get((what, target, rate, seed)):
      return found
    folder = f"{run}/{what.replace(' ', '_')}-{self.results.commit}"
    split = VALIDATION if what == VALIDATION else HELDOUT
    problems = f"{self.settings.PROBLEMS[1]}/{split}.jsonl"
    if what == OWN:
      with contextlib.chdir(self.folder):  # the paths in the config of a run are relative
        get_config, files = self.settings.get_config, (Path(problems), self.folder / folder)
        found = own_kl(get_config, f"run:{run}", seed, *files)
    else:
      flags = [f"--config.teacher.source=run:{run}", f"--config.seed={seed}"]
      flags.append(f"--config.evaluate.samples={2 if what == VALIDATION else 4}")
      self.command("evaluate", "start", folder, *flags, f"--config.evals.problems.path={problems}")
      found = problem_scores.read(self.folder / folder)
    return self.results.write(what=what, target=target, rate=rate, seed=seed, run=run, **found)

  def validate(self, target: str, rate: float) -> float:
    """Returns the pass@1 of a rate with seed 0 on the validation problems.

    Checkpoints of the target that are not those of its best rate are removed.
    """
    run = self.train(target, rate, 0)["run"]
    self.measure(VALIDATION, target, rate, 0, run)
    tried = {
      key[2]: line["pass@1"]["value"]
      for key, line in self.results.done.items()
      if key[0] == VALIDATION and key[1] == target
    }
    for other in tried.keys() - {experiments.highest(tried)}:
      self.remove_checkpoints(self.results.done[TRAINED, target, other, 0]["run"])
    return tried[rate]

  def remove_checkpoints(self, run: str) -> None:
    """Removes the checkpoints of a run that is measured."""
    shutil.rmtree(self.folder / run / "checkpoints", ignore_errors=True)

  def tune(self, target: str) -> float:
    """Returns the best rate for seed 0 of a target."""
    first = self.settings.RATES[target]

    def validate(rate: float) -> float:
      return self.validate(target, rate)

    return experiments.tune(RATES, first, validate, experiments.highest)

  def final(self, target: str, rate: float, seed: int) -> None:
    """Measures a run with the best rate, and removes its checkpoints."""
    run = self.train(target, rate, seed)["run"]
    for what in (HELDOUT, OWN):
      self.measure(what, target, rate, seed, run)
    self.remove_checkpoints(run)

  def begin(self) -> None:
    """Measures the teacher and the start of the students."""
    self.measure(HELDOUT, "teacher", 0.0, 0, self.settings.TEACHER_RUN)
    for what in (HELDOUT, OWN):
      self.measure(what, "start", 0.0, 0, self.settings.START_RUN)


def main() -> None:
  """Makes the runs that are missing, and prints the table."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
  parser.add_argument("folder", type=Path)
  parser.add_argument("--config", type=Path, default=ROOT / "configs" / "running_sums.py")
  parser.add_argument("--targets", default="supervised,off_policy,rounds,live")
  args = parser.parse_args()
  folder = args.folder.resolve()
  compiled = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
  jax.config.update("jax_compilation_cache_dir", compiled)  # all commands share their programs
  evidence = Evidence(folder, args.config.resolve())
  evidence.prepare()
  evidence.begin()

  def validate_first(target: str) -> None:
    evidence.validate(target, evidence.settings.RATES[target])

  targets = [target for target in args.targets.split(",") if target]
  targets = experiments.first_look(targets, validate_first, evidence.log)
  rates = {target: evidence.tune(target) for target in targets}
  for seed in SEEDS:
    for target, rate in rates.items():
      evidence.final(target, rate, seed)
  results = evidence.results.done
  right = {
    target: [100 * results[HELDOUT, target, rate, seed]["pass@1"]["value"] for seed in SEEDS]
    for target, rate in rates.items()
  }
  (folder / "pass-at-1.svg").write_text(seed_plot.svg("pass@1, %", right))
  print(table(results.values()))


if __name__ == "__main__":
  main()
