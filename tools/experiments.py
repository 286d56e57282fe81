"""Results, commands and the choice of a learning rate, for drivers of experiments."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
UNPRINTED = ("right", "majority", "last")  # long values of a result


class Results:
  """The results of finished runs in a folder: the lines of results.jsonl.

  Args:
    folder: The folder; it is made if necessary.
    key_of: Returns the key of a result.

  Attributes:
    done: The results by key.
    commit: The commit of the code.
  """

  def __init__(self, folder: Path, key_of: Callable[[dict], tuple]):
    folder.mkdir(parents=True, exist_ok=True)
    self._file, self._key_of = folder / "results.jsonl", key_of
    lines = self._file.read_text().splitlines() if self._file.exists() else []
    self.done = {key_of(r): r for r in map(json.loads, lines)}
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    self.commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()

  def write(self, **result: object) -> dict:
    """Appends a result with the commit and the time, prints it, and returns it."""
    result |= {"commit": self.commit, "time": time.strftime("%Y-%m-%d %H:%M")}
    with self._file.open("a") as f:
      f.write(json.dumps(result) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k not in UNPRINTED}), flush=True)
    self.done[self._key_of(result)] = result
    return result


def load_config(path: Path) -> ModuleType:
  """Returns a config file as a module."""
  if sys.path[0] != str(path.parent):
    sys.path.insert(0, str(path.parent))  # it may import its neighbours, one with a tool's name
  spec = importlib.util.spec_from_file_location(path.stem, path)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def run_command(verb: str, config: str, *flags: str, folder: Path, log: Path) -> None:
  """Runs a command of distill-jax in a folder, and appends its output to a file.

  Raises:
    CalledProcessError: The command fails.
  """
  line = [sys.executable, "-m", "distill_jax.cli", verb, f"--config={config}", *flags]
  with log.open("a") as out:
    subprocess.run(line, cwd=folder, stdout=out, stderr=out, check=True)


def once(finished: Path, run: Callable[[], None]) -> None:
  """Calls `run` unless a call has finished before, with any version of the code.

  The command itself would refuse a folder that was made with other config keys.

  Args:
    finished: The file that marks a finished call.
    run: Does the work.
  """
  if not finished.exists():
    run()
    finished.touch()


def first_look(targets: Iterable[str], run: Callable[[str], None], log: Path) -> list[str]:
  """Runs each target once, and returns those whose commands succeed.

  A target that fails is skipped; the next call of the driver tries it again.

  Args:
    targets: The targets.
    run: Runs a target.
    log: The file with the output of commands.
  """
  succeeded = []
  for target in targets:
    try:
      run(target)
      succeeded.append(target)
    except subprocess.CalledProcessError as error:
      print(f"{target} is skipped: {error} See {log}.", flush=True)
  return succeeded


def highest(scores: dict[float, float]) -> float:
  """Returns the rate with the highest score, the lowest of equal ones."""
  return max(scores, key=lambda rate: (scores[rate], -rate))


def tune(
  rates: Sequence[float],
  first: float,
  measure: Callable[[float], float],
  best_of: Callable[[dict[float, float]], float],
) -> float:
  """Returns the best rate, after both of its neighbours in `rates` have been measured.

  Args:
    rates: The rates in ascending order.
    first: The rate that is measured first.
    measure: Trains with a rate and returns its score.
    best_of: Returns the best rate of scores by rate.
  """
  scores = {first: measure(first)}
  while True:
    best = best_of(scores)
    at = rates.index(best)
    near = [r for r in rates[max(at - 1, 0) : at + 2] if r not in scores]
    if not near:
      return best
    scores[near[0]] = measure(near[0])
