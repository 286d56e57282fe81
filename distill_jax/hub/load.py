"""Loads the weights of a checkpoint directly into their sharding."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from distill_jax import registry
from distill_jax.errors import InputError, bad_value
from distill_jax.hub import declared, identity, read_once, read_shards
from distill_jax.hub.pretrained import Pretrained
from distill_jax.hub.weights import FLOATS, Weights, float_dtype
from distill_jax.nn import layers, params, sharding
from distill_jax.runtime import distributed, files
from distill_jax.runtime.progress import Progress
from distill_jax.types import FamilyConfig, Model, PyTree

HEAD = "lm_head.weight"


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

  From files on this machine, one process reads the slices for its devices (read_shards.py). From a
  store, or on several processes, every byte is read once and the devices exchange the values
  (read_once.py). The parameters are bit-identical.

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
  model = abstract(config.keep_layers(keep_layers)) if keep_layers else whole
  shardings, numpy_dtype = sharding.shardings(model, mesh, compute.rules), float_dtype(dtype)
  values = _random_params(family, model, shardings, overrides, numpy_dtype)
  named = zip(params.named_params(model), jax.tree.leaves(shardings), strict=True)
  stored = {name: (v, place) for (name, v), place in named if name not in values}
  weights, places = pretrained.weights, list(stored.values())
  is_shared = jax.process_count() > 1 or any(files.is_remote(f.path) for f in weights.files)
  reading = read_once if is_shared else read_shards
  with Progress("load", reading.nbytes(places, numpy_dtype), "bytes") as progress:
    arrays = reading.arrays(places, weights, numpy_dtype, keep_layers, progress)
    values |= zip(stored, arrays, strict=True)
  identity.check_unchanged(weights.files)
  return params.replace(model, values)


def check_layers(
  pretrained: Pretrained, keep_layers: tuple[int, ...], key: str = "keep_layers"
) -> None:
  """Raises InputError, with the name of the key, if a layer to keep is not in the checkpoint."""
  L = pretrained.config.num_hidden_layers
  if bad := [i for i in keep_layers if not 0 <= i < L]:
    raise bad_value(
      key,
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
  """Raises InputError if the stored head of a tied model differs from the embedding table.

  Each process compares its share of the rows.
  """
  same = weights.shape(HEAD) == weights.shape(table)
  first, step = jax.process_index() * rows, jax.process_count() * rows
  for i in range(first, weights.shape(table)[0] if same else 0, step):
    at = (slice(i, i + rows), slice(None))
    same = same and np.array_equal(weights.read(HEAD, at), weights.read(table, at), equal_nan=True)
  if distributed.max_over_processes(not same):
    raise InputError(
      f"{source} ties its embeddings, but its {HEAD} differs from the embedding table. Set "
      "tie_word_embeddings to false in config.json if the head is separate."
    )
