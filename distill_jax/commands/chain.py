"""`chain`: students in a row, each taught by the one before it (arXiv:1902.03393).

Where a student is far smaller than its teacher, an assistant of a size between them may teach it
better. Whether it does is to be measured: the same config with a chain of one link is the
student without one.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

from distill_jax.commands import _shrink_search, export, record
from distill_jax.commands import evaluate as evaluation
from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.errors import InputError
from distill_jax.hub.export import check_new
from distill_jax.models import loading
from distill_jax.models.options import ModelOptions, StudentOptions
from distill_jax.nn import sharding
from distill_jax.pruning import choose, factorise, shapes
from distill_jax.pruning.options import LinkOptions
from distill_jax.pruning.students import Teacher
from distill_jax.report.benchmarks import text  # noqa: F401
from distill_jax.runtime import distributed, json_io, storage
from distill_jax.runtime.workdir import Workdir
from distill_jax.training import loop, optim, validate

MADE, DONE, SCORES, EXPORTED = "made.json", "done.json", "evaluation.json", "exported.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
TAKEN = ("teacher", "start", evaluation.ANSWERS)  # names of models, and of a folder beside


@dataclasses.dataclass(frozen=True)
class PlannedLink:
  """A link as it is run, in `folder`: `records`, `model` where it is cut, and `run`."""

  folder: Path
  config: Config  # of its teacher's records and its own training
  cut: bool  # whether it is made of its teacher

  @property
  def source(self) -> str:
    return loading.RUN + str(self.folder / "run")


def run(config: Config, workdir: Path) -> dict[str, Any]:
  """Records, trains and measures the links of config.chain, each in a folder of `workdir`.

  The teacher of the first is config.teacher, that of each other one the link before it; what it
  says of the corpus is recorded as config.records has it, and the link learns from it by the
  losses of config. In the end all are measured beside the teacher as `evaluate` does, and the
  last is exported where export.dir is set. What is finished is not done again.

  Returns: what evaluation.json in `workdir` holds; delete that file to measure anew.

  Raises:
    InputError: links that are not there or cannot be had, before anything is read or compiled.
    Preempted: SIGTERM came; what was finished is kept.
  """
  if not config.chain:
    raise InputError(
      'chain is empty; name its links, as c.chain = ("assistant", "student"), and add each as '
      "c.links.student = config.link(student=…, steps=…)"
    )
  planned = plan(config, workdir)
  final = _final(config, planned)
  _check(config, final, planned, workdir)
  for link in planned.values():
    if not (link.folder / DONE).exists():
      _write(link.folder / DONE, _run(link))
  if (workdir / SCORES).exists():
    result = json.loads((workdir / SCORES).read_text())
  else:
    result = evaluation.run(final, workdir)
  if config.export.dir and not (workdir / EXPORTED).exists():
    last = planned[config.chain[-1]]
    out = dataclasses.replace(config.export, evaluation=str(workdir / SCORES))
    exported = export.run(dataclasses.replace(last.config, export=out), last.folder / "run")
    _write(workdir / EXPORTED, exported)
  return result


def plan(config: Config, workdir: Path) -> dict[str, PlannedLink]:
  """The links in their order, by name; each config is that of a `record` and a `train`."""
  planned: dict[str, PlannedLink] = {}
  before: ModelOptions = config.teacher
  for name in config.chain:
    if name not in config.links:
      raise InputError(f"chain names {name!r}, and links holds {', '.join(config.links) or 'none'}")
    if name in planned or name in (*TAKEN, *config.evaluate.models) or not NAME.fullmatch(name):
      raise InputError(
        f"chain names {name!r}, which is there twice, has another meaning or makes no folder; "
        "choose another name"
      )
    link, folder = config.links[name], workdir / name
    cut, student = _is_cut(name, link), link.student
    if cut:
      student = dataclasses.replace(student, source=str(folder / "model"))
    run = dataclasses.replace(
      config,
      teacher=before,
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
    planned[name] = PlannedLink(folder, run, cut)
    # Computed as the teacher is; its shape and layers are in its run.
    before = dataclasses.replace(
      config.teacher,
      source=planned[name].source,
      shape="",
      digest="",
      keep_layers=(),
      changes={},
      new=(),
    )
  return planned


def _is_cut(name: str, link: LinkOptions) -> bool:
  """Whether a link is made of the model before it; refuses one that is made twice, or not."""
  sizes = [k for k in ("layers", *shapes.SIZES, "factorise") if getattr(link.shrink, k)]
  own = link.student.source or link.student.shape
  if bool(sizes) == bool(own) or any(getattr(link.shrink, k) for k in _shrink_search.TARGETS):
    raise InputError(
      f"links.{name} has student.source or student.shape {own!r} and shrink sizes "
      f"({', '.join(sizes) or 'none'}); a link has one of the two, and no target of shrink"
    )
  if sizes and link.student.keep_layers:
    raise InputError(
      f"links.{name}.student.keep_layers is {link.student.keep_layers} and the student is made by "
      f"shrink; set links.{name}.shrink.layers alone"
    )
  if link.steps < 0 or link.peak_lr < 0:
    raise InputError(
      f"links.{name} has steps {link.steps} and peak_lr {link.peak_lr}; each is above 0, or 0 for "
      "that of all"
    )
  return bool(sizes)


def _final(config: Config, planned: dict[str, PlannedLink]) -> Config:
  """What measures all links; "start" is the last one before training."""
  models = {name: link.source for name, link in planned.items()} | config.evaluate.models
  return dataclasses.replace(
    config,
    student=planned[config.chain[-1]].config.student,
    evaluate=dataclasses.replace(config.evaluate, models=models),
  )


def _check(config: Config, final: Config, planned: dict[str, PlannedLink], workdir: Path) -> None:
  """Refuses what would stop the chain later on."""
  if config.train.records or config.train.online:
    raise InputError(
      f"train.records is {config.train.records} and train.online {config.train.online}; a chain "
      "records each of its teachers by itself: leave both out"
    )
  if config.records.kind == "text" or config.records.logprobs:
    raise InputError(
      f"records.kind is {config.records.kind!r} and records.logprobs {config.records.logprobs!r}; "
      "a chain records what its own models say: take 'sampled' or 'topk'"
    )
  if config.tasks:
    raise InputError(
      f"tasks names {', '.join(config.tasks)}, and a chain teaches the text of `data`; leave tasks "
      "out, or run record and train link by link"
    )
  mesh = sharding.make_mesh(**vars(config.mesh))
  for verb in ("records", "train", "evaluate"):
    micro = config.optim.accumulate if verb == "train" else 1
    sharding.check_batch(f"{verb}.batch_size", getattr(config, verb).batch_size, mesh, micro)
  evaluation.check(final)
  here = bool(config.export.dir) and not storage.is_remote(config.export.dir)
  if here and not (workdir / EXPORTED).exists():
    check_new(config.export.dir)
  _check_models(config, planned)


def _check_models(config: Config, planned: dict[str, PlannedLink]) -> None:
  """Refuses students that cannot be had or trained, or that read other tokens than the teacher."""
  spec, (family, shape) = config.teacher, loading.family_and_config(config.teacher)
  read = corpus.tokenizer_of(config.data, loading.pretrained(spec))
  corpus.check(config.data, read, shape.vocab_size, shape.max_position_embeddings)
  for name, link in planned.items():
    student = link.config.student
    try:
      if link.cut:
        shape = _cut(link.config.shrink, family, shape)
        student = dataclasses.replace(  # what it is made of stands for it
          student,
          source=spec.source,
          family=spec.family,
          shape=spec.shape,
          keep_layers=spec.keep_layers,
          changes=spec.changes,
          new=spec.new,
        )
      else:
        family, shape = loading.family_and_config(student)
      corpus.check(config.data, read, shape.vocab_size, shape.max_position_embeddings)
      _check_tokenizer(config, student, read.digest, teaches=name != config.chain[-1])
      untaught = dataclasses.replace(link.config.train, records=())
      validate.check_run(dataclasses.replace(link.config, student=student, train=untaught), [])
      optim.learning_rate(link.config.optim, untaught.steps)  # does warm-up end?
    except InputError as e:
      raise InputError(f"links.{name}: {e}") from e
    spec = student


def _cut(s: Any, family: str, shape: Any) -> Any:
  """The shape of what shrink makes; which layers it keeps does not matter here."""
  wide = shapes.narrowed(s, family, shape)
  factorise.targets(shapes.abstract(family, wide), s.factorise)
  return wide.keep_layers(choose.even(s.layers, shape.num_hidden_layers)) if s.layers else wide


def _check_tokenizer(config: Config, student: StudentOptions, digest: str, teaches: bool) -> None:
  """A student has the tokenizer of all; one without any may learn, but not teach."""
  pretrained = loading.pretrained(student)
  if (pretrained is None or pretrained.tokenizer is None) and not teaches:
    return
  theirs = corpus.tokenizer_of(config.data, pretrained)
  if theirs.digest != digest:
    raise InputError(
      f"the student has tokenizer {theirs.digest[:12]} and the teacher {digest[:12]}; take one "
      "with the teacher's tokenizer"
    )


def _run(link: PlannedLink) -> dict[str, Any]:
  """One link from where it stands; the last step's metrics."""
  record.run(link.config, link.folder / "records")
  if link.cut and not (link.folder / MADE).exists():
    model = link.folder / "model"
    # What is there was cut off before it was written down.
    distributed.run_on_process_0(functools.partial(shutil.rmtree, model, ignore_errors=True))
    made = Teacher(link.config).make(link.config.shrink, model, random=False)
    _write(link.folder / MADE, made)
  with Workdir(link.folder / "run", link.config) as workdir:
    return loop.train(link.config, workdir)


def _write(path: Path, tree: Any) -> None:
  distributed.run_on_process_0(lambda: json_io.write_json(path, tree))
