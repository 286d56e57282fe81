"""`chain`: students in a row, each distilled from the one before it (arXiv:1902.03393).

Where a student is far smaller than its teacher, an assistant of a size between them may be the
better teacher. Whether it is has to be measured: the same config with a chain of one link is the
student without an assistant.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
from pathlib import Path

from distill_jax.commands import evaluate as evaluation
from distill_jax.commands import export, record
from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.errors import InputError
from distill_jax.hub.export import check_new
from distill_jax.models import DecoderConfig, loading, runs
from distill_jax.models.loading import ModelSource
from distill_jax.models.options import ModelOptions, StudentOptions
from distill_jax.nn import sharding
from distill_jax.pruning import choose, factorise, search, shapes
from distill_jax.pruning.measured_teacher import MeasuredTeacher
from distill_jax.pruning.options import LinkOptions, ShrinkOptions
from distill_jax.report.benchmarks import text  # noqa: F401
from distill_jax.runtime import distributed, json_io, storage
from distill_jax.runtime.workdir import Workdir
from distill_jax.training import loop, optim, validate
from distill_jax.types import JsonObject

MADE, DONE, SCORES, EXPORTED = "made.json", "done.json", "evaluation.json", "exported.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
RESERVED = ("teacher", "start", evaluation.RESULTS)  # names of models, and of a folder beside


@dataclasses.dataclass(frozen=True)
class PlannedLink:
  """A link as it is run, in `folder`: `records`, `model` where it is cut, and `run`."""

  folder: Path
  config: Config  # of its teacher's records and its own training
  is_cut: bool  # whether it is cut from its teacher

  @property
  def source(self) -> str:
    """The model source that names the trained link in a config."""
    return runs.RUN + str(self.folder / "run")


def run(config: Config, workdir: Path) -> JsonObject:
  """Records, trains and measures the links of config.chain, each in a folder of `workdir`.

  The teacher of the first is config.teacher, that of each other one the link before it. It is
  recorded over the corpus as config.records has it, and the link is trained on these records with
  the losses of config. In the end all are evaluated beside the teacher as `evaluate` does, and the
  last is exported where export.dir is set. What is finished is not done again.

  Returns: what evaluation.json in `workdir` holds; delete that file to measure anew.

  Raises:
    InputError: links that are missing or cannot be made, before anything is read or compiled.
    Preempted: SIGTERM was received; finished links are kept.
  """
  if not config.chain:
    raise InputError(
      'chain is empty; name its links, as c.chain = ("assistant", "student"), and add each as '
      "c.links.student = config.link(student=…, steps=…)"
    )
  planned = plan(config, workdir)
  measuring = _evaluation_config(config, planned)
  _check(config, measuring, planned, workdir)
  for link in planned.values():
    if not (link.folder / DONE).exists():
      json_io.write_json_once(link.folder / DONE, _run(link))
  if (workdir / SCORES).exists():
    result = json_io.read_object(workdir / SCORES, "delete it and run chain again")
  else:
    result = evaluation.run(measuring, workdir)
  if config.export.dir and not (workdir / EXPORTED).exists():
    last = planned[config.chain[-1]]
    options = dataclasses.replace(config.export, evaluation=str(workdir / SCORES))
    exported = export.run(dataclasses.replace(last.config, export=options), last.folder / "run")
    json_io.write_json_once(workdir / EXPORTED, exported)
  return result


def plan(config: Config, workdir: Path) -> dict[str, PlannedLink]:
  """Returns the links in their order, by name; each config is that of a `record` and a `train`."""
  _check_names(config)
  planned: dict[str, PlannedLink] = {}
  teacher: ModelOptions = config.teacher
  for name in config.chain:
    link, folder = config.links[name], workdir / name
    cut = _is_cut(name, link)
    planned[name] = PlannedLink(folder, _link_config(config, link, teacher, folder), cut)
    # Computed as the first teacher is; its shape and layers are in its run.
    teacher = dataclasses.replace(
      config.teacher,
      source=planned[name].source,
      shape="",
      digest="",
      keep_layers=(),
      changes={},
      new=(),
    )
  return planned


def _check_names(config: Config) -> None:
  reserved = (*RESERVED, *config.evaluate.models)
  for i, name in enumerate(config.chain):
    if name not in config.links:
      raise InputError(f"chain names {name!r}, and links holds {', '.join(config.links) or 'none'}")
    if name in config.chain[:i]:
      raise InputError(f"chain names {name!r}, which is there twice; name each link once")
    if name in reserved:
      raise InputError(
        f"chain names {name!r}, which has another meaning; choose another name than "
        f"{', '.join(reserved)}"
      )
    if not NAME.fullmatch(name):
      raise InputError(
        f"chain names {name!r}, which cannot be a folder's name; use letters, digits, '_', '.' and "
        "'-', and begin with a letter or a digit"
      )


def _link_config(config: Config, link: LinkOptions, teacher: ModelOptions, folder: Path) -> Config:
  """The config of the link's run, which its folder will hold."""
  student = link.student
  if not (student.source or student.shape):
    student = dataclasses.replace(student, source=str(folder / "model"))
  return dataclasses.replace(
    config,
    teacher=teacher,
    student=student,
    shrink=dataclasses.replace(link.shrink, dtype=student.param_dtype),
    chain=(),
    links={},
    train=dataclasses.replace(
      config.train, records=(str(folder / "records"),), steps=link.steps or config.train.steps
    ),
    optim=dataclasses.replace(config.optim, peak_lr=link.peak_lr or config.optim.peak_lr),
    export=dataclasses.replace(config.export, dir=""),
  )


def _is_cut(name: str, link: LinkOptions) -> bool:
  """Whether a link is cut from the model before it; refuses one with two origins, or none."""
  sizes = [k for k in ("layers", *shapes.SIZES, "factorise") if getattr(link.shrink, k)]
  own = link.student.source or link.student.shape
  if bool(sizes) == bool(own) or any(getattr(link.shrink, k) for k in search.TARGETS):
    raise InputError(
      f"links.{name} has student.source or student.shape {own!r} and shrink sizes "
      f"({', '.join(sizes) or 'none'}); a link has one of the two, and no target of shrink"
    )
  if sizes and link.student.keep_layers:
    raise InputError(
      f"links.{name}.student.keep_layers is {link.student.keep_layers} and the student is made by "
      f"shrink; set links.{name}.shrink.layers alone"
    )
  if link.shrink.dtype != ShrinkOptions().dtype:
    raise InputError(
      f"links.{name}.shrink.dtype is {link.shrink.dtype!r}; expected its default, since a link's "
      f"model is written in links.{name}.student.param_dtype. Leave it out"
    )
  if link.steps < 0 or link.peak_lr < 0:
    raise InputError(
      f"links.{name} has steps {link.steps} and peak_lr {link.peak_lr}; each is above 0, or 0 for "
      "train.steps and optim.peak_lr"
    )
  return bool(sizes)


def _evaluation_config(config: Config, planned: dict[str, PlannedLink]) -> Config:
  """The config that evaluates all links; "start" is the last one before training."""
  models = {name: link.source for name, link in planned.items()} | config.evaluate.models
  return dataclasses.replace(
    config,
    student=planned[config.chain[-1]].config.student,
    evaluate=dataclasses.replace(config.evaluate, models=models),
  )


def _check(
  config: Config, measuring: Config, planned: dict[str, PlannedLink], workdir: Path
) -> None:
  """Refuses what would stop the chain later on."""
  if config.train.records or config.train.online:
    raise InputError(
      f"train.records is {config.train.records} and train.online {config.train.online}; a chain "
      "records each of its teachers by itself: leave both out"
    )
  if config.records.kind == "text" or config.records.logprobs:
    raise InputError(
      f"records.kind is {config.records.kind!r} and records.logprobs {config.records.logprobs!r}; "
      "a chain records its own models: take 'sampled' or 'topk'"
    )
  if config.tasks:
    raise InputError(
      f"tasks names {', '.join(config.tasks)}, and a chain teaches the text of `data`; leave tasks "
      "out, or run record and train for one link after another"
    )
  mesh = sharding.make_mesh(**vars(config.mesh))
  sharding.check_batch("records.batch_size", config.records.batch_size, mesh)
  accumulate = config.optim.accumulate
  sharding.check_batch("train.batch_size", config.train.batch_size, mesh, accumulate)
  sharding.check_batch("evaluate.batch_size", config.evaluate.batch_size, mesh)
  evaluation.check(measuring)
  is_local = bool(config.export.dir) and not storage.is_remote(config.export.dir)
  if is_local and not (workdir / EXPORTED).exists():
    check_new(config.export.dir)
  _check_models(config, planned)


def _check_models(config: Config, planned: dict[str, PlannedLink]) -> None:
  """Refuses students that cannot be made or trained, or that read other tokens than the teacher."""
  origin = loading.open_source(config.teacher, config.seed)  # of the weights of a link that is cut
  shape = origin.decoder_config
  tokenizer = corpus.tokenizer_of(config.data, origin.pretrained)
  corpus.check(config.data, tokenizer, shape.vocab_size, shape.max_position_embeddings)
  for name, link in planned.items():
    try:
      if link.is_cut:
        shape = _cut_shape(link.config.shrink, origin.family, shape)
        options = _as_origin(link.config.student, origin.options)
        student = dataclasses.replace(origin, options=options)
      else:
        student = origin = loading.open_source(link.config.student, config.seed)
        shape = origin.decoder_config
      corpus.check(config.data, tokenizer, shape.vocab_size, shape.max_position_embeddings)
      _check_tokenizer(config, origin, tokenizer.digest, teaches=name != config.chain[-1])
      train = dataclasses.replace(link.config.train, records=())
      validate.check_run(dataclasses.replace(link.config, train=train), [], student)
      optim.learning_rate(link.config.optim, train.steps)  # does warm-up end?
    except InputError as e:
      raise InputError(f"links.{name}: {e}") from e


def _as_origin(student: StudentOptions, origin: ModelOptions) -> StudentOptions:
  """A student that is not cut yet, as the model that it will be cut from."""
  return dataclasses.replace(
    student,
    source=origin.source,
    family=origin.family,
    shape=origin.shape,
    keep_layers=origin.keep_layers,
    changes=origin.changes,
    new=origin.new,
  )


def _cut_shape(options: ShrinkOptions, family: str, teacher: DecoderConfig) -> DecoderConfig:
  """The Config of what shrink makes; which layers it keeps does not matter here."""
  narrowed = shapes.narrowed(options, family, teacher)
  factorise.targets(shapes.abstract(family, narrowed), options.factorise)
  if not options.layers:
    return narrowed
  return narrowed.keep_layers(choose.even(options.layers, teacher.num_hidden_layers))


def _check_tokenizer(config: Config, student: ModelSource, digest: str, teaches: bool) -> None:
  """Refuses another tokenizer than the teacher's; one that does not teach may have none."""
  if student.tokenizer is None and not teaches:
    return
  tokenizer = corpus.tokenizer_of(config.data, student.pretrained)
  if tokenizer.digest != digest:
    raise InputError(
      f"the student has tokenizer {tokenizer.digest[:12]} and the teacher {digest[:12]}; take one "
      "with the teacher's tokenizer"
    )


def _run(link: PlannedLink) -> JsonObject:
  """Runs one link from where it stands; returns the last step's metrics."""
  record.run(link.config, link.folder / "records")
  if link.is_cut and not (link.folder / MADE).exists():
    model = link.folder / "model"
    # Without MADE, the making of what is there was interrupted.
    distributed.run_on_process_0(functools.partial(shutil.rmtree, model, ignore_errors=True))
    summary = MeasuredTeacher(link.config).make(link.config.shrink, model, random=False)
    json_io.write_json_once(link.folder / MADE, summary)
  with Workdir(link.folder / "run", link.config) as workdir:
    return loop.train(link.config, workdir)
