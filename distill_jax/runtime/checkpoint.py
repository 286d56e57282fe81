"""Checkpoints: orbax behind four functions, and a checksum of every array.

A state is saved as a flat mapping from dotted path to array, so that a checkpoint can be
read without the classes that made it. The position of the loader is the step itself
(data/loader.py), so state and data cannot come apart. Beside the state lies what it belongs
to, `about`: the checksums, and whatever the caller says of its records.
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
import orbax.checkpoint as ocp
from etils import epath

from distill_jax.errors import InputError
from distill_jax.runtime import storage

STATE, ABOUT = "state", "about"


def manager(workdir: Path, keep: int = 1, every: int = 0) -> ocp.CheckpointManager:
  """Asynchronous saves under workdir/checkpoints: the last `keep` stay, and every `every`th."""
  options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=every or None)
  return ocp.CheckpointManager(epath.Path(storage.checkpoints(workdir)), options=options)


def save(saves: ocp.CheckpointManager, step: int, state: Any, about: dict[str, Any]) -> None:
  """Starts saving; the state may be donated to the next step once this returns."""
  flat = dict(_paths(state))
  about = {**about, "arrays": _describe(flat)}
  unit = ocp.args.Composite(
    state=ocp.args.StandardSave(flat),
    about=ocp.args.JsonSave({**about, "sha256": _sha256(about)}),
  )
  with _writing(saves):
    saved = saves.save(step, args=unit)
  if not saved:
    raise InputError(f"checkpoint {step} is already in {saves.directory}; it is not overwritten")


def wait(saves: ocp.CheckpointManager) -> None:
  """Until what was saved is on disk.

  Raises:
    InputError: it cannot be written.
  """
  with _writing(saves):
    saves.wait_until_finished()


def restore(
  saves: ocp.CheckpointManager, abstract: Any, about: dict[str, Any], step: int | None = None
) -> Any:
  """The state of a step (the last without one), onto the abstract state's shardings.

  Raises:
    InputError: there is no such checkpoint, it is damaged, it is of another model, or it was
      saved with another `about`.
  """
  step = _step(saves, step)
  found = _about(saves, step)
  for name, want in about.items():
    if found[name] != want:
      raise InputError(
        f"{saves.directory / str(step)} was saved with {name} {found[name]} and this run has "
        f"{want}; bring the former back, or train in another --workdir"
      )
  return _read(saves, step, "", abstract)


def restore_params(workdir: str | Path, abstract: Any, step: int | None = None) -> Any:
  """What a run has trained, alone, out of its checkpoint."""
  with _open(workdir) as saves:
    return _read(saves, _step(saves, step), "params.", abstract)


def digest(workdir: str | Path) -> str:
  """sha256, in hex, of what a run has trained, by the checksums in its last checkpoint."""
  with _open(workdir) as saves:
    arrays = _about(saves, _step(saves, None))["arrays"]
  return _sha256({path: x for path, x in arrays.items() if path.startswith("params.")})


def checksums(tree: Any) -> Any:
  """Two uint32 of each array, the same on every mesh: sums, modulo 2^32, of hashed numbers.

  Each number's bits are hashed with its place, by steps that lose nothing; so one number
  changed always changes the sums, and integers add up the same in any order.
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


def _read(saves: ocp.CheckpointManager, step: int, prefix: str, abstract: Any) -> Any:
  """The arrays under a prefix, as `abstract` has them, each checked against its checksum."""
  wanted = {prefix + path: leaf for path, leaf in _paths(abstract)}
  where = saves.directory / str(step)
  arrays = {p: x for p, x in _about(saves, step)["arrays"].items() if p.startswith(prefix)}
  for path in sorted(arrays.keys() | wanted.keys()):
    has = arrays[path]["is"] if path in arrays else "nothing"
    wants = _is(wanted[path]) if path in wanted else "nothing"
    if has != wants:
      raise InputError(
        f"{where} holds {path} as {has} and this model has {wants} there; it is of another model, "
        "so choose another --workdir or the model that made it"
      )
  args = ocp.args.PyTreeRestore(
    wanted,
    restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
    partial_restore=True,
  )
  with _damage(saves, step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    flat = reader.restore(where / STATE, args=args)
  for path, found in _describe(flat).items():
    if found != arrays[path]:
      raise _damaged(saves, step, f"{path} is not as it was saved")
  return jax.tree.unflatten(jax.tree.structure(abstract), [flat[p] for p in wanted])


def _about(saves: ocp.CheckpointManager, step: int) -> dict[str, Any]:
  with _damage(saves, step):
    unit = ocp.args.Composite(about=ocp.args.JsonRestore())
    about = dict(saves.restore(step, args=unit)[ABOUT])
    if about.pop("sha256") != _sha256(about):
      raise ValueError(f"{ABOUT} is not as it was saved")
  return about


def _describe(flat: dict[str, jax.Array]) -> dict[str, Any]:
  sums = checksums(flat)
  return {p: {"is": _is(x), "sums": [int(n) for n in sums[p]]} for p, x in flat.items()}


def _is(x: Any) -> str:
  return f"{x.dtype}{list(x.shape)}"


def _sha256(tree: Any) -> str:
  return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


@contextmanager
def _open(workdir: str | Path) -> Iterator[ocp.CheckpointManager]:
  folder = epath.Path(storage.checkpoints(workdir))
  if not folder.is_dir():
    raise InputError(f"{workdir} holds no checkpoints; train there first")
  with ocp.CheckpointManager(folder) as saves:
    yield saves


def _step(saves: ocp.CheckpointManager, step: int | None) -> int:
  """The step asked for, or the last one."""
  there = sorted(saves.all_steps())
  if not there or (step is not None and step not in there):
    raise InputError(
      f"{saves.directory} holds checkpoints {there} and not {step or 'any'}; name one of them, or "
      "train there first"
    )
  return there[-1] if step is None else step


@contextmanager
def _writing(saves: ocp.CheckpointManager) -> Iterator[None]:
  """Also of the save before: it went on in the background."""
  try:
    yield
  except (ValueError, OSError) as e:  # tensorstore's errors are ValueErrors
    raise InputError(
      f"a checkpoint cannot be written into {saves.directory} ({str(e).splitlines()[0][-200:]}); "
      "free space, or choose another place, and run again: the checkpoints before it are whole"
    ) from e


@contextmanager
def _damage(saves: ocp.CheckpointManager, step: int) -> Iterator[None]:
  try:
    yield
  except Exception as e:  # orbax raises that very class, and six others, as flipped bytes show
    cause = e.__cause__ or e
    why = " ".join(str(cause).split())[:200] or type(cause).__name__
    raise _damaged(saves, step, why) from e


def _damaged(saves: ocp.CheckpointManager, step: int, why: str) -> InputError:
  before = [s for s in sorted(saves.all_steps()) if s < step]
  then = f"to go on from checkpoint {before[-1]}" if before else "to start anew"
  return InputError(
    f"checkpoint {saves.directory / str(step)} is damaged ({why}); move that folder away {then}"
  )


def _paths(tree: Any) -> list[tuple[str, Any]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
  return [(name(path).removesuffix(".value"), leaf) for path, leaf in leaves]
