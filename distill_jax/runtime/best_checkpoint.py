"""The best checkpoint of a run: every checkpoint names, in its metadata, the best one so far.

`checkpoint` is imported where it is used: it imports orbax, which `report` does not need.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distill_jax.errors import InputError
from distill_jax.types import JsonObject

if TYPE_CHECKING:
  import orbax.checkpoint as ocp

KEY = "best"  # of the metadata


def read(saves: ocp.CheckpointManager) -> JsonObject:
  """Returns the metadata of the last checkpoint about the best one, with its "step".

  It is {} without checkpoints, if the run has not evaluated yet or keeps no best checkpoint, or if
  that checkpoint was removed.
  """
  from distill_jax.runtime import checkpoint

  last = saves.latest_step()
  found = None if last is None else checkpoint.read_metadata(saves, last).get(KEY)
  return found if found and found["step"] in saves.all_steps() else {}


def step_to_open(workdir: str | Path, best: bool) -> int:
  """Returns the step of the best or the last checkpoint of a run.

  Raises:
    InputError: The run does not have one.
  """
  from distill_jax.runtime import checkpoint

  with checkpoint.open_run(workdir) as saves:
    if not best:
      return checkpoint.existing_step(saves, None)
    if found := read(saves):
      return int(found["step"])
  raise InputError(
    f"{workdir} does not have a best checkpoint. Use the last one, or train with train.best_metric."
  )
