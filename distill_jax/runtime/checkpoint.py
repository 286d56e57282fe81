"""Checkpoints in orbax's format, with a checksum of every array.

A state is saved as a flat mapping from dotted path to array, so that a checkpoint can be read
without the classes that wrote it. The position of the loader is the step number
(training/loader.py), so state and data stay consistent. The metadata, named `about`, holds the
checksums and values from the caller, e.g. digests of the records.

Arrays are stored in chunks of at most CHUNK_BYTES, and each layer or expert in separate chunks, so
that `saved_arrays` reads one layer, or a part of it, without the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from etils import epath

from distill_jax.errors import InputError
from distill_jax.runtime import checksums, extras, orbax_s3, retries, storage
from distill_jax.types import JsonObject, PyTree

with extras.needed("train"):
  import orbax.checkpoint as ocp
  from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

PARAMS = "params."  # prefix of the paths of the trained parameters
STATE, ABOUT = "state", "about"
CHUNK_BYTES = 8 * 2**20


def manager(
  workdir: Path, keep: int = 1, every: int = 0, best: Callable[[], int | None] = lambda: None
) -> ocp.CheckpointManager:
  """Returns a manager of asynchronous checkpoints under WORKDIR/checkpoints.

  Args:
    workdir: The folder of the run.
    keep: Number of most recent checkpoints to keep.
    every: Interval in steps of checkpoints that are kept besides; 0 for none.
    best: Returns the step of one more checkpoint to keep, or None. An earlier one is deleted once
      the next save is on disk.
  """
  policies: list[Any] = [policy.LatestN(keep), _KeepBest(best)]
  if every:
    policies.append(policy.EveryNSteps(every))
  options = ocp.CheckpointManagerOptions(preservation_policy=policy.AnyPreservationPolicy(policies))
  return _opened(_directory(workdir), options)


@dataclasses.dataclass(frozen=True)
class _KeepBest:
  """A policy of orbax that keeps the checkpoint of one step, which may change."""

  step: Callable[[], int | None]

  def should_preserve(self, checkpoints: Sequence[Any], **_: Any) -> list[bool]:
    return [info.step == self.step() for info in checkpoints]


def save(saves: ocp.CheckpointManager, step: int, state: PyTree, metadata: JsonObject) -> None:
  """Starts saving a state. The state may be donated to the next step once this returns.

  Args:
    saves: The checkpoint manager.
    step: The step number.
    state: The state.
    metadata: Plain values, some of which must be equal when the state is restored.

  Raises:
    InputError: The step is already saved, or this or the previous checkpoint cannot be written.
  """
  flat = dict(_leaves_by_path(state))
  stored = {**metadata, "arrays": _array_records(flat)}
  items = ocp.args.Composite(
    state=ocp.args.StandardSave(flat, _chunks(state)),
    about=ocp.args.JsonSave({**stored, "sha256": _sha256(stored)}),
  )
  with _writing(saves):
    saved = saves.save(step, args=items)
  if not saved:
    raise InputError(
      f"Checkpoint {step} exists in {saves.directory} and is not overwritten. Choose another "
      "--workdir."
    )


def wait(saves: ocp.CheckpointManager) -> None:
  """Waits until all checkpoints are on disk.

  Raises:
    InputError: A checkpoint cannot be written.
  """
  with _writing(saves):
    saves.wait_until_finished()


def restore(
  saves: ocp.CheckpointManager, abstract: PyTree, metadata: JsonObject, step: int | None = None
) -> PyTree:
  """Returns a saved state with the shardings of the abstract state.

  Args:
    saves: The checkpoint manager.
    abstract: Shapes, dtypes and shardings of the state.
    metadata: Values that must equal those the state was saved with.
    step: The step of the checkpoint; None for the last one.

  Raises:
    InputError: The checkpoint does not exist, is damaged, is of another model, or was saved with
      other metadata.
  """
  step = existing_step(saves, step)
  stored = read_metadata(saves, step)
  for name, expected in metadata.items():
    if stored[name] != expected:
      raise InputError(
        f"{saves.directory / str(step)} was saved with {name} {stored[name]}, but this run has "
        f"{expected}. Restore the former, or train in another --workdir."
      )
  return _read(saves, step, "", abstract)


def restore_params(workdir: str | Path, abstract: PyTree, step: int | None = None) -> PyTree:
  """Returns the trained parameters of a run, without the optimizer state; see `restore`."""
  with open_run(workdir) as saves:
    return _read(saves, existing_step(saves, step), PARAMS, abstract)


def digest(workdir: str | Path, step: int | None = None) -> str:
  """Returns the sha256, in hex, of the checksums of a run's trained parameters.

  Args:
    workdir: The folder of the run.
    step: The step of the checkpoint; None for the last one.
  """
  with open_run(workdir) as saves:
    arrays = read_metadata(saves, existing_step(saves, step))["arrays"]
  return _sha256({path: x for path, x in arrays.items() if path.startswith(PARAMS)})


def params_digest(params: PyTree) -> str:
  """Returns the digest of trained parameters in memory, which is that of a checkpoint of them."""
  return _sha256(_array_records({PARAMS + path: x for path, x in _leaves_by_path(params)}))


def _read(saves: ocp.CheckpointManager, step: int, prefix: str, abstract: PyTree) -> PyTree:
  """Returns the arrays under a prefix in the structure of `abstract`, after checking them."""
  expected = {prefix + path: leaf for path, leaf in _leaves_by_path(abstract)}
  folder = saves.directory / str(step)
  arrays = read_metadata(saves, step)["arrays"]
  saved = {path: record for path, record in arrays.items() if path.startswith(prefix)}
  check_same_model(folder, saved, expected)
  args = ocp.args.PyTreeRestore(
    expected,
    restore_args=ocp.checkpoint_utils.construct_restore_args(expected),
    partial_restore=True,
  )
  with reading(saves, step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    flat = reader.restore(folder / STATE, args=args)
  for path, record in _array_records(flat).items():
    if record != saved[path]:
      raise damage_error(saves, step, f"the checksum of {path} differs")
  return jax.tree.unflatten(jax.tree.structure(abstract), [flat[p] for p in expected])


def check_same_model(
  folder: epath.Path, saved: Mapping[str, JsonObject], expected: Mapping[str, Any]
) -> None:
  """Raises InputError if the arrays of a checkpoint have other names, dtypes or shapes.

  Args:
    folder: The checkpoint.
    saved: Its metadata of the arrays, by path.
    expected: The arrays, or their shapes, by path.
  """
  for path in sorted(saved.keys() | expected.keys()):
    found = saved[path]["is"] if path in saved else "missing"
    wanted = _dtype_and_shape(expected[path]) if path in expected else "missing"
    if found != wanted:
      raise InputError(
        f"{folder} is of another model: {path} is {found} in the checkpoint and {wanted} in this "
        "model. Choose another --workdir, or the model that was saved."
      )


def _chunks(state: PyTree) -> dict[str, ocp.SaveArgs]:
  """Returns how each array is cut into chunks, by path.

  The axes with numbers in Hugging Face's names, e.g. layers, are cut first. One chunk is enough
  for a small array.
  """
  chunks = {}
  for path, v in _leaves_by_path(state, is_leaf=lambda x: hasattr(x, "get_metadata")):
    if not jax.tree.leaves(v):  # moments of a parameter that is not trained
      continue
    about = v.get_metadata() if hasattr(v, "get_metadata") else {}
    axes = enumerate(about.get("axes", ()))
    numbered = tuple(i for i, axis in axes if "{" + axis + "}" in about.get("hf", ""))
    large = v.size * v.dtype.itemsize > CHUNK_BYTES
    chunks[path] = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=numbered if large else ())
  return chunks


def read_metadata(saves: ocp.CheckpointManager, step: int) -> JsonObject:
  with reading(saves, step):
    items = ocp.args.Composite(about=ocp.args.JsonRestore())
    metadata = dict(saves.restore(step, args=items)[ABOUT])
    if metadata.pop("sha256") != _sha256(metadata):
      raise ValueError(f"the checksum of {ABOUT} differs.")
  return metadata


def _array_records(flat: dict[str, jax.Array]) -> JsonObject:
  """Returns the dtype, shape and checksum of each array, by path."""
  sums = checksums.of_arrays(flat)
  return {
    path: {"is": _dtype_and_shape(x), "sums": [int(n) for n in sums[path]]}
    for path, x in flat.items()
  }


def _dtype_and_shape(x: Any) -> str:
  return f"{x.dtype}{list(x.shape)}"


def _sha256(tree: PyTree) -> str:
  return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _directory(workdir: str | Path) -> epath.Path:
  """Returns the folder of a run's checkpoints, which may be at a URL."""
  path = storage.checkpoints(workdir)
  if path.startswith("s3://"):
    orbax_s3.enable()
  return epath.Path(path)


@contextmanager
def open_run(workdir: str | Path) -> Iterator[ocp.CheckpointManager]:
  folder = _directory(workdir)
  with retries.store_errors(f"{folder} cannot be read", str(folder)):
    exists = folder.is_dir()
  if not exists:
    raise InputError(f"{workdir} does not hold checkpoints. Train there first.")
  with _opened(folder) as saves:
    yield saves


def _opened(
  folder: epath.Path, options: ocp.CheckpointManagerOptions | None = None
) -> ocp.CheckpointManager:
  with retries.store_errors(f"{folder} cannot be opened", str(folder)):
    return ocp.CheckpointManager(folder, options=options)


def existing_step(saves: ocp.CheckpointManager, step: int | None) -> int:
  """Returns the step, or the last one for None; raises InputError if it is not saved."""
  steps = sorted(saves.all_steps())
  if not steps or (step is not None and step not in steps):
    raise InputError(
      f"{saves.directory} has no checkpoint{'' if step is None else f' {step}'}; its checkpoints "
      f"are {steps}. Choose one of them, or train there first."
    )
  return steps[-1] if step is None else step


@contextmanager
def _writing(saves: ocp.CheckpointManager) -> Iterator[None]:
  """Turns errors of writing, also those of the previous background save, into ours.

  Raises:
    InputError: The disk is full, or the folder or store refuses access.
    Unavailable: A store is down.
  """
  failure = f"A checkpoint cannot be written to {saves.directory}"
  try:
    with retries.store_errors(failure, str(saves.directory)):
      yield
  except InputError:
    raise
  except (ValueError, OSError) as e:  # tensorstore raises ValueErrors
    raise InputError(
      f"{failure} ({str(e).splitlines()[0][-200:]}). "
      "Free space, or choose another --workdir, and run again; earlier checkpoints are intact."
    ) from e


@contextmanager
def reading(saves: ocp.CheckpointManager, step: int) -> Iterator[None]:
  """Turns errors that orbax raises on a damaged checkpoint, or for a store that is down, into ours.

  Raises:
    InputError: The checkpoint is damaged, or a store refuses access.
    Unavailable: A store is down.
  """
  folder = saves.directory / str(step)
  with retries.store_errors(f"Checkpoint {folder} cannot be read", str(folder)):
    try:
      yield
    except Exception as e:  # orbax raises many classes on flipped bytes, Exception included
      cause = e.__cause__ or e
      if retries.has_other_cause(cause, str(folder)):  # moving it away would lose a run
        raise
      why = " ".join(str(cause).split())[:200] or type(cause).__name__
      raise damage_error(saves, step, why.removesuffix(".")) from e


def damage_error(saves: ocp.CheckpointManager, step: int, why: str) -> InputError:
  earlier = [s for s in sorted(saves.all_steps()) if s < step]
  then = f"resume from checkpoint {earlier[-1]}" if earlier else "start again"
  return InputError(
    f"Checkpoint {saves.directory / str(step)} is damaged ({why}). Move that folder away to {then}."
  )


def _leaves_by_path(
  tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
  """Returns (dotted path, leaf) for each leaf, in tree order."""
  leaves = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    leaves.append((name.removesuffix(".value"), leaf))
  return leaves
