"""The config of `distill-jax distill`: every choice, with the sentences that explain them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from distill_jax import config as configs
from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.data.options import DataOptions
from distill_jax.models.runs import RUN
from distill_jax.recipe import data_source, model_source, sizes, tokens
from distill_jax.recipe.machine import Machine
from distill_jax.recipe.model_source import Models
from distill_jax.records import planned_stores
from distill_jax.report import numbers

DATA_COMMENTS = {
  "heldout_fraction": "about 100 documents, at most a tenth",
  "on_bad": "chats longer than data.seq_len are skipped",
}
MAX_EVALUATED = {"cpu": 16, "accelerator": 256}  # held-out sequences


@dataclasses.dataclass(frozen=True)
class Request:
  """The flags of the command.

  Attributes:
    teacher: The source of the teacher.
    student: The source of the student, or a fraction such as "half".
    data: A file or a folder.
    workdir: The folder of the run, a path or a URL.
    overridden: Dotted config keys that the user has set; the recipe keeps them.
  """

  teacher: str
  student: str
  data: str
  workdir: str
  overridden: frozenset[str] = frozenset()

  @property
  def is_cut(self) -> bool:
    """True if the student is cut from the teacher."""
    return self.student in model_source.FRACTIONS

  def full(self) -> Request:
    """Returns the request with whole sources and paths.

    Raises:
      InputError: A model or the data does not exist.
    """
    teacher = model_source.full_source("--teacher", self.teacher)
    student = self.student
    if self.is_cut:
      model_source.check_not_a_run(teacher)
    else:
      student = model_source.full_source("--student", self.student)
    data = data_source.full_path(self.data)
    data = self.data if self.data == "pydoc" and not Path(data).exists() else data
    workdir = self.workdir if "://" in self.workdir else str(Path(self.workdir).absolute())
    return dataclasses.replace(self, teacher=teacher, student=student, data=data, workdir=workdir)


class Plan:
  """A config that is filled in key by key, except for the keys that the user has set.

  Attributes:
    config: The config so far.
    sentences: What was found and chosen, for the user.
    comments: Reasons by dotted key, for the config file.
  """

  def __init__(self, config: Config, overridden: frozenset[str] = frozenset()):
    self.config = config
    self.sentences: list[str] = []
    self.comments: dict[str, str] = {}
    self._overridden = overridden

  def set(self, key: str, value: Any, comment: str = "") -> Any:
    """Sets a key, if the user has not; returns the value that it has then."""
    if key in self._overridden:
      return _get(self.config, key)
    self.config = _replaced(self.config, key.split("."), value)
    if comment:
      self.comments[key] = comment
    return value


def _get(config: Any, key: str) -> Any:
  for name in key.split("."):
    config = getattr(config, name)
  return config


def _replaced(node: Any, path: list[str], value: Any) -> Any:
  name, *rest = path
  return dataclasses.replace(
    node, **{name: _replaced(getattr(node, name), rest, value) if rest else value}
  )


def start() -> Config:
  """Returns the config that the recipe begins with: the losses."""
  c = configs.base()
  c.losses.soft = configs.loss("kd", weight=0.9)
  c.losses.hard = configs.loss("ce", weight=0.1)
  return configs.resolve(c)


def plan(request: Request, config: Config, folder: Path, machine: Machine) -> Plan:
  """Chooses every key of the config.

  Args:
    request: A request with full sources.
    config: `start()` with the keys that the user has set.
    folder: Where prepared data is written.
    machine: The devices.

  Raises:
    InputError: The models or the data cannot be used, or do not fit together.
  """
  planned_stores.check_one(config.data)
  result = Plan(config, request.overridden)
  models = _plan_models(result, request, machine)
  found = data_source.find(request.data)
  data = data_source.prepare(found, folder)
  for field in ("kind", "path", "field", "heldout_fraction", "on_bad"):
    result.set(f"data.{field}", getattr(data, field), DATA_COMMENTS.get(field, ""))
  tokens.check_chat_template(request.data, result.config.data, models)
  _plan_sizes(result, request, found.sentence, models, machine)
  _plan_folders(result, request)
  return result


def _plan_models(result: Plan, request: Request, machine: Machine) -> Models:
  result.set("teacher.source", request.teacher)
  result.set("student.source", request.teacher if request.is_cut else request.student)
  if not machine.is_cpu:
    for key in ("teacher.dtype", "student.dtype", "teacher.param_dtype"):
      result.set(key, "bfloat16")
  seed = result.config.seed
  teacher = model_source.open_decoder("--teacher", result.config.teacher, seed)
  origin = request.student
  if request.is_cut:
    layers = teacher.decoder_config.num_hidden_layers
    kept = model_source.kept_layers(model_source.FRACTIONS[request.student], layers)
    result.set("student.keep_layers", kept, f"of the teacher's {layers} layers")
    origin = "layers of the teacher"
  student = model_source.open_decoder("--student", result.config.student, seed)
  result.sentences.append(f"Teacher: {request.teacher}, {model_source.describe(teacher)}.")
  result.sentences.append(f"Student: {origin}, {model_source.describe(student)}.")
  return Models(teacher, student, request.is_cut)


def _plan_sizes(
  result: Plan, request: Request, found: str, models: Models, machine: Machine
) -> None:
  """Chooses everything that depends on the amount of data and on the machine."""
  data: DataOptions = result.config.data
  tokenizer, file = tokens.shared_tokenizer(data, models)
  result.set("data.tokenizer", file, "the same in both models")
  count = tokens.count(result.config.data, tokenizer, models.teacher)
  length = sizes.seq_len(count, models, machine)
  length = result.set("data.seq_len", length, "from the amount of data and the machine")
  corpus.check(
    result.config.data,
    tokenizer,
    min(m.decoder_config.vocab_size for m in (models.teacher, models.student)),
    models.max_positions,
  )
  passes = sizes.epochs(count.tokens)
  sequences = count.sequences(length)
  most = sizes.max_sequences(length, passes, models, machine)
  limit = most if 0 < most < sequences else 0
  limit = result.set("data.sequences", limit, "about a quarter of an hour; 0: all")
  used = min(limit or sequences, sequences)
  about = "about " if count.scale > 1 else ""
  held = f"{result.config.data.heldout_fraction:.1%}".replace(".0%", "%")
  result.sentences.append(
    f"Data: {found} About {held} of it is held out for evaluation. The rest has {about}"
    f"{count.tokens:,} tokens, or {sequences:,} sequences of {length}."
  )
  if used < sequences and "data.sequences" in request.overridden:
    result.sentences.append(f"The first {used:,} of the sequences are used.")
  elif used < sequences:
    result.sentences.append(
      f"There is no accelerator here, so only {used:,} of the sequences are used, which takes "
      "about a quarter of an hour; --config.data.sequences=0 uses all of them."
    )
  _plan_training(result, models, machine, used, passes)
  result.sentences.append(f"Machine: {machine.describe()}.")
  _describe_training(result, used)


def _plan_training(
  result: Plan, models: Models, machine: Machine, sequences: int, passes: int
) -> None:
  length = result.config.data.seq_len
  batch = sizes.batch_sizes(sequences * passes, length, models, machine)
  size = result.set("train.batch_size", batch.batch, "grows with the amount of data")
  result.set("optim.accumulate", batch.accumulate, "microbatches that fit into the memory")
  result.set("student.remat", batch.remat, "activations do not fit into the memory")
  steps = max(1, -(-sequences * passes // size))
  steps = result.set("train.steps", steps, f"{passes} epochs of {sequences:,} sequences")
  rows = max(1, size // (machine.devices * result.config.optim.accumulate))
  result.set("train.chunk", sizes.chunk(length, rows, models, machine), "bounds the logits")
  origin = "cut from its teacher" if models.is_cut else "with its own weights"
  result.set("optim.peak_lr", sizes.peak_lr(models), f"for a student {origin}")
  result.set("optim.warmup_steps", steps // 20, "5% of the steps")
  forward = sizes.forward_batch(length, sequences, models, machine)
  chunk = sizes.chunk(length, max(1, forward // machine.devices), models, machine)
  for section in ("records", "evaluate"):
    result.set(f"{section}.batch_size", forward, "fits into the memory")
    result.set(f"{section}.chunk", chunk)
  shard = min(1024, max(8, -(-sequences // 16)), -(-sequences // machine.processes))
  tokens = max(1, shard) * length
  result.set("records.tokens_per_shard", tokens, "finished shards survive a stop")
  most = MAX_EVALUATED["cpu" if machine.is_cpu else "accelerator"]
  result.set("evaluate.sequences", most, "held-out sequences, at most")
  if result.config.data.heldout_fraction:
    heldout = sizes.heldout_sequences(sequences, most)
    result.set("records.heldout_sequences", heldout, "evaluated in training; 2% of the sequences")


def _plan_folders(result: Plan, request: Request) -> None:
  workdir = request.workdir.rstrip("/")
  result.set("train.records", (f"{workdir}/records",))
  if result.config.records.heldout_sequences:
    result.set("train.heldout", (f"{workdir}/records/{planned_stores.HELDOUT}",))
  result.set("evaluate.models", {"distilled": f"{RUN}{workdir}/train"})
  result.set("export.dir", f"{workdir}/export")
  result.set("export.evaluation", f"{workdir}/evaluation.json")


def _describe_training(result: Plan, sequences: int) -> None:
  c = result.config
  size, steps = c.train.batch_size, c.train.steps
  seen = steps * size / max(1, sequences)
  micro = f", in {c.optim.accumulate} microbatches" if c.optim.accumulate > 1 else ""
  plural = "sequence" if size == 1 else "sequences"
  total = numbers.size(sequences * c.data.seq_len)
  result.sentences.append(
    f"Training for {steps:,} steps of {size} {plural}{micro}: {seen:.3g} epochs of {total} tokens, "
    f"with peak learning rate {c.optim.peak_lr:g}."
  )
