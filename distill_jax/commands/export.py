"""`export`: a run as a Hugging Face folder that `transformers` loads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.errors import InputError
from distill_jax.hub import export as hub
from distill_jax.hub import peft
from distill_jax.models import loading
from distill_jax.models.options import ModelOptions
from distill_jax.nn import params, quantise, sharding
from distill_jax.nn.layer_sharing import ShareOptions
from distill_jax.report import model_card
from distill_jax.runtime import storage

LORA = ("merged", "peft", "base")
OURS = (loading.RUN, "package:")  # sources that nobody else reads


def run(config: Config, workdir: Path) -> dict[str, Any]:
  """Writes the run in `workdir` as a Hugging Face folder into export.dir."""
  if not config.export.dir:
    raise InputError("export.dir is empty; name the folder to make")
  evaluation = None
  if config.export.evaluation:
    evaluation = _read(Path(config.export.evaluation))
  lora, c = config.student.lora, config.export
  if c.lora not in LORA or (c.lora != "merged" and not lora.rank):
    raise InputError(
      f"export.lora is {c.lora!r} and student.lora.rank {lora.rank}; it can be one of {LORA}, the "
      "last two where adapters were trained"
    )
  mesh = sharding.make_mesh(**vars(config.mesh))
  made_card = model_card.card(config, c.step or config.train.steps, evaluation)
  pretrained = loading.pretrained(config.student)
  tokenizer = corpus.files_of(config.data, pretrained)
  with storage.new_folder(c.dir) as target, jax.set_mesh(mesh):
    if c.lora == "peft":
      loading.check_base(workdir, config)
      model = loading.restore(workdir, mesh, c.step or None)
      peft.export(
        model,
        lora,
        target,
        base=_base(config.student),
        tokenizer=tokenizer,
        card=made_card,
        dtype=c.dtype,
      )
    else:
      model = _model(config, workdir, mesh)
      hub.export(
        model,
        target,
        tokenizer=tokenizer,
        generation=pretrained.generation if pretrained else {},
        card=made_card,
        dtype=c.dtype,
        shard_bytes=c.shard_bytes,
        extra=_said_of_tasks(config),
      )
  made = {"export_dir": c.dir, "parameters": params.count(model)}
  if config.student.share.layers:  # the folder has each of them as often as it is used
    made["shared_parameters"] = params.count(loading.abstract_trainable(config.student))
  if config.student.quantise.bits:  # what they would take; the folder has them in export.dtype
    made["integer_bytes"] = quantise.nbytes(model, config.student.quantise)
  return made


def _model(config: Config, workdir: Path, mesh: Any) -> Any:
  """What a run has made; or, for export.lora=base, what its adapters belong to."""
  spec, key = config.student, loading.keys(config.seed)["student"]
  if config.export.lora == "base":
    loading.check_base(workdir, config)
    return loading.build(spec, mesh, key).model
  spec = dataclasses.replace(
    spec,
    source=loading.RUN + str(workdir),
    keep_layers=(),
    changes={},
    new=(),
    share=ShareOptions(),
  )
  return loading.build(spec, mesh, key, config.export.step or None).model


def _said_of_tasks(config: Config) -> dict[str, Any]:
  """What the exported folder says of a task; of several, each has but a part of the head."""
  if len(config.tasks) != 1:
    return {}
  return next(iter(config.tasks.values())).hub_files(loading.family_and_config(config.student)[1])


def _base(spec: ModelOptions) -> tuple[str, str] | None:
  """(name, revision) of what PEFT can load; None: of nothing but what export.lora=base makes."""
  if not spec.source or spec.keep_layers or spec.source.startswith(OURS):
    return None
  if not spec.source.startswith("hub:"):
    return None if spec.source.endswith(".gguf") else (spec.source, "")
  name, _, revision = spec.source.removeprefix("hub:").partition("@")
  return name, revision


def _read(path: Path) -> dict[str, Any]:
  if not path.is_file():
    raise InputError(f"{path} is not there; run evaluate first or leave export.evaluation empty")
  return json.loads(path.read_text())
