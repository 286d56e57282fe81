"""Loads the weights of a checkpoint directly into their sharding."""

from __future__ import annotations

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import KeyPath

from distill_jax import registry
from distill_jax.errors import InputError, bad_value
from distill_jax.hub import declared
from distill_jax.hub.pretrained import Pretrained
from distill_jax.hub.weights import FLOATS, Weights, float_dtype
from distill_jax.nn import layers, params, sharding
from distill_jax.runtime.progress import Progress
from distill_jax.types import FamilyConfig, Model, PyTree

HEAD = "lm_head.weight"

Spans = tuple[tuple[int, int], ...]  # (start, stop) along each axis


@dataclasses.dataclass(frozen=True)
class Overrides:
  """Differences between the model to build and its checkpoint.

  Attributes:
    config: the architecture config of the model, with all layers of the checkpoint.
    random: Hugging Face parameter-name prefixes to initialise randomly instead of loading.
    key: the key to initialise them with.
  """

  config: FamilyConfig
  random: tuple[str, ...] = ()
  key: jax.Array | None = None

  def is_random(self, name: str) -> bool:
    """Returns whether the parameter with this Hugging Face name is initialised randomly."""
    return name.startswith(self.random)


def load_model(
  pretrained: Pretrained,
  mesh: Mesh,
  compute: layers.ComputeConfig,
  dtype: str = "float32",
  keep_layers: tuple[int, ...] = (),
  overrides: Overrides | None = None,
) -> Model:
  """Loads a model, with each parameter in `dtype` and in its storage sharding on `mesh`.

  Only slices for the devices of this process are read. Besides the parameters, host memory holds at
  most two tensors of the checkpoint and, if the devices have their own memory, one shard.

  Args:
    pretrained: the checkpoint.
    mesh: the device mesh.
    compute: the compute config, which has the sharding rules.
    dtype: the dtype of the parameters.
    keep_layers: the layers of the checkpoint to keep, in this order; (): all.
    overrides: the differences between the model and its checkpoint; None: none.

  Raises:
    InputError: A tensor is missing, is unknown, has the wrong shape or is not a float; a size is
      not divisible by the mesh; or a layer to keep does not exist.
  """
  check_layers(pretrained, keep_layers)
  overrides = overrides or Overrides(pretrained.config)
  family, config = registry.load("models", pretrained.family), overrides.config

  def abstract(config: FamilyConfig) -> Model:
    return jax.eval_shape(lambda key: family.Model(config, key), jax.random.key(0))

  whole = abstract(config)
  _check_overrides(overrides, whole)
  _check_tensors(pretrained.weights, whole, pretrained, overrides)
  model = abstract(config.keep_layers(keep_layers) if keep_layers else config)
  shardings, numpy_dtype = sharding.shardings(model, mesh, compute.rules), float_dtype(dtype)
  random = _random_params(family, model, shardings, overrides, numpy_dtype)
  with (
    Progress("load", _bytes_here(model, shardings, numpy_dtype), "bytes") as progress,
    ThreadPoolExecutor(2) as pool,  # reads one tensor while another is transposed
  ):
    filler = _Filler(pretrained.weights, numpy_dtype, keep_layers, progress, pool)

    def value(path: KeyPath, v: nnx.Variable, variable: nnx.Variable) -> nnx.Variable:
      name = jax.tree_util.keystr(path, simple=True, separator=".")
      if name in random:
        progress.add(random[name].nbytes)
        return v.replace(random[name])
      return filler.fill(v, variable.get_value())

    return jax.tree_util.tree_map_with_path(value, model, shardings, is_leaf=params.is_param)


def check_layers(pretrained: Pretrained, keep_layers: tuple[int, ...]) -> None:
  """Raises InputError if a layer to keep is not in the checkpoint."""
  L = pretrained.config.num_hidden_layers
  if bad := [i for i in keep_layers if not 0 <= i < L]:
    raise bad_value(
      "keep_layers",
      keep_layers,
      f"layers from 0 to {L - 1}, which {pretrained.source} has",
      f"Remove layer {bad[0]}",
    )


def _check_overrides(overrides: Overrides, model: Model) -> None:
  names = {v.get_metadata()["hf"] for v in _leaves(model)}
  unused = [p for p in overrides.random if not any(n.startswith(p) for n in names)]
  if unused:
    raise bad_value(
      "new",
      overrides.random,
      f"prefixes of the parameters {', '.join(sorted(names))}",
      f"Correct {unused[0]!r}",
    )


def _random_params(
  family: ModuleType, model: Model, shardings: PyTree, overrides: Overrides, dtype: np.dtype
) -> dict[str, jax.Array]:
  """Returns the randomly initialised parameters by path, in their sharding."""
  chosen = {
    path for path, v in params.named_params(model) if overrides.is_random(v.get_metadata()["hf"])
  }
  if not chosen:
    return {}
  named = params.named_params(shardings)

  def init(key: jax.Array) -> dict[str, jax.Array]:
    drawn = params.named_params(family.Model(model.config, key))
    return {p: v[...].astype(declared.dtype_of(v, dtype)) for p, v in drawn if p in chosen}

  out_shardings = {path: v.get_value() for path, v in named if path in chosen}
  return jax.jit(init, out_shardings=out_shardings)(overrides.key)


def _bytes_here(model: Model, shardings: PyTree, dtype: np.dtype) -> int:
  """Returns the bytes of the distinct parts of all parameters on this process's devices."""
  total = 0
  for v, place in zip(_leaves(model), jax.tree.leaves(shardings), strict=True):
    part = math.prod(place.shard_shape(v.shape)) * declared.dtype_of(v, dtype).itemsize
    total += part * len(shards_here(v, place))
  return total


def _leaves(model: Model) -> list[nnx.Variable]:
  return [v for _, v in params.named_params(model)]


def _check_tensors(
  weights: Weights, model: Model, pretrained: Pretrained, overrides: Overrides
) -> None:
  """Raises InputError if the checkpoint lacks a tensor of the model or has an additional one."""
  names, source = weights.names(), pretrained.source
  for v in _leaves(model):
    if overrides.is_random(v.get_metadata()["hf"]):
      continue
    shape = declared.Layout(v).shape
    for name, _ in declared.tensors(v):  # a generator, since a damaged config can have millions
      if name not in names:
        raise InputError(
          f"{source} lacks the tensor {name}. Download it again if its files and config.json do "
          "not fit together, or add the prefix of the name to `new` to initialise it randomly."
        )
      if weights.shape(name) != shape:
        raise InputError(
          f"{source}: {name} has shape {weights.shape(name)}; expected {shape} from config.json. "
          "Download both again."
        )
      if weights.dtype(name) not in FLOATS.values():
        raise InputError(
          f"{source}: {name} has dtype {weights.dtype(name)}; expected {', '.join(FLOATS)}. "
          "Convert the weights."
        )
  known = [
    *map(declared.matcher, _leaves(model)),
    overrides.is_random,
    pretrained.config.ignores_tensor,
  ]
  unknown = sorted(n for n in names if not any(is_known(n) for is_known in known))
  if HEAD in unknown and (table := pretrained.config.tied_table) is not None:
    unknown.remove(HEAD)
    _check_tied(weights, source, table)
  if unknown:
    raise InputError(
      f"{source} contains {unknown[0]}, which its model does not have ({len(unknown)} such tensors "
      "in total). Download it again: its files and config.json do not fit together."
    )


def _check_tied(weights: Weights, source: str, table: str, rows: int = 4096) -> None:
  """Raises InputError if the stored head of a tied model differs from the embedding table."""
  same = weights.shape(HEAD) == weights.shape(table)
  for i in range(0, weights.shape(table)[0] if same else 0, rows):
    at = (slice(i, i + rows), slice(None))
    same = same and np.array_equal(weights.read(HEAD, at), weights.read(table, at), equal_nan=True)
  if not same:
    raise InputError(
      f"{source} ties its embeddings, but its {HEAD} differs from the embedding table. Set "
      "tie_word_embeddings to false in config.json if the head is separate."
    )


@dataclasses.dataclass
class _Filler:
  """A reader of parameters from the tensors of a checkpoint."""

  weights: Weights
  dtype: np.dtype
  keep_layers: tuple[int, ...]
  progress: Progress
  pool: ThreadPoolExecutor

  def fill(self, v: nnx.Variable, place: NamedSharding) -> nnx.Variable:
    """Returns the abstract parameter `v` with its value, in its sharding.

    Shards are read one at a time. jax.make_array_from_callback would hold all of this process's
    shards of a stacked parameter on the host at once.
    """
    arrays: dict[jax.Device, jax.Array] = {}
    for spans, devices in shards_here(v, place).items():
      x = self._read_shard(v, spans)
      arrays |= {d: jax.device_put(x, d).block_until_ready() for d in devices}
    order = place.addressable_devices_indices_map(v.shape)
    return v.replace(
      jax.make_array_from_single_device_arrays(v.shape, place, [arrays[d] for d in order])
    )

  def _read_shard(self, v: nnx.Variable, spans: Spans) -> np.ndarray:
    """Returns the part of `v` at `spans`.

    For example, a parameter with axes (layers, embed, mlp) has one tensor per layer. For a shard
    with layers 2 and 3, the tensor of layer 3 is read into `out[1]`.
    """
    index = tuple(slice(start, stop) for start, stop in spans)
    shape = tuple(stop - start for start, stop in spans)
    out = _aligned_empty(shape, declared.dtype_of(v, self.dtype))
    layout, loops = declared.Layout(v), len(declared.loop_axes(v))
    cut = layout.cut(index[loops:])

    def read_tensor(named: tuple[str, tuple[int, ...]]) -> int:
      name, loop_index = named
      within: tuple[Any, ...] = tuple(
        i - start for i, (start, _) in zip(loop_index, spans, strict=False)
      )
      part = out[(*within, ...)]  # with the ellipsis, a view even of a single number
      layout.to_ours(self.weights.read(name, cut.stored), cut, part)
      return part.nbytes

    for nbytes in self.pool.map(read_tensor, declared.tensors(v, index, self.keep_layers)):
      self.progress.add(nbytes)
    return out


def shards_here(v: nnx.Variable, place: NamedSharding) -> dict[Spans, list[jax.Device]]:
  """Returns the distinct parts of `v` on this process's devices, each with its devices."""
  parts: dict[Spans, list[jax.Device]] = {}
  for device, index in place.addressable_devices_indices_map(v.shape).items():
    assert index is not None  # devices of this process have one
    spans = tuple(s.indices(n)[:2] for s, n in zip(index, v.shape, strict=True))
    parts.setdefault(spans, []).append(device)
  return parts


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Returns an array aligned to 64 bytes, which jax uses on CPU without a copy."""
  nbytes = math.prod(shape) * dtype.itemsize
  raw = np.empty(nbytes + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + nbytes].view(dtype).reshape(shape)
