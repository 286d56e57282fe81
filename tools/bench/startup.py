"""Measures the CPU and wall seconds from the start of a command to the first line that it prints.

  python tools/bench/startup.py [--verbs=help,train] [--rounds=3]

All verbs run on models and data of a few kilobytes, so that nearly all of the time is start-up:
imports, the config, the devices, tracing, and programs from a cache that an earlier run has
filled. `config_error` is a `train` with an unknown key. The rival, `imports`, is a process that
imports jax, flax, optax and orbax, without which no training script starts. It runs once in each
round, between the verbs. The first line is the first on standard output or error; a run that ends
within five seconds prints its first line at its end. CPU seconds are those of the process and the
children that it has waited for. Figures are medians over rounds; `NAME_over_imports` are the
medians of the ratios of CPU seconds by round. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RIVAL = "import jax, flax, optax, orbax.checkpoint; print('imported', flush=True)"
LOG_LINE = re.compile(r"[EWI]\d{4} |\s*$|\*+$|\[Compiling ")  # of XLA
CONFIG = """
from distill_jax import config
FOLDER = {folder!r}
def get_config():
  c = config.base()
  c.teacher.shape = c.student.shape = "tiny"
  c.data.kind, c.data.path, c.data.tokenizer = "text", FOLDER + "/text.txt", {tokenizer!r}
  c.data.heldout_fraction, c.data.seq_len, c.data.sequences = 0.0, 32, 8
  c.records.batch_size, c.records.chunk, c.records.tokens_per_shard = 4, 16, 4 * 32
  c.losses.soft, c.losses.hard = config.loss("kd", weight=0.7), config.loss("ce", weight=0.3)
  c.train.records, c.train.steps, c.train.batch_size = (FOLDER + "/record",), 2, 4
  c.train.chunk = c.evaluate.chunk = 16
  c.evaluate.models = {{"student": "run:" + FOLDER + "/train"}}
  c.evaluate.batch_size, c.evaluate.sequences, c.evaluate.examples = 4, 4, 0
  c.generate.prompts, c.generate.samples, c.generate.max_new_tokens = FOLDER + "/p.jsonl", 1, 4
  c.generate.cache_len, c.generate.prefill_chunk, c.generate.batch_size = 32, 8, 4
  c.filter.samples, c.filter.order = FOLDER + "/generate", ("short",)
  c.filters.short = config.filter("length", max_chars=50)
  c.retarget.records, c.retarget.tokenizer = FOLDER + "/record", {tokenizer!r}
  c.shrink.layers, c.shrink.sequences = 1, 4
  c.efficiency.context = 32
  return c
"""
# The workdir and other arguments of each verb, in an order in which each finds what it reads.
# {new} is a new folder, {old} the folder of the verbs that ran before.
VERBS = {
  "config_error": ("train", "{new}", "--config.train.stepz=1"),
  "pack": ("pack", "{new}"),
  "record": ("record", "{new}"),
  "inspect": ("inspect", "{old}/record"),
  "retarget": ("retarget", "{new}"),
  "train": ("train", "{new}"),
  "evaluate": ("evaluate", "{new}"),
  "export": ("export", "{old}/train", "--config.export.dir={new}"),
  "report": ("report", "{old}/train"),
  "generate": ("generate", "{new}"),
  "filter": ("filter", "{new}"),
  "shrink": ("shrink", "{new}", "--config.teacher.source={old}/export"),
  "efficiency": ("efficiency", "{new}"),
}


def command_line(name: str, old: Path, new: Path) -> list[str]:
  """Returns the command of a verb, or of the rival."""
  if name == "imports":
    return [sys.executable, "-c", RIVAL]
  cli = [sys.executable, "-m", "distill_jax.cli"]
  if name == "help":
    return [*cli, "help"]
  verb, workdir, *others = (word.format(old=old, new=new) for word in VERBS[name])
  return [*cli, verb, f"--config={old}/config.py", f"--workdir={workdir}", *others]


def first_line(words: list[str], env: dict[str, str]) -> tuple[str, float, float]:
  """Runs a command to its first line; returns the line, and the CPU and wall seconds before it."""
  start = time.perf_counter()
  with subprocess.Popen(
    words,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
  ) as run:
    assert run.stdout is not None
    line = next((text for text in run.stdout if not LOG_LINE.match(text)), "")
    wall = time.perf_counter() - start
    cpu = cpu_seconds(run.pid)
    os.killpg(run.pid, signal.SIGKILL)
  return line.strip(), cpu, wall


def cpu_seconds(pid: int) -> float:
  """Returns the CPU seconds of a process that was not waited for."""
  fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def prepare(folder: Path, names: list[str], env: dict[str, str]) -> None:
  """Runs each verb once to its end, for the data that others read and for the compile cache."""
  import tiny

  tokenizer = tiny.write_tokenizer(folder / "tokenizer.json")
  tiny.write_text(folder / "text.txt")
  (folder / "p.jsonl").write_text(json.dumps({"prompt": "3 times 6 is"}) + "\n")
  config = CONFIG.format(folder=str(folder), tokenizer=str(tokenizer))
  (folder / "config.py").write_text(config)
  for name in VERBS:
    if name == "config_error" or (names and not needed(name, names)):
      continue
    done = subprocess.run(
      command_line(name, folder, folder / name), env=env, capture_output=True, text=True
    )
    if done.returncode:
      raise SystemExit(f"{name} exited with code {done.returncode}:\n{done.stderr}")


def needed(name: str, names: list[str]) -> bool:
  """Returns True if a verb is measured, or writes what a measured one reads."""
  return name in names or name in ("record", "train", "export", "generate")


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--verbs", default=",".join(["help", *VERBS]))
  parser.add_argument("--rounds", type=int, default=3)
  args = parser.parse_args()
  names = args.verbs.split(",")
  sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
  cpu: dict[str, list[float]] = {name: [] for name in ("imports", *names)}
  wall: dict[str, list[float]] = {name: [] for name in ("imports", *names)}
  lines = {}
  with tempfile.TemporaryDirectory() as tmp:
    folder = Path(tmp)
    env = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    prepare(folder, names, env)
    for n in range(args.rounds):
      for name in cpu:
        words = command_line(name, folder, folder / f"{name}-{n}")
        lines[name], seconds, waited = first_line(words, env)
        cpu[name].append(seconds)
        wall[name].append(waited)
  figures = {}
  for name in cpu:
    figures[f"{name}_cpu_seconds"] = statistics.median(cpu[name])
    figures[f"{name}_wall_seconds"] = statistics.median(wall[name])
    pairs = zip(cpu[name], cpu["imports"], strict=True)
    figures[f"{name}_over_imports"] = statistics.median(a / b for a, b in pairs)
    print(
      f"{name:14}{figures[f'{name}_cpu_seconds']:7.2f} CPU s"
      f"{figures[f'{name}_wall_seconds']:8.2f} s  {figures[f'{name}_over_imports']:5.2f}"
      f"  {lines[name][:50]}"
    )
  print(f"load {os.getloadavg()[0]:.1f}")
  print(json.dumps({key: round(value, 3) for key, value in figures.items()}))


if __name__ == "__main__":
  main()
