"""Trains the students of configs/cross_tokenizer.py and measures their bits per byte.

  nice python tools/cross_tokenizer_evidence.py runs/evidence [--targets=same_hard,same_soft]

Each target is trained with seed 0 and the learning rate in the config, then with the next ones of
RATES until both neighbours of the best have been tried, and then with seeds 1 and 2 and the best.
Each seed has its own folder, in which the commands of the config's docstring run, with its own
records.

Each finished run appends one line to results.jsonl and is not run again, so that the command can be
stopped at any time; an unfinished run resumes from its checkpoint. Checkpoints are removed once
they are measured.

The script prints a table, and writes its plot to FOLDER/bits-per-byte.svg.

All models are measured on the same bytes of the held-out topics, those that evaluate.texts compares
with two tokenizers: in parts of at most SEQ_LEN tokens, without the first token of a topic.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import experiments
import seed_plot
import sorted_records
from experiments import ROOT, Results

from distill_jax import config, registry
from distill_jax.cross_tokenizer.roles import match_roles
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.cross_tokenizer.vocabulary import Vocabulary
from distill_jax.data import corpus, sources
from distill_jax.data.tokenizers import Tokenizer, load_tokenizer
from distill_jax.evals import bits_per_byte, likelihood
from distill_jax.evals.model_slot import ModelSlot
from distill_jax.models.loading import open_source
from distill_jax.models.options import StudentOptions
from distill_jax.records import store
from distill_jax.records.manifest import Manifest
from distill_jax.records.projected_rows import project_rows
from distill_jax.records.writer import Writer

CONFIG = ROOT / "configs" / "cross_tokenizer.py"
RIVALS = ROOT / "tools" / "rival_losses"
RUNS = Path("runs/cross_tokenizer")  # in the folder of a seed
SEEDS = (0, 1, 2)
RATES = (1.5e-4, 3e-4, 6e-4, 1.2e-3, 2.4e-3, 4.8e-3)
SEQ_LEN = 512  # maximum number of tokens of a part of a text that is measured
STORES = {  # folder: command, argument of the config
  "records": ("record", "same_soft"),
  "start": ("retokenize", "same_soft"),
  "retargeted": ("retarget", "retargeted"),
  "exact": ("record", "exact"),
}
TARGETS = {  # the folders that each needs, in order
  "same_hard": ("records",),
  "same_soft": ("records",),
  "hard": ("records", "start", "retargeted"),
  "retargeted": ("records", "start", "retargeted"),
  "exact": ("start", "exact"),
  "alm": ("records", "start"),
  "shared": ("records", "start", "retargeted", "shared"),
  "uld": ("records", "start", "retargeted", "sorted"),
}


def settings() -> ModuleType:
  """Returns configs/cross_tokenizer.py as a module."""
  return experiments.load_config(CONFIG)


def teacher_tokenizer() -> Tokenizer:
  """Returns the tokenizer of the teacher."""
  pretrained = open_source(StudentOptions(source=settings().TEACHER)).pretrained
  return corpus.tokenizer_of(config.resolve(config.base()).data, pretrained)


@functools.cache
def texts() -> bits_per_byte.SharedTexts:
  """Returns the held-out topics in the tokens of both tokenizers."""
  both = Vocabulary(teacher_tokenizer()), Vocabulary(load_tokenizer(settings().MISTRAL))
  documents = sources.documents(sources.DocumentSource(kind="pydoc", split="heldout"))
  return bits_per_byte.share(documents, {v.digest: v for v in both}, SEQ_LEN, limit=1_000)


def measure(source: str) -> float:
  """Returns the bits per byte of a model, as `evaluate` with evaluate.texts computes them."""
  registry.add_folder("losses", RIVALS)  # the config that a run has stored may name one of them
  c = config.resolve(config.base())
  mesh = c.mesh.make()
  slot = ModelSlot(StudentOptions(source=source), mesh, seed=0)
  tokenizer = bits_per_byte.own_tokenizer(c, slot.source)
  scorer = likelihood.Scorer(slot.stacked(), mesh, tokenizer, batch_size=2, chunk=128)
  nats = -math.fsum(s.logp for s in scorer(texts().pairs[tokenizer.digest]))
  return nats / math.log(2) / texts().bytes


def opened(root: Path) -> tuple[store.Store, Manifest, PairTables]:
  """Returns the store `records`, the manifest of `retargeted`, and the tokenizers' tables."""
  rows, like = store.open_store(root / "records"), store.open_store(root / "retargeted").manifest
  teacher = Vocabulary(teacher_tokenizer())
  student = Vocabulary(load_tokenizer(settings().MISTRAL))
  tables = PairTables(teacher, student, match_roles(teacher, student, {}))
  return rows, like, tables


def write_sorted(root: Path) -> None:
  """Writes the store `sorted` from the stores `records` and `retargeted` of a folder."""
  rows, like, tables = opened(root)
  sorted_records.write(root / "sorted", rows, tables, like)


def write_shared(root: Path, seed: int) -> None:
  """Writes the store `shared` from the stores `records` and `retargeted` of a folder.

  A token of the teacher gives its mass to the student's token with the same bytes, the token in the
  text to the student's, and what is left to none; then the distribution is normalised. A position
  inside of a teacher's token gets its label.
  """
  rows, like, tables = opened(root)
  teacher, student = tables.teacher, tables.student
  tables.phi_P[:] = tables.state_V[:] = -1
  tables.phi_P[tables.offset_V] = [student.id_of.get(b, -1) if b else -1 for b in teacher.bytes_V]
  for t, u in tables.roles.items():
    tables.phi_P[tables.offset_V[t]] = u
  with Writer(root / "shared", dataclasses.replace(like, shards=())) as writer:
    for r in writer.missing():
      read = rows.read_many(list(r))
      options = {"n": like.n, "first": r.start, "seed": seed, "min_mass": 1.0}
      records, statistics = project_rows(tables, read, like.seq_len, **options)
      print(f"Records of shared tokens: mass {statistics.lost_mass / statistics.targets:.3f} lost.")
      writer.write_shard(r, records)
    writer.complete()


class Evidence:
  """The runs in a folder.

  Args:
    folder: The folder; it is made if necessary.
  """

  def __init__(self, folder: Path):
    self.folder, self.log = folder, folder / "log.txt"
    self.results = Results(folder, lambda r: (r["target"], r["rate"], r["seed"]))

  def command(self, verb: str, target: str, seed: int, workdir: Path, *flags: str) -> None:
    """Runs a command in the folder of a seed; one that is finished does nothing."""
    place = self.folder / f"seed-{seed}"
    place.mkdir(exist_ok=True)
    flags = (f"--workdir={workdir}", f"--config.seed={seed}", *flags)
    experiments.run_command(verb, f"{CONFIG}:{target}", *flags, folder=place, log=self.log)

  def write_store(self, folder: str, seed: int) -> None:
    """Writes a store, or the student, that targets need."""
    root = self.folder / f"seed-{seed}" / RUNS
    if folder == "shared":
      write_shared(root, seed)
    elif folder == "sorted":
      write_sorted(root)
    else:
      self.command(*STORES[folder], seed, RUNS / folder)

  def run(self, target: str, rate: float, seed: int) -> float:
    """Returns the bits per byte of one run, which is made unless it is finished."""
    if found := self.results.done.get((target, rate, seed)):
      return found["bits_per_byte"]
    for folder in TARGETS[target]:
      finished = self.folder / f"seed-{seed}" / f"{folder}.finished"
      experiments.once(finished, functools.partial(self.write_store, folder, seed))
    name, begin = RUNS / f"{target}-{rate:g}-{self.results.commit}", time.monotonic()
    self.command("train", target, seed, name, f"--config.optim.peak_lr={rate}")
    seconds, place = time.monotonic() - begin, self.folder / f"seed-{seed}"
    workdir = place / name
    with contextlib.chdir(place):  # the paths in the config of a run are relative
      bits = measure(f"run:{name}")
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    self.results.write(
      target=target,
      rate=rate,
      seed=seed,
      bits_per_byte=bits,
      bytes=texts().bytes,
      seconds=seconds,
      last=last,
    )
    shutil.rmtree(workdir / "checkpoints")
    return bits

  def tune(self, target: str) -> float:
    """Returns the best rate for seed 0 of a target."""
    first = settings().RATES[target]

    def best_of(bits: dict[float, float]) -> float:
      return min(bits, key=bits.__getitem__)

    return experiments.tune(RATES, first, lambda rate: self.run(target, rate, 0), best_of)


class Best(NamedTuple):
  """The best rate of a target.

  Attributes:
    rate: The rate.
    bits: Bits per byte with this rate, in the order of the seeds.
    tried: Bits per byte of each rate with seed 0.
  """

  rate: float
  bits: list[float]
  tried: dict[float, float]


def best_rates(results: Iterable[dict]) -> dict[str, Best]:
  """Returns the best rate of each target."""
  bits: dict[str, dict[float, dict[int, float]]] = {}
  for r in results:
    bits.setdefault(r["target"], {}).setdefault(r["rate"], {})[r["seed"]] = r["bits_per_byte"]
  found = {}
  for target, rates in bits.items():
    tried = {rate: rates[rate][0] for rate in sorted(rates)}
    best = min(tried, key=tried.__getitem__)
    found[target] = Best(best, [rates[best][seed] for seed in sorted(rates[best])], tried)
  return found


def table(best: Mapping[str, Best]) -> str:
  """Returns a table in Markdown of the best rate of each target, and its share of the gain.

  The gain of soft targets over the text is that with the same tokenizer.
  """
  lines = ["| target | rate (tried) | bits per byte, mean | of each seed |", "|---|---|---|---|"]
  means = {target: statistics.mean(found.bits) for target, found in best.items()}
  for target, (rate, bits, tried) in best.items():
    rates = ", ".join(f"{r:g}: {x:.3f}" for r, x in tried.items())
    each = ", ".join(f"{x:.3f}" for x in bits)
    lines.append(f"| {target} | {rate:g} ({rates}) | {means[target]:.3f} | {each} |")
  if {"same_hard", "same_soft", "hard"} <= means.keys():
    control = means["same_hard"] - means["same_soft"]
    for target in [t for t in means if t not in ("same_hard", "same_soft", "hard")]:
      lines.append(f"{target}: {(means['hard'] - means[target]) / control:.0%} of the gain")
  return "\n".join(lines)


def main() -> None:
  """Makes the runs that are missing, and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("folder", type=Path)
  parser.add_argument("--targets", default=",".join(TARGETS))
  args = parser.parse_args()
  # Commands run in the folders of the seeds.
  os.environ["MISTRAL_TOKENIZER"] = str(Path(settings().MISTRAL).resolve())
  evidence = Evidence(args.folder.resolve())

  def run_first(target: str) -> None:
    evidence.run(target, settings().RATES[target], 0)

  targets = experiments.first_look(args.targets.split(","), run_first, evidence.log)
  rates = {target: evidence.tune(target) for target in targets}
  for seed in SEEDS[1:]:
    for target, rate in rates.items():
      evidence.run(target, rate, seed)
  best = best_rates(evidence.results.done.values())
  plot = seed_plot.svg("bits per byte", {target: found.bits for target, found in best.items()})
  (evidence.folder / "bits-per-byte.svg").write_text(plot)
  print(table(best))


if __name__ == "__main__":
  main()
