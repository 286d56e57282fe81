"""Trains several students in a row, each distilled from the model before it.

If a student is much smaller than its teacher, an assistant of intermediate size can be a better
teacher (arXiv:1902.03393). For comparison, the same config with a chain of one link trains the
student without an assistant.

Reads: the teacher (`teacher`), the students in `links`, and the corpus in `data`.

Writes: in the workdir: a folder for each link, with its records, its run and, if it is made by
pruning, its model; evaluation.json, with all links and the teacher; and export.dir, if it is set,
with the last link. Finished parts are skipped when the command is run again.

Config: seed, mesh, teacher, data, chain, links, records, losses, optim, train, evaluate, evals,
export.

Example:
  distill-jax chain --config=configs/assistants.py --workdir=runs/assistants
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from distill_jax.commands import evaluate as evaluation
from distill_jax.commands import export, record, train
from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.errors import InputError, bad_value
from distill_jax.evals import in_training
from distill_jax.hub.export_folder import check_new
from distill_jax.models import DecoderConfig, loading, runs
from distill_jax.models.loading import ModelSource
from distill_jax.models.options import ModelOptions, StudentOptions
from distill_jax.nn import sharding
from distill_jax.pruning import choose, factorise, search, shapes
from distill_jax.pruning.measured_teacher import MeasuredTeacher
from distill_jax.pruning.options import LinkOptions, ShrinkOptions
from distill_jax.records import planned_stores
from distill_jax.report.benchmarks import text  # noqa: F401
from distill_jax.runtime import distributed, files, json_io, storage
from distill_jax.runtime.workdir import Workdir
from distill_jax.training import optim, validate, validate_heldout
from distill_jax.types import JsonObject

MADE, DONE, SCORES, EXPORTED = "made.json", "done.json", "evaluation.json", "exported.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
RESERVED = ("teacher", "start", evaluation.RESULTS)  # names of models and of a folder


@dataclasses.dataclass(frozen=True)
class PlannedLink:
  """A link and its folder, which contains `records`, `run` and, if the link is cut, `model`."""

  folder: Path
  config: Config  # for `record` and `train`
  is_cut: bool  # whether its model is made from its teacher by pruning

  @property
  def source(self) -> str:
    """The model source of the trained link."""
    return runs.RUN + storage.location(self.folder / "run")


def run(config: Config, workdir: Path) -> JsonObject:
  """Records, trains and evaluates the links in config.chain, each in a folder of `workdir`.

  The teacher of the first link is config.teacher; the teacher of each other link is the link before
  it. The teacher is recorded over the corpus with config.records, and the link is trained on these
  records with config.losses. Then all links and the teacher are evaluated, and the last link is
  exported if export.dir is set. Finished parts are skipped.

  Returns:
    The content of evaluation.json in `workdir`. Delete that file to evaluate again.

  Raises:
    InputError: A link is missing or cannot be made. It is raised before anything is read or
      compiled.
    Preempted: SIGTERM was received; finished links are kept.
  """
  if not config.chain:
    raise bad_value(
      "chain",
      (),
      "the names of the links",
      'Set it, e.g. c.chain = ("assistant", "student"), and define each link, e.g. '
      "c.links.student = config.link(student=…, steps=…)",
    )
  planned = plan(config, workdir)
  measuring = _evaluation_config(config, planned)
  _check(config, measuring, planned, workdir)
  for link in planned.values():
    if not (link.folder / DONE).exists():
      json_io.write_json_once(link.folder / DONE, _run(link))
      distributed.Preemption.check_late("chain", "finished links are kept")
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
  """Returns the links by name, in order, each with the config for its `record` and `train`."""
  _check_names(config)
  planned: dict[str, PlannedLink] = {}
  teacher: ModelOptions = config.teacher
  for name in config.chain:
    link, folder = config.links[name], workdir / name
    cut = _is_cut(name, link)
    planned[name] = PlannedLink(folder, _link_config(config, link, teacher, folder), cut)
    # It has the compute settings of the first teacher; its run has its shape and layers.
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
    key = f"chain[{i}]"
    if name not in config.links:
      names = f"a name in links ({', '.join(config.links) or 'empty'})"
      raise bad_value(key, name, names, f"Add the link as c.links.{name} = config.link(…)")
    if name in config.chain[:i]:
      raise bad_value(key, name, "a name that occurs only once in chain", "Remove one of them")
    if name in reserved:
      other = f"a name other than {', '.join(reserved)}, which are reserved"
      raise bad_value(key, name, other, "Rename the link")
    if not NAME.fullmatch(name):
      raise bad_value(
        key,
        name,
        "letters, digits, '_', '.' and '-', with a letter or digit first, since it names a folder",
        "Rename the link",
      )


def _link_config(config: Config, link: LinkOptions, teacher: ModelOptions, folder: Path) -> Config:
  """Returns the config of a link's run, whose folder is `folder`."""
  student = link.student
  if not (student.source or student.shape):
    student = dataclasses.replace(student, source=storage.location(folder / "model"))
  heldout = folder / "records" / planned_stores.HELDOUT
  return dataclasses.replace(
    config,
    teacher=teacher,
    student=student,
    shrink=dataclasses.replace(link.shrink, dtype=student.param_dtype),
    chain=(),
    links={},
    train=dataclasses.replace(
      config.train,
      records=(storage.location(folder / "records"),),
      heldout=(storage.location(heldout),) if config.records.heldout_sequences else (),
      steps=link.steps or config.train.steps,
    ),
    optim=dataclasses.replace(config.optim, peak_lr=link.peak_lr or config.optim.peak_lr),
    export=dataclasses.replace(config.export, dir=""),
  )


def _is_cut(name: str, link: LinkOptions) -> bool:
  """Returns whether a link is cut from the model before it.

  Raises:
    InputError: The link has two origins or none, or one of its keys has a bad value.
  """
  sizes = [k for k in ("layers", *shapes.SIZES, "factorise") if getattr(link.shrink, k)]
  origins = [k for k in ("source", "shape") if getattr(link.student, k)]
  key = f"links.{name}"
  for target in search.TARGETS:
    if value := getattr(link.shrink, target):
      action = f"Set sizes, e.g. {key}.shrink.layers"
      raise bad_value(f"{key}.shrink.{target}", value, "0, because a chain does not search", action)
  if not origins and not sizes:
    raise bad_value(
      f"{key}.student.source",
      link.student.source,
      f"a model, or sizes in {key}.shrink, e.g. {key}.shrink.layers",
      "Set one of the two",
    )
  if origins and sizes:
    raise bad_value(
      f"{key}.student.{origins[0]}",
      getattr(link.student, origins[0]),
      f"an empty string, because {key}.shrink.{sizes[0]} makes the student from its teacher",
      "Set only one of the two",
    )
  if sizes and link.student.keep_layers:
    raise bad_value(
      f"{key}.student.keep_layers",
      link.student.keep_layers,
      f"(), because {key}.shrink.{sizes[0]} makes the student from its teacher",
      f"Set {key}.shrink.layers instead",
    )
  if link.shrink.dtype != ShrinkOptions().dtype:
    raise bad_value(
      f"{key}.shrink.dtype",
      link.shrink.dtype,
      f"its default, because the model has the dtype of {key}.student.param_dtype",
      "Remove the key",
    )
  for number in ("steps", "peak_lr"):
    if (value := getattr(link, number)) < 0:
      default = "train.steps" if number == "steps" else "optim.peak_lr"
      expected = f"a positive number, or 0 for the value of {default}"
      raise bad_value(f"{key}.{number}", value, expected, "Correct it")
  return bool(sizes)


def _evaluation_config(config: Config, planned: dict[str, PlannedLink]) -> Config:
  """Returns the config that evaluates all links; "start" is the last link before training."""
  models = {name: link.source for name, link in planned.items()} | config.evaluate.models
  return dataclasses.replace(
    config,
    student=planned[config.chain[-1]].config.student,
    evaluate=dataclasses.replace(config.evaluate, models=models),
  )


def _check(
  config: Config, measuring: Config, planned: dict[str, PlannedLink], workdir: Path
) -> None:
  """Raises InputError for everything that would stop the chain later."""
  itself = "because a chain records its teachers itself"
  if config.train.records:
    raise bad_value("train.records", config.train.records, f"(), {itself}", "Remove the key")
  if config.train.heldout:
    action = "Set records.heldout_sequences instead"
    raise bad_value("train.heldout", config.train.heldout, f"(), {itself}", action)
  if config.train.online:
    raise bad_value("train.online", True, f"False, {itself}", "Remove the key")
  if config.records.logprobs:
    raise bad_value("records.logprobs", config.records.logprobs, f"'', {itself}", "Remove the key")
  if config.records.served:
    raise bad_value("records.served", True, f"False, {itself}", "Remove the key")
  if config.records.kind == "text":
    kinds = "'sampled' or 'topk', because the links are trained on their teachers' outputs"
    raise bad_value("records.kind", config.records.kind, kinds, "Choose one of them")
  if config.tasks:
    raise bad_value(
      "tasks",
      ", ".join(config.tasks),
      "an empty section, because a chain trains on the text in `data`",
      "Remove the tasks, or run record and train for each link",
    )
  planned_stores.check_one(config.data)
  mesh = config.mesh.make()
  sharding.check_batch("records.batch_size", config.records.batch_size, mesh)
  accumulate = config.optim.accumulate
  sharding.check_batch("train.batch_size", config.train.batch_size, mesh, accumulate)
  sharding.check_batch("evaluate.batch_size", config.evaluate.batch_size, mesh)
  evaluation.check(measuring)
  if config.export.dir and not (workdir / EXPORTED).exists():
    check_new(config.export.dir)
  _check_models(config, planned)


def _check_models(config: Config, planned: dict[str, PlannedLink]) -> None:
  """Raises InputError for a link that cannot be made or trained, or that has another tokenizer."""
  origin = loading.open_source(config.teacher, config.seed)  # the source of a cut link's weights
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
      validate_heldout.check_options(link.config, bool(train.heldout))
      if train.eval_benchmarks:
        in_training.check(link.config, student)
      optim.learning_rate(link.config.optim, train.steps)  # raises if warm-up does not end
    except InputError as e:
      raise InputError(f"links.{name}: {e}") from e


def _as_origin(student: StudentOptions, origin: ModelOptions) -> StudentOptions:
  """Returns the options of a student to be cut, with the source and shape of its origin."""
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
  """Returns the architecture config that shrink makes, whichever layers it keeps."""
  narrowed = shapes.narrowed(options, family, teacher)
  factorise.targets(shapes.abstract(family, narrowed), options.factorise)
  if not options.layers:
    return narrowed
  return narrowed.keep_layers(choose.even(options.layers, teacher.num_hidden_layers))


def _check_tokenizer(config: Config, student: ModelSource, digest: str, teaches: bool) -> None:
  """Raises InputError if the student's tokenizer is not the teacher's.

  A student that is not a teacher itself can lack a tokenizer.
  """
  if student.tokenizer is None and not teaches:
    return
  tokenizer = corpus.tokenizer_of(config.data, student.pretrained)
  if tokenizer.digest != digest:
    raise InputError(
      f"The student has tokenizer {tokenizer.digest[:12]}, but the teacher has {digest[:12]}. "
      "Choose a student with the teacher's tokenizer."
    )


def _run(link: PlannedLink) -> JsonObject:
  """Runs the unfinished parts of a link; returns the metrics of its last training step."""
  record.run(link.config, link.folder / "records")
  distributed.Preemption.check_late("chain", "finished records are kept")
  if link.is_cut and not (link.folder / MADE).exists():
    model = storage.location(link.folder / "model")
    # A folder without MADE was left by an interrupted command.
    distributed.run_on_process_0(lambda: files.remove_tree(model))
    summary = MeasuredTeacher(link.config).make(link.config.shrink, model, random=False)
    json_io.write_json_once(link.folder / MADE, summary)
  with Workdir(link.folder / "run", link.config) as workdir:
    return train.run(link.config, workdir)
