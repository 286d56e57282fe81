"""A config of rounds in seconds: a random teacher and student, and a few prompts."""

import json
from pathlib import Path

import ml_collections
import tiny

from distill_jax import config
from distill_jax.commands import on_policy
from distill_jax.runtime.workdir import Workdir

PROMPTS = 12
LENGTH = 24  # of a prompt and its text together


def on_policy_config(folder: Path, **routes: int) -> ml_collections.ConfigDict:
  """A live config, its files under `folder`.

  Args:
    folder: The folder.
    routes: The number of prompts of further teachers, by name.
  """
  c = tiny.tiny(folder)
  names = [name for name, count in routes.items() for _ in range(count)]
  lines = [
    {"prompt": f"{i} + {i} =", "route": name}
    for i, name in enumerate([*names, *[""] * (PROMPTS - len(names))])
  ]
  prompts = folder / "prompts.jsonl"
  if not prompts.exists():  # a run reads them again if they are written again
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
  c.teacher.source = ""
  c.losses = {"soft": config.loss("kd", divergence="reverse_kl")}
  g = c.generate
  g.prompts, g.samples, g.max_new_tokens, g.cache_len = str(prompts), 2, 12, LENGTH
  g.batch_size, g.prefill_rows, g.prefill_chunk, g.steps = 8, 4, 8, 4
  g.stop = ("e",)
  t = c.train
  t.online, t.records, t.steps, t.batch_size, t.checkpoint_every = True, (), 4, 4, 1
  t.checkpoint_minutes = 0.0
  return c


def write_config(path: Path, folder: Path, *changes: str) -> Path:
  """Writes the config of `on_policy_config(folder)` as a file; see tiny.write_config."""
  on_policy_config(folder)
  lines = ["import tiny_on_policy", "c = tiny_on_policy.on_policy_config(pathlib.Path({!r}))"]
  return tiny.write_config(path, folder, lines[0], lines[1].format(str(folder)), *changes)


def run(c: ml_collections.ConfigDict, workdir: Path) -> dict[str, float]:
  """Runs the command with a config that is not resolved yet; returns the last metrics."""
  resolved = config.resolve(c)
  with Workdir(workdir, resolved) as path:
    return on_policy.run(resolved, path)
