"""Checkpoints: orbax behind four functions, and a checksum of every array.

A state is saved as a flat mapping from dotted path to array, so that a checkpoint can be
read without the classes that made it. The position of the loader is the step itself
(training/loader.py), so state and data cannot come apart. Beside the state lies its metadata,
`about`: the checksums, and what the caller adds, such as the digests of the records.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from distill_jax.errors import InputError
from distill_jax.runtime import extras, storage
from distill_jax.types import JsonObject, PyTree

with extras.needed("train"):
  import orbax.checkpoint as ocp

STATE, ABOUT = "state", "about"


def manager(workdir: Path, keep: int = 1, every: int = 0) -> ocp.CheckpointManager:
  """Asynchronous saves under workdir/checkpoints: the last `keep` stay, and every `every`th."""
  options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=every or None)
  return ocp.CheckpointManager(epath.Path(storage.checkpoints(workdir)), options=options)


def save(saves: ocp.CheckpointManager, step: int, state: PyTree, metadata: JsonObject) -> None:
  """Starts saving a state, which may be donated to the next step once this returns.

  Args:
    metadata: plain values that must be the same when the state is restored.

  Raises:
    InputError: the step is saved already, or this or the save before it cannot be written.
  """
  flat = dict(_leaves_by_path(state))
  stored = {**metadata, "arrays": _array_records(flat)}
  items = ocp.args.Composite(
    state=ocp.args.StandardSave(flat),
    about=ocp.args.JsonSave({**stored, "sha256": _sha256(stored)}),
  )
  with _writing(saves):
    saved = saves.save(step, args=items)
  if not saved:
    raise InputError(f"checkpoint {step} is already in {saves.directory}; it is not overwritten")


def wait(saves: ocp.CheckpointManager) -> None:
  """Waits until all that was saved is on disk.

  Raises:
    InputError: it cannot be written.
  """
  with _writing(saves):
    saves.wait_until_finished()


def restore(
  saves: ocp.CheckpointManager, abstract: PyTree, metadata: JsonObject, step: int | None = None
) -> PyTree:
  """Returns the state that was saved, in the shardings of the abstract state.

  Args:
    abstract: the state as shapes with shardings.
    metadata: what the state must have been saved with.
    step: of the checkpoint; None is the last one.

  Raises:
    InputError: there is no such checkpoint, it is damaged, it is of another model, or it was
      saved with other metadata.
  """
  step = _existing_step(saves, step)
  stored = _read_metadata(saves, step)
  for name, expected in metadata.items():
    if stored[name] != expected:
      raise InputError(
        f"{saves.directory / str(step)} was saved with {name} {stored[name]} and this run has "
        f"{expected}; bring the former back, or train in another --workdir"
      )
  return _read(saves, step, "", abstract)


def restore_params(workdir: str | Path, abstract: PyTree, step: int | None = None) -> PyTree:
  """Returns what a run has trained, without the optimizer's state; see `restore`."""
  with _open(workdir) as saves:
    return _read(saves, _existing_step(saves, step), "params.", abstract)


def digest(workdir: str | Path) -> str:
  """Returns the sha256, in hex, of the checksums of what a run has trained, at its last step."""
  with _open(workdir) as saves:
    arrays = _read_metadata(saves, _existing_step(saves, None))["arrays"]
  return _sha256({path: x for path, x in arrays.items() if path.startswith("params.")})


def checksums(tree: PyTree) -> PyTree:
  """Returns two uint32 for each array, the same on every mesh: sums of hashed numbers.

  Each number's bits are hashed with its index by bijections, so a change of one number always
  changes the sums; and sums modulo 2^32 do not depend on the order of addition.
  """
  # One by one: arrays of one shape share a program, and on CPU programs of all devices that are
  # under way together can wait for each other for ever.
  return jax.tree.map(lambda x: np.asarray(_sums(x)), tree)


@jax.jit
def _sums(x: jax.Array) -> jax.Array:
  bits = x.view(f"uint{8 * x.dtype.itemsize}") if x.dtype != bool else x
  bits = bits.astype(jnp.uint32)
  for axis in range(x.ndim):
    place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    bits = _scramble(bits + place * jnp.uint32(0x9E3779B1))
  return jnp.stack([jnp.sum(_scramble(x), dtype=jnp.uint32) for x in (bits, bits ^ 1)])


def _scramble(x: jax.Array) -> jax.Array:
  """A bijection of uint32: the finaliser of MurmurHash3 (Appleby, public domain)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _read(saves: ocp.CheckpointManager, step: int, prefix: str, abstract: PyTree) -> PyTree:
  """Returns the arrays under a prefix as the tree `abstract`, each checked by its checksums."""
  expected = {prefix + path: leaf for path, leaf in _leaves_by_path(abstract)}
  folder = saves.directory / str(step)
  saved = {
    path: record
    for path, record in _read_metadata(saves, step)["arrays"].items()
    if path.startswith(prefix)
  }
  for path in sorted(saved.keys() | expected.keys()):
    has = saved[path]["is"] if path in saved else "nothing"
    wants = _dtype_and_shape(expected[path]) if path in expected else "nothing"
    if has != wants:
      raise InputError(
        f"{folder} holds {path} as {has} and this model has {wants} there; it is of another model, "
        "so choose another --workdir or the model that made it"
      )
  args = ocp.args.PyTreeRestore(
    expected,
    restore_args=ocp.checkpoint_utils.construct_restore_args(expected),
    partial_restore=True,
  )
  with _reading(saves, step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    flat = reader.restore(folder / STATE, args=args)
  for path, record in _array_records(flat).items():
    if record != saved[path]:
      raise _damage_error(saves, step, f"{path} is not as it was saved")
  return jax.tree.unflatten(jax.tree.structure(abstract), [flat[p] for p in expected])


def _read_metadata(saves: ocp.CheckpointManager, step: int) -> JsonObject:
  with _reading(saves, step):
    items = ocp.args.Composite(about=ocp.args.JsonRestore())
    metadata = dict(saves.restore(step, args=items)[ABOUT])
    if metadata.pop("sha256") != _sha256(metadata):
      raise ValueError(f"{ABOUT} is not as it was saved")
  return metadata


def _array_records(flat: dict[str, jax.Array]) -> JsonObject:
  """Returns, by path, an array's dtype and shape, and its checksums."""
  sums = checksums(flat)
  return {
    path: {"is": _dtype_and_shape(x), "sums": [int(n) for n in sums[path]]}
    for path, x in flat.items()
  }


def _dtype_and_shape(x: Any) -> str:
  return f"{x.dtype}{list(x.shape)}"


def _sha256(tree: PyTree) -> str:
  return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


@contextmanager
def _open(workdir: str | Path) -> Iterator[ocp.CheckpointManager]:
  folder = epath.Path(storage.checkpoints(workdir))
  if not folder.is_dir():
    raise InputError(f"{workdir} holds no checkpoints; train there first")
  with ocp.CheckpointManager(folder) as saves:
    yield saves


def _existing_step(saves: ocp.CheckpointManager, step: int | None) -> int:
  """Returns the step, or the last one for None; raises InputError if it was not saved."""
  steps = sorted(saves.all_steps())
  if not steps or (step is not None and step not in steps):
    raise InputError(
      f"{saves.directory} holds checkpoints {steps} and not {step or 'any'}; name one of them, or "
      "train there first"
    )
  return steps[-1] if step is None else step


@contextmanager
def _writing(saves: ocp.CheckpointManager) -> Iterator[None]:
  """Turns errors of writing into InputErrors: also those of the save before, in the background."""
  try:
    yield
  except (ValueError, OSError) as e:  # tensorstore's errors are ValueErrors
    raise InputError(
      f"a checkpoint cannot be written into {saves.directory} ({str(e).splitlines()[0][-200:]}); "
      "free space, or choose another place, and run again: the checkpoints before it are whole"
    ) from e


@contextmanager
def _reading(saves: ocp.CheckpointManager, step: int) -> Iterator[None]:
  """Turns whatever orbax raises on a damaged checkpoint into an InputError."""
  try:
    yield
  except Exception as e:  # orbax raises that very class, and six others, as flipped bytes show
    cause = e.__cause__ or e
    why = " ".join(str(cause).split())[:200] or type(cause).__name__
    raise _damage_error(saves, step, why) from e


def _damage_error(saves: ocp.CheckpointManager, step: int, why: str) -> InputError:
  earlier = [s for s in sorted(saves.all_steps()) if s < step]
  then = f"to go on from checkpoint {earlier[-1]}" if earlier else "to start anew"
  return InputError(
    f"checkpoint {saves.directory / str(step)} is damaged ({why}); move that folder away {then}"
  )


def _leaves_by_path(tree: PyTree) -> list[tuple[str, Any]]:
  """Returns (dotted path, leaf) for each leaf, in the order of the tree."""
  leaves = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    leaves.append((name.removesuffix(".value"), leaf))
  return leaves
