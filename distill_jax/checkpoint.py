"""Checkpoints: orbax behind four functions.

A state is saved as a flat mapping from dotted path to array, so that a checkpoint can be
read without the classes that made it. The position of the loader is the step itself
(data/loader.py), so state and data cannot come apart.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from distill_jax.errors import InputError


def manager(workdir: Path, keep: int) -> ocp.CheckpointManager:
  """Asynchronous saves under workdir/checkpoints, the last `keep` kept."""
  options = ocp.CheckpointManagerOptions(max_to_keep=keep)
  return ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)


def save(saves: ocp.CheckpointManager, step: int, state: Any) -> None:
  """Starts saving; the state may be donated to the next step once this returns."""
  if not saves.save(step, args=ocp.args.StandardSave(_flatten(state))):
    raise InputError(f"checkpoint {step} is already in {saves.directory}; it is not overwritten")


def restore(saves: ocp.CheckpointManager, abstract: Any, step: int | None = None) -> Any:
  """The state of a step (the last without one), onto the abstract state's shardings."""
  steps = saves.all_steps()
  if step is None:
    step = saves.latest_step()
  if step is None or step not in steps:
    raise InputError(f"{saves.directory} holds checkpoints {sorted(steps)} and not {step}")
  flat = saves.restore(step, args=ocp.args.StandardRestore(_flatten(abstract)))
  paths = [path for path, _ in _paths(abstract)]
  return jax.tree.unflatten(jax.tree.structure(abstract), [flat[p] for p in paths])


def restore_params(workdir: str | Path, abstract: Any, step: int | None = None) -> Any:
  """The student's parameters alone, out of a run's checkpoint."""
  folder = Path(workdir) / "checkpoints"
  if not folder.is_dir():
    raise InputError(f"{workdir} holds no checkpoints; train there first")
  with ocp.CheckpointManager(folder.absolute()) as saves:
    step = saves.latest_step() if step is None else step
    if step is None or step not in saves.all_steps():
      raise InputError(f"{folder} holds checkpoints {sorted(saves.all_steps())} and not {step}")
    wanted = {f"params.{path}": leaf for path, leaf in _paths(abstract)}
    args = ocp.args.PyTreeRestore(
      wanted,
      restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
      partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      flat = reader.restore((folder / str(step) / "default").absolute(), args=args)
  return jax.tree.unflatten(jax.tree.structure(abstract), [flat[p] for p in wanted])


def digest(workdir: str | Path) -> str:
  """sha256, in hex, over the files of a run's last checkpoint in order of name."""
  with ocp.CheckpointManager((Path(workdir) / "checkpoints").absolute()) as saves:
    step = saves.latest_step()
  if step is None:
    raise InputError(f"{workdir} holds no checkpoint; train there first")
  total = hashlib.sha256()
  folder = Path(workdir) / "checkpoints" / str(step)
  for path in sorted(p for p in folder.rglob("*") if p.is_file()):
    total.update(str(path.relative_to(folder)).encode())
    with path.open("rb") as f:
      total.update(hashlib.file_digest(f, "sha256").digest())
  return total.hexdigest()


def _paths(tree: Any) -> list[tuple[str, Any]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
  return [(name(path).removesuffix(".value"), leaf) for path, leaf in leaves]


def _flatten(tree: Any) -> dict[str, Any]:
  return dict(_paths(tree))
