"""Runs and evaluates configs/translation.py or configs/speech.py for several seeds.

  python tools/bench/seq2seq.py translation runs/translation --seeds=3
  python tools/bench/seq2seq.py speech runs/speech

The folder is the output of tools/interface_strings.py or tools/spoken_prompts.py. Finished runs are
skipped. The script prints one line of JSON per seed, and a last line with the means and the ranges.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
KEPT = ("ce", "kl", "agreement", "bleu", "chrf", "wer", "parameters")


def run(verb: str, config: str, workdir: Path, at: Path, *flags: str) -> None:
  command = [
    sys.executable,
    "-m",
    "distill_jax.cli",
    verb,
    f"--config={ROOT / 'configs' / config}",
    f"--workdir={workdir}",
    *flags,
  ]
  names = {"TRANSLATION": str(at), "SPEECH": str(at)}
  paths = {"PYTHONPATH": str(ROOT)}
  subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, **names, **paths})


def measured(config: str, at: Path, seed: int, students: tuple[str, ...]) -> dict[str, float]:
  """Trains these students with one seed; returns their results, e.g. "hard.bleu"."""
  models = {name: at / f"{name}{seed}" for name in students}
  for name, workdir in models.items():
    run("train", f"{config}:{name}", workdir, at, f"--config.seed={seed}")
  where = at / f"evaluation{seed}"
  named = repr({name: f"run:{workdir}" for name, workdir in models.items()})
  run("evaluate", config, where, at, f"--config.evaluate.models={named}")
  rows = json.loads((where / "evaluation.json").read_text())["models"]
  return {f"{m}.{key}": row[key] for m, row in rows.items() for key in KEPT if key in row}


def translation(at: Path, seed: int) -> dict[str, float]:
  run("train", "translation.py:teacher", at / "teacher", at)
  run("record", "translation.py", at / "records", at)
  if not (at / "generated/pairs.jsonl").exists():
    run("generate", "translation.py", at / "generated", at)
  return measured("translation.py", at, seed, ("hard", "words", "sentences"))


def speech(at: Path, seed: int) -> dict[str, float]:
  if not (at / "generated/pairs.jsonl").exists():
    run("generate", "speech.py", at / "generated", at)
  run("record", "speech.py:records", at / "records", at)
  return measured("speech.py", at, seed, ("hard", "distilled"))


def main() -> None:
  args = argparse.ArgumentParser(description=__doc__)
  args.add_argument("what", choices=("translation", "speech"))
  args.add_argument("folder", type=Path)
  args.add_argument("--seeds", type=int, default=1)
  given = args.parse_args()
  rows = []
  for seed in range(given.seeds):
    rows.append(globals()[given.what](given.folder, seed))
    print(json.dumps({"seed": seed, **rows[-1]}), flush=True)
  of = {key: np.array([row[key] for row in rows]) for key in rows[0]}
  mean = {key: round(float(x.mean()), 4) for key, x in of.items()}
  spread = {f"{key}.range": round(float(np.ptp(x)), 4) for key, x in of.items()}
  print(json.dumps({"seeds": len(rows), **mean, **spread}))


if __name__ == "__main__":
  main()
