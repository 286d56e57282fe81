"""Measures the seconds from the start of the process to the end of the first training step.

  python tools/bench/restart.py [--shape=smollm2-135m] [--rounds=3]

Each run is a new process of `distill-jax train` on a small store. `cold` starts with an empty
workdir, in which it keeps its compiled programs. `warm` starts with the programs of the cold run
and no checkpoint. `resume` continues in the workdir of the warm run for the second time,
`recompile` does the same with an empty cache (JAX_COMPILATION_CACHE_DIR). The first step has ended
when its row is in metrics.jsonl. Times are medians over rounds; `warm_over_cold` and
`resume_over_recompile` are medians of the ratios by round. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from distill_jax.runtime.compile_cache import FOLDER

CONFIG = """
import sys
sys.path.insert(0, {tests!r})
import pathlib, tiny
from distill_jax import config
def get_config():
  c = tiny.tiny(pathlib.Path({folder!r}))
  c.teacher.source, c.student.shape = "", {shape!r}
  c.losses = {{"hard": config.loss("ce")}}
  c.records.kind = "text"
  c.train.batch_size, c.train.steps, c.train.checkpoint_every = 2, 1000, 2
  return c
"""


def first_row(folder: Path, workdir: Path, cache: Path | None = None) -> float:
  """Runs until metrics.jsonl has another row, then stops the run; returns the seconds."""
  own = "JAX_COMPILATION_CACHE_DIR"  # without it, the run keeps its programs in its workdir
  env = {key: value for key, value in os.environ.items() if key != own}
  env |= {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  env |= {own: str(cache)} if cache else {}
  line = [
    sys.executable,
    "-m",
    "distill_jax.cli",
    "train",
    f"--config={folder / 'config.py'}",
    f"--workdir={workdir}",
  ]
  metrics = workdir / "metrics.jsonl"
  rows = 1 + (metrics.read_bytes().count(b"\n") if metrics.exists() else 0)
  start = time.perf_counter()
  with subprocess.Popen(line, env=env, stderr=subprocess.PIPE, text=True) as run:
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < rows:
      if run.poll() is not None:
        raise SystemExit(run.stderr.read() if run.stderr else "The run ended early.")
      time.sleep(0.01)
    seconds = time.perf_counter() - start
    run.terminate()
    run.communicate()
  if run.returncode != os.EX_TEMPFAIL:
    raise SystemExit(f"The run exited with code {run.returncode}.")
  return seconds


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--shape", default="smollm2-135m")
  parser.add_argument("--rounds", type=int, default=3)
  args = parser.parse_args()
  tests = str(Path(__file__).resolve().parents[2] / "tests")
  sys.path.insert(0, tests)
  rows: dict[str, list[float]] = {"cold": [], "warm": [], "resume": [], "recompile": []}
  with tempfile.TemporaryDirectory() as tmp:
    folder = Path(tmp)
    (folder / "config.py").write_text(
      CONFIG.format(tests=tests, folder=str(folder), shape=args.shape)
    )
    record = [sys.executable, "-m", "distill_jax.cli", "record"]
    where = [f"--config={folder / 'config.py'}", f"--workdir={folder / 'records'}"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([*record, *where], check=True, env=env, stdout=subprocess.DEVNULL)
    for i in range(args.rounds):
      cold, warm = folder / f"cold{i}", folder / f"warm{i}"
      rows["cold"].append(first_row(folder, cold))
      shutil.copytree(cold / FOLDER, warm / FOLDER)
      rows["warm"].append(first_row(folder, warm))
      first_row(folder, warm)  # compiles the programs that restore a checkpoint
      rows["resume"].append(first_row(folder, warm))
      rows["recompile"].append(first_row(folder, warm, folder / f"cache{i}"))
  figures = {f"{name}_seconds": statistics.median(s) for name, s in rows.items()}
  for one, other in (("warm", "cold"), ("resume", "recompile")):
    pairs = zip(rows[one], rows[other], strict=True)
    figures[f"{one}_over_{other}"] = statistics.median(a / b for a, b in pairs)
  for key, value in figures.items():
    print(f"{key:24}{value:10.2f}")
  print(f"load {os.getloadavg()[0]:.1f}")
  print(json.dumps({key: round(value, 3) for key, value in figures.items()}))


if __name__ == "__main__":
  main()
