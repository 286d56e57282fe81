"""`generate`: the teacher samples completions of prompts, here or behind a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill_jax.config import Config
from distill_jax.generation import local, remote
from distill_jax.tasks import pseudo_labels


def run(config: Config, folder: Path) -> dict[str, Any]:
  """Writes samples.jsonl into `folder`; with `tasks`, pseudo-labels of a task's examples.

  Returns and raises what `local.generate`, `remote.generate` or `pseudo_labels.write` do.
  """
  if config.tasks:
    return pseudo_labels.write(config, folder)
  if config.generate.server.url:
    return remote.generate(config, folder)
  return local.generate(config, folder)
