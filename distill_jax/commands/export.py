"""The verbs that only join what other modules do: export, report, inspect."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax

from distill_jax import report as pages
from distill_jax.config import Config, Model, Share
from distill_jax.data import corpus
from distill_jax.errors import InputError
from distill_jax.hub import export as hub
from distill_jax.hub import peft
from distill_jax.models import loading
from distill_jax.nn import params, quantise, sharding
from distill_jax.records import describe as records
from distill_jax.records.store import open_store
from distill_jax.report import model_card
from distill_jax.runtime import storage
from distill_jax.runtime.progress import Progress

LORA = ("merged", "peft", "base")
OURS = (loading.RUN, "package:")  # sources that nobody else reads


def export(config: Config, workdir: Path) -> dict[str, Any]:
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
  came = loading.pretrained(config.student)
  tokenizer = corpus.files_of(config.data, came)
  with storage.new_folder(c.dir) as target, jax.set_mesh(mesh):
    if c.lora == "peft":
      loading.check_base(workdir, config)
      model = loading.restore(workdir, mesh, c.step or None)
      peft.export(
        model, lora, target, base=_base(config.student), tokenizer=tokenizer, card=made_card,
        dtype=c.dtype,
      )  # fmt: skip
    else:
      model = _model(config, workdir, mesh)
      hub.export(
        model, target, tokenizer=tokenizer, generation=came.generation if came else {},
        card=made_card, dtype=c.dtype, shard_bytes=c.shard_bytes, extra=_said_of_tasks(config),
      )  # fmt: skip
  made = {"export_dir": c.dir, "parameters": params.count(model)}
  if config.student.share.layers:  # the folder has each of them as often as it is used
    made["shared_parameters"] = params.count(loading.trained(config.student))
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
    spec, source=loading.RUN + str(workdir), keep_layers=(), changes={}, new=(), share=Share()
  )
  return loading.build(spec, mesh, key, config.export.step or None).model


def _said_of_tasks(config: Config) -> dict[str, Any]:
  """What the exported folder says of a task; of several, each has but a part of the head."""
  if len(config.tasks) != 1:
    return {}
  return next(iter(config.tasks.values())).hub(loading.shape(config.student)[1])


def _base(spec: Model) -> tuple[str, str] | None:
  """(name, revision) of what PEFT can load; None: of nothing but what export.lora=base makes."""
  if not spec.source or spec.keep_layers or spec.source.startswith(OURS):
    return None
  if not spec.source.startswith("hub:"):
    return None if spec.source.endswith(".gguf") else (spec.source, "")
  name, _, revision = spec.source.removeprefix("hub:").partition("@")
  return name, revision


def report(config: Config, workdir: Path) -> dict[str, Any]:
  """Writes report.html into `workdir` from the evaluation there and the runs it names."""
  runs = {
    name: loading.run_folder(source)
    for name, source in config.evaluate.models.items()
    if source.startswith(loading.RUN)
  }
  about = (
    records.describe(open_store(storage.local(config.train.records[0])))
    if config.train.records
    else None
  )
  return pages.report(workdir, runs=runs, records=about, export_dir=config.export.dir)


def inspect(config: Config, workdir: Path) -> dict[str, Any]:
  """Describes the store in `workdir`; --config.inspect.sequence shows one, .verify reads all."""
  store = open_store(workdir)
  if config.inspect.verify:
    with Progress("verify", len(store), "sequences") as progress:
      store.verify(lambda done, total: progress.add(done - progress.done))
  if config.inspect.sequence >= 0:
    if config.inspect.sequence >= len(store):
      raise InputError(
        f"inspect.sequence is {config.inspect.sequence} and {workdir} holds {len(store)} sequences"
      )
    tokenizer = corpus.tokenizer_of(config.data, loading.pretrained(config.teacher))
    if tokenizer.digest != store.manifest.tokenizer:
      raise InputError(
        f"{workdir} was recorded with tokenizer {store.manifest.tokenizer[:12]} and "
        f"{tokenizer.where} is {tokenizer.digest[:12]}; name the store's own in data.tokenizer"
      )
    print(records.show(store, config.inspect.sequence, tokenizer.decode), file=sys.stderr)
  return records.describe(store)


def _read(path: Path) -> dict[str, Any]:
  if not path.is_file():
    raise InputError(f"{path} is not there; run evaluate first or leave export.evaluation empty")
  return json.loads(path.read_text())
