"""A model from its entry in a config: random, imported, or out of a run."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from distill_jax import registry
from distill_jax.config import Config
from distill_jax.errors import InputError
from distill_jax.hub import load as hub
from distill_jax.models.options import ModelOptions, StudentOptions
from distill_jax.nn import layer_sharing, lora, params, quantise, sharding
from distill_jax.nn.layer_sharing import ShareOptions
from distill_jax.nn.layers import ComputeConfig
from distill_jax.nn.quantise import QuantiseOptions
from distill_jax.runtime import checkpoint, json_io, storage, workdir

RUN = "run:"
BASE = "base.json"  # in the folder of a run of adapters: whose they are


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """A model beside how it is computed and, where it was imported, what came with it."""

  model: Any
  config: Any  # the family's Config
  compute: ComputeConfig
  pretrained: hub.Pretrained | None  # tokenizer, generation config, digest; None if random


def keys(seed: int) -> dict[str, jax.Array]:
  """Where all randomness of a run begins, each use with a key of its own."""
  names = ("student", "teacher", "records", "adapters", "lora", "generate")
  return dict(zip(names, jax.random.split(jax.random.key(seed), len(names)), strict=True))


def run_folder(source: str) -> Path:
  """The folder, on this machine, of the run that "run:WORKDIR" names."""
  return storage.local(source.removeprefix(RUN))


def compute_config(spec: ModelOptions) -> ComputeConfig:
  rules = sharding.rules(spec.rules)
  return ComputeConfig(
    dtype=spec.dtype,
    rules=rules,
    remat=spec.remat,
    attention=spec.attention,
    quantise=spec.quantise if isinstance(spec, StudentOptions) else QuantiseOptions(),
  )


def pretrained(spec: ModelOptions) -> hub.Pretrained | None:
  """What a source holds, its weights unread; None without a source."""
  if not spec.source:
    return None
  if spec.source.startswith(RUN):
    return pretrained(workdir.read_config(run_folder(spec.source)).student)
  source = hub.open_model(spec.source)
  if spec.digest and source.digest != spec.digest:
    raise InputError(
      f"{spec.source} has digest {source.digest} and the config wants {spec.digest}; it is another "
      f"model, or a damaged file"
    )
  return source


def family_and_config(spec: ModelOptions) -> tuple[str, Any]:
  """(family, its Config) of a model, with no weight read or made."""
  if spec.source.startswith(RUN):
    if spec.changes or spec.new or spec.keep_layers:
      raise InputError(
        f"{spec.source} is a run, and keep_layers {spec.keep_layers}, changes {spec.changes} and "
        f"new {spec.new} are not for runs; export it and name the folder"
      )
    return family_and_config(workdir.read_config(run_folder(spec.source)).student)
  if spec.source:
    source = hub.open_model(spec.source)
    if spec.shape:
      _check_shape(spec, source)
    family, config = source.family, source.config
  else:
    family, config = spec.family, _named(spec)
  config = _changed(config, spec.changes)
  return family, config.keep_layers(spec.keep_layers) if spec.keep_layers else config


def _changed(config: Any, changes: Mapping[str, Any], at: str = "") -> Any:
  """A Config with the fields that `changes` gives; of a Config within it, those that a dict gives.

  Args: at, where this Config lies in the family's, as "vision.".
  """
  known, new = [f.name for f in dataclasses.fields(config)], {}
  for key, value in changes.items():
    if key not in known:
      near = difflib.get_close_matches(key, known, 1)
      hint = f"did you mean {at + near[0]!r}?" if near else f"there are {', '.join(known)}"
      raise InputError(f"changes names {at + key!r}, which no model of this family has; {hint}")
    new[key] = tuple(value) if isinstance(value, list) else value
    if dataclasses.is_dataclass(part := getattr(config, key)):
      if not isinstance(value, Mapping):
        raise InputError(f"changes gives {at + key} {value!r}; a dict of its fields was expected")
      new[key] = _changed(part, value, f"{at}{key}.")
  return dataclasses.replace(config, **new)


def _named(spec: ModelOptions) -> Any:
  shapes = registry.load("models", spec.family).CONFIGS
  if spec.shape not in shapes:
    raise InputError(f"{spec.family} has no shape {spec.shape!r}; it names {', '.join(shapes)}")
  return shapes[spec.shape]


def _check_shape(spec: ModelOptions, source: hub.Pretrained) -> None:
  """Refuses a source that is not of the shape beside it, by which preflight has judged it."""
  same = {"max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling"}  # no sizes
  said, is_ = (
    {k: v for k, v in vars(c).items() if k not in same} for c in (_named(spec), source.config)
  )
  if spec.family != source.family or said != is_:
    key = next((k for k in is_ if said.get(k) != is_[k]), "family")
    a, b = said.get(key, spec.family), is_.get(key, source.family)
    raise InputError(
      f"{spec.source} has {key} {b!r} and the shape beside it, {spec.family} {spec.shape}, has "
      f"{a!r}; name its own shape, or none"
    )


def abstract(spec: ModelOptions) -> Any:
  """The model as shapes: what `build` would make, in no memory."""
  family, config = family_and_config(spec)
  make = registry.load("models", family).Model
  init = lambda key: _cast(make(config, key), spec.param_dtype)
  return jax.eval_shape(init, jax.random.key(0))


def abstract_trainable(spec: StudentOptions) -> Any:
  """What training changes, as shapes: the model, its shared layers, or its adapters."""
  model = abstract(spec)
  if spec.share != ShareOptions():
    start = functools.partial(layer_sharing.start, spec=spec.share, fit=bool(spec.source))
    return jax.eval_shape(start, model, key=jax.random.key(0))
  if not spec.lora.rank:
    return model
  return jax.eval_shape(lambda key: lora.init(model, spec.lora, key), jax.random.key(0))


def identity(spec: ModelOptions, seed: int) -> dict[str, str]:
  """Who a teacher is, for a store's manifest: its name and the sha256 of its weights."""
  if spec.source.startswith(RUN):
    run = run_folder(spec.source)
    config, digest = workdir.read_config(run), checkpoint.digest(run)
    if config.student.lora.rank:
      both = digest + identity(config.student, config.seed)["digest"]
      digest = hashlib.sha256(both.encode()).hexdigest()
  elif (source := pretrained(spec)) is not None:
    digest = source.digest
  else:
    digest = f"random, seed {seed}"
  return {"name": spec.source or f"{spec.family} {spec.shape}", "digest": digest}


def build(spec: ModelOptions, mesh: Mesh, key: jax.Array, step: int | None = None) -> LoadedModel:
  """The model with its parameters, sharded over the mesh as the rules store them.

  Adapters that a run has trained are merged into its model, shared layers are written out, and
  weights that it has trained as integers are on their grids. Of what `spec` asks for, layers are
  shared here, and adapters and integers are not made. `step` chooses the checkpoint of a run;
  None is the last.
  """
  compute = compute_config(spec)
  if isinstance(spec, StudentOptions) and spec.share.layers:
    built = build_shared(spec, mesh, key, step)
    return dataclasses.replace(built, model=_written_out(built.model, mesh, compute))
  if spec.source.startswith(RUN):
    model = _of_run(run_folder(spec.source), mesh, compute, step)
    return LoadedModel(model, family_and_config(spec)[1], compute, pretrained(spec))
  if spec.source:
    source = pretrained(spec)
    assert source is not None
    new = hub.New(_changed(source.config, spec.changes), spec.new, key)
    model = hub.load(source, mesh, compute, spec.param_dtype, spec.keep_layers, new=new)
    return LoadedModel(model, model.config, compute, source)
  family, config = family_and_config(spec)
  make = registry.load("models", family).Model
  where = sharding.shardings(abstract(spec), mesh, compute.rules)
  init = lambda key: _cast(make(config, key), spec.param_dtype)
  return LoadedModel(jax.jit(init, out_shardings=where)(key), config, compute, None)


def build_shared(
  spec: StudentOptions, mesh: Mesh, key: jax.Array, step: int | None = None
) -> LoadedModel:
  """As `build`, but its model is the share.Shared that training starts from."""
  built = build(dataclasses.replace(spec, share=ShareOptions()), mesh, key, step)
  where = sharding.shardings(abstract_trainable(spec), mesh, built.compute.rules)
  start = functools.partial(layer_sharing.start, spec=spec.share, fit=bool(spec.source))
  model = jax.jit(start, out_shardings=where)(built.model, key=jax.random.fold_in(key, 1))
  return dataclasses.replace(built, model=model)


def _written_out(shared: layer_sharing.Shared, mesh: Mesh, compute: ComputeConfig) -> Any:
  where = sharding.shardings(
    jax.eval_shape(layer_sharing.Shared.merge_adapters, shared), mesh, compute.rules
  )
  return jax.jit(layer_sharing.Shared.merge_adapters, out_shardings=where)(shared)


def _of_run(run: Path, mesh: Mesh, compute: ComputeConfig, step: int | None) -> Any:
  config = workdir.read_config(run)
  learnt = restore(run, mesh, step)
  if config.student.share.layers:
    learnt = _written_out(learnt, mesh, compute)
  if config.student.quantise.bits:
    on_grid = functools.partial(quantise.tree, spec=config.student.quantise)
    where = sharding.shardings(learnt, mesh, compute.rules)
    return jax.jit(on_grid, out_shardings=where, donate_argnums=0)(learnt)
  if not config.student.lora.rank:
    return learnt
  check_base(run, config)
  base = build(config.student, mesh, keys(config.seed)["student"]).model
  where = sharding.shardings(base, mesh, compute.rules)
  return jax.jit(lora.merge_adapters, out_shardings=where, donate_argnums=0)(base, learnt)


def restore(run: Path, mesh: Mesh, step: int | None = None) -> Any:
  """What a run has trained: its model, the shared layers of one, or adapters alone."""
  spec = workdir.read_config(run).student
  like = abstract_trainable(spec)
  like = place(like, sharding.shardings(like, mesh, compute_config(spec).rules))
  return checkpoint.restore_params(run, like, step)


def pin_base(run: Path, config: Config) -> None:
  """Writes down, once, which weights a run's adapters are trained on; refuses others."""
  if not (run / BASE).exists():
    json_io.write_json(run / BASE, identity(config.student, config.seed))
  check_base(run, config)


def check_base(run: Path, config: Config) -> None:
  """Refuses other weights than those that a run's adapters were trained on."""
  file = run / BASE
  if not file.exists():
    raise InputError(f"{run} holds adapters and no {BASE}, which names their base; train there")
  was, now = json.loads(file.read_text()), identity(config.student, config.seed)
  if was["digest"] != now["digest"]:
    raise InputError(
      f"the adapters in {run} were trained on {was['name']} with digest {was['digest']} and it now "
      f"has {now['digest']}; bring the old weights back or train in another --workdir"
    )


def place(abstract: Any, where: Any) -> Any:
  """An abstract tree that carries shardings, as orbax wants it."""
  leaf = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  return jax.tree.map(leaf, abstract, where)


def _cast(model: Any, dtype: str) -> Any:
  return params.map_params(lambda v: v.replace(v[...].astype(dtype)), model)
