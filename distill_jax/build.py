"""A model from its entry in a config: random, imported, or out of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from distill_jax import checkpoint, folder, params, sharding, workdir
from distill_jax.config import Model
from distill_jax.errors import InputError
from distill_jax.hub import load as hub
from distill_jax.layers import Compute

RUN = "run:"


@dataclasses.dataclass(frozen=True)
class Built:
  """A model beside how it is computed and, where it was imported, what came with it."""

  model: Any
  config: Any  # the family's Config
  how: Compute
  pretrained: hub.Pretrained | None  # tokenizer, generation config, digest; None if random


def keys(seed: int) -> dict[str, jax.Array]:
  """Where all randomness of a run begins, each use with a key of its own."""
  names = ("student", "teacher", "records", "adapters")
  return dict(zip(names, jax.random.split(jax.random.key(seed), len(names)), strict=True))


def compute(spec: Model) -> Compute:
  return Compute(dtype=spec.dtype, remat=spec.remat)


def pretrained(spec: Model) -> hub.Pretrained | None:
  """What a source holds, its weights unread; None without a source."""
  if not spec.source:
    return None
  if spec.source.startswith(RUN):
    return pretrained(workdir.read_config(spec.source.removeprefix(RUN)).student)
  source = hub.open_model(spec.source)
  if spec.digest and source.digest != spec.digest:
    raise InputError(
      f"{spec.source} has digest {source.digest} and the config wants {spec.digest}; it is another "
      f"model, or a damaged file"
    )
  return source


def shape(spec: Model) -> tuple[str, Any]:
  """(family, its Config) of a model, with no weight read or made."""
  if spec.source.startswith(RUN):
    return shape(workdir.read_config(spec.source.removeprefix(RUN)).student)
  if spec.source:
    source = hub.open_model(spec.source)
    kept = spec.keep_layers
    return source.family, source.config.keep(kept) if kept else source.config
  shapes = folder.load("models", spec.family).CONFIGS
  if spec.shape not in shapes:
    raise InputError(f"{spec.family} has no shape {spec.shape!r}; it names {', '.join(shapes)}")
  return spec.family, shapes[spec.shape]


def abstract(spec: Model) -> Any:
  """The model as shapes: what `build` would make, in no memory."""
  family, config = shape(spec)
  make = folder.load("models", family).Model
  init = lambda key: _cast(make(config, key), spec.param_dtype)
  return jax.eval_shape(init, jax.random.key(0))


def identity(spec: Model, seed: int) -> dict[str, str]:
  """Who a teacher is, for a store's manifest: its name and the sha256 of its weights."""
  if spec.source.startswith(RUN):
    digest = checkpoint.digest(spec.source.removeprefix(RUN))
  elif (source := pretrained(spec)) is not None:
    digest = source.digest
  else:
    digest = f"random, seed {seed}"
  return {"name": spec.source or f"{spec.family} {spec.shape}", "digest": digest}


def build(spec: Model, mesh: Mesh, key: jax.Array, step: int | None = None) -> Built:
  """The model with its parameters, sharded over the mesh as the rules store them.

  `step` chooses the checkpoint of a run; None is the last.
  """
  how = compute(spec)
  if spec.source.startswith(RUN):
    run = Path(spec.source.removeprefix(RUN))
    like = abstract(workdir.read_config(run).student)
    like = place(like, sharding.shardings(like, mesh, how.rules))
    return Built(checkpoint.restore_params(run, like, step), shape(spec)[1], how, pretrained(spec))
  if spec.source:
    source = pretrained(spec)
    assert source is not None
    model = hub.load(source, mesh, how, spec.param_dtype, spec.keep_layers)
    return Built(model, model.config, how, source)
  family, config = shape(spec)
  make = folder.load("models", family).Model
  where = sharding.shardings(abstract(spec), mesh, how.rules)
  init = lambda key: _cast(make(config, key), spec.param_dtype)
  return Built(jax.jit(init, out_shardings=where)(key), config, how, None)


def place(abstract: Any, where: Any) -> Any:
  """An abstract tree that carries shardings, as orbax wants it."""
  leaf = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  return jax.tree.map(leaf, abstract, where)


def _cast(model: Any, dtype: str) -> Any:
  return params.map_params(lambda v: v.replace(v[...].astype(dtype)), model)
