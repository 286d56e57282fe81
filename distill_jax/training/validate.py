"""Checks of a training run, before anything large is read or compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jax.sharding import Mesh

from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.errors import InputError, bad_value
from distill_jax.losses import CE, BaseLoss, FeatureLoss, TokenLoss
from distill_jax.losses.features import FeatureSpec
from distill_jax.models import loading, long_context
from distill_jax.models.loading import ModelSource
from distill_jax.nn import sharding
from distill_jax.records.manifest import Manifest
from distill_jax.records.student_rows import TEACHER
from distill_jax.tasks import model_checks
from distill_jax.tasks.dataset import RecordedTask
from distill_jax.training import loader, pairing
from distill_jax.training import stores as stores_lib
from distill_jax.training.aligned_store import AlignedStore
from distill_jax.training.span_store import SpanStore
from distill_jax.training.step import Step
from distill_jax.training.stores import OneStore, Stores
from distill_jax.types import IN_BATCH_CLASSES

# Metrics of a step; a loss with one of these names would take its place.
METRICS = ("loss", "ce", "entropy", "perplexity", "tokens", "grad_norm", "learning_rate", "step")


def check_run(config: Config, stores: Stores, student: ModelSource | None = None) -> None:
  """Checks that the losses, records and student of a run fit together.

  Args:
    config: The config of the run.
    stores: The stores it trains on.
    student: The model to train; None to open config.student.

  Raises:
    InputError: They do not fit together.
  """
  student = student or loading.open_source(config.student, config.seed)
  check_losses(config)
  check_accumulation(config, stores)
  check_teachers(config)
  check_student(student)
  check_text_fits(config, student, stores)
  check_records(config, stores)
  check_rollouts(config, stores)
  loader.batch_sizes(stores_lib.lengths(config, stores), config.train.batch_size)  # raises
  check_schedules(config)


def check_mesh(config: Config, stores: Stores, models: Sequence[ModelSource], mesh: Mesh) -> None:
  """Raises InputError if a batch cannot be divided over the mesh.

  Args:
    config: The config of the run.
    stores: The stores it trains on.
    models: The student, and the teachers that run in the step.
    mesh: The mesh.
  """
  c = config.train
  sharding.check_batch("train.batch_size", c.batch_size, mesh, config.optim.accumulate)
  names = c.records or tuple(config.tasks)
  positions = {n: store.manifest.seq_len for n, store in zip(names, stores, strict=True)}
  long_context.check(mesh, positions, models, of_tasks=bool(config.tasks))


def check_losses(config: Config) -> None:
  """Raises InputError if `losses` is empty, all weights are 0, or a name is that of a metric."""
  if not config.losses:
    raise bad_value("losses", {}, "one loss or more", "Add e.g. ce or kd")
  if all(v == 0 for fn in config.losses.values() for v in fn.weight.values):
    raise InputError("The weights of all losses are 0. Set one above 0.")
  for name, fn in config.losses.items():
    if name in METRICS and not (name == "ce" and isinstance(fn, CE)):
      expected = "a name that no metric of a step has"
      raise bad_value("The name of a loss", name, expected, f"Rename losses.{name}")


def check_accumulation(config: Config, stores: Stores) -> None:
  """Raises InputError if the number of microbatches is not valid for the tasks."""
  accumulate = config.optim.accumulate
  if accumulate < 1:
    raise bad_value("optim.accumulate", accumulate, "at least 1", "Raise it")
  if accumulate > 1 and any(s.manifest.vocab_size == IN_BATCH_CLASSES for s in stores):
    raise bad_value(
      "optim.accumulate",
      accumulate,
      "1 for a contrastive task, which compares all pairs of a batch",
      "Set it to 1",
    )


def check_teachers(config: Config) -> None:
  """Raises InputError if a loss names an unknown teacher, or if two teachers have one name."""
  recorded, online = set(config.train.teachers), set(config.teachers)
  if twice := sorted(recorded & online | {"teacher"} & (recorded | online)):
    raise InputError(
      f"Two teachers have the name {twice[0]!r}; expected different names in `teachers` and "
      "train.teachers, other than 'teacher'. Rename one."
    )
  known = {"teacher"} | recorded | online
  for name, fn in config.losses.items():
    if unknown := [t for t in fn.teacher_names if t not in known]:
      raise InputError(
        f"losses.{name} needs the teacher {unknown[0]!r}; expected one of "
        f"{', '.join(sorted(known))}. Add it to train.teachers with its records, or to `teachers` "
        "with its source."
      )
    if isinstance(fn, FeatureLoss) and fn.teacher in recorded:
      raise bad_value(
        f"losses.{name}.teacher",
        fn.teacher,
        "'teacher' or one of `teachers`: features of further recorded teachers are not read",
        f"Move its source to teachers.{fn.teacher}, or name its records in train.records",
      )


def check_online(
  config: Config,
  stores: Stores,
  heldout: Stores,
  online: Mapping[str, ModelSource],
  student: ModelSource,
) -> None:
  """Raises InputError if an online teacher cannot read the data.

  Its positions, its vocabulary or its classes are too few, or the text is in tokens of another
  tokenizer. data.tokenizer is the tokenizer of all models, unless retarget.tokenizer is that of the
  student.

  Args:
    config: The config of the run.
    stores: The stores that it trains on.
    heldout: The held-out stores.
    online: The online teachers, by name.
    student: The model to train.
  """
  if config.tasks:
    for name, teacher in online.items():
      for split in filter(None, (stores, heldout)):
        opened = [store.examples for store in split if isinstance(store, RecordedTask)]
        model_checks.check_model(dict(zip(config.tasks, opened, strict=True)), teacher.config)
      model_checks.check_tokenizer(config.tasks, student, name, teacher)
    return
  texts = [store for store in (*stores, *heldout) if not isinstance(store, RecordedTask)]
  for name, teacher in online.items():
    for store in texts:
      if not (name == TEACHER and isinstance(store, AlignedStore)):
        text = f"The text {store.folder}"
        pairing.check_sizes(text, store.manifest, f"online teacher {name!r}", teacher)
  if config.data.tokenizer and not config.retarget.tokenizer:
    return
  for name, teacher in online.items():
    if name == TEACHER and config.data.tokenizer:
      own = corpus.tokenizer_of(config.data, None)
    elif teacher.tokenizer is not None:
      own = corpus.of_files(teacher.tokenizer, teacher.name)
    else:  # random weights
      continue
    for store in texts:
      is_own = store.manifest.tokenizer == own.digest
      if not is_own and not (name == TEACHER and isinstance(store, AlignedStore)):
        raise InputError(
          f"The online teacher {name!r} has the tokenizer {own.where} (digest {own.digest[:12]}), "
          f"but would read text in tokens of digest {store.manifest.tokenizer[:12]}. Pack all text "
          "with the tokenizer of config.teacher, or set data.tokenizer to that of the text if both "
          "models have it."
        )


def check_student(student: ModelSource) -> None:
  """Raises InputError if the options of `student` do not fit the model.

  These are its digest, low-rank adapters, layer sharing, quantisation and frozen parameters.
  """
  student.check_digest()
  _ = student.abstract_trainable  # checks adapters and sharing
  student.trainable.check(student.abstract)


def check_text_fits(config: Config, student: ModelSource, stores: Stores) -> None:
  """Raises InputError if recorded text does not fit the student's tokenizer or positions."""
  if config.tasks:
    return
  tokenizer, shape = pairing.student_tokenizer(config, student), student.text_config
  for path, store in zip(config.train.records, stores, strict=True):
    manifest = store.manifest
    if manifest.vocab_size > shape.vocab_size:
      raise InputError(
        f"The records {path} have a vocabulary of {manifest.vocab_size} tokens, but the student's "
        f"embedding table has {shape.vocab_size} rows. Record with the student's tokenizer."
      )
    if manifest.seq_len > shape.max_position_embeddings:
      raise InputError(
        f"The records {path} have sequences of {manifest.seq_len} tokens, but the student has "
        f"{shape.max_position_embeddings} positions. {_shorter(store)}."
      )
    if isinstance(store, AlignedStore):
      continue  # its rows are in the student's tokens
    if tokenizer is not None and tokenizer.digest != manifest.tokenizer:
      raise InputError(
        f"The records {path} were made with another tokenizer (digest {manifest.tokenizer[:12]}) "
        f"than {tokenizer.where} (digest {tokenizer.digest[:12]}). Record with the student's "
        "tokenizer, set data.tokenizer to that of the records if the student has it, or name the "
        "teacher in teacher.source to read its records in the student's tokens."
      )


def _shorter(store: OneStore) -> str:
  """Returns what makes the rows of a store shorter."""
  if isinstance(store, AlignedStore | SpanStore):
    return "Set retarget.seq_len to that number"
  if store.manifest.retargeted:
    return "Convert the records, or record, with retarget.seq_len set to that number"
  return "Record with a smaller data.seq_len"


def check_records(config: Config, stores: Stores) -> None:
  """Raises InputError if records are of another teacher, or if a loss cannot use them."""
  paths = config.train.records or tuple(config.tasks)  # tasks have their own data
  kinds = {store.manifest.kind for store in stores}
  for path, store in zip(paths, stores, strict=True):
    manifest = store.manifest
    recorded = manifest.teacher.get("digest")
    if config.teacher.digest and manifest.kind != "text" and recorded != config.teacher.digest:
      raise bad_value(
        "teacher.digest",
        config.teacher.digest,
        f"{recorded}, the digest of the teacher of {path}",
        "Name the records of the right teacher",
      )
    for name, fn in config.losses.items():
      if isinstance(store, SpanStore) and fn.teacher_names and not fn.reads_spans:
        raise InputError(
          f"losses.{name} needs targets in the student's tokens, but the records {path} are in the "
          "teacher's. Run `retarget` and train on its records, or use the losses alm and ce."
        )
      for teacher in fn.teacher_names:
        if teacher == "teacher" and not config.train.online:
          _check_loss(name, fn, path, manifest, kinds)
        elif teacher in store.others:
          _check_loss(name, fn, path, store.others[teacher].manifest, set())
  kept = {p: s.manifest for p, s in zip(paths, stores, strict=True) if s.manifest.kind != "text"}
  reads_targets = any(
    isinstance(fn, TokenLoss) and "teacher" in fn.teacher_names for fn in config.losses.values()
  )
  _check_temperatures(config, stores)
  conventions = {manifest.missing_mass for manifest in kept.values()}
  if len(conventions) > 1 and reads_targets and not config.train.online:
    named = ", ".join(f"{path} ({m.kind}, {m.missing_mass})" for path, m in kept.items())
    raise InputError(
      f"The stores to mix are {named}; expected the same kind and missing_mass in all. Record them "
      "with the same settings."
    )


def _check_temperatures(config: Config, stores: Stores) -> None:
  """Raises InputError if the targets of a batch would have several temperatures."""
  recorded = [] if config.train.online else [store.manifest for store in stores]
  recorded += [other.manifest for store in stores for other in store.others.values()]
  found = sorted({m.temperature for m in recorded if m.kind != "text"})
  if len(found) > 1:
    named = ", ".join(f"{temperature:g}" for temperature in found)
    raise bad_value(
      "records.temperature",
      named,
      "one temperature for all stores and teachers of a run",
      "Record them with the same temperature",
    )


def check_rollouts(config: Config, stores: Stores) -> None:
  """Raises InputError if a loss needs scalars of rollouts that a store lacks."""
  paths = config.train.records or tuple(config.tasks)
  for name, fn in config.losses.items():
    for path, store in zip(paths, stores, strict=True):
      if missing := [s for s in fn.rollout_scalars if s not in store.manifest.spec.rollout]:
        action = "Set on_policy.reward" if missing == ["reward"] else "Train with `on_policy`"
        raise InputError(
          f"losses.{name} needs the {missing[0]} of texts that the student wrote, which the "
          f"records {path} lack. {action}, or remove the loss."
        )


def _check_loss(name: str, fn: BaseLoss, path: str, manifest: Manifest, kinds: set[str]) -> None:
  """Raises InputError if a loss cannot use these records.

  Text without targets can be mixed with sampled records; token losses skip it.
  """
  if manifest.kind == "text" and kinds == {"text", "sampled"} and isinstance(fn, TokenLoss):
    return
  if manifest.kind == "text":
    raise InputError(
      f"losses.{name} needs a teacher's targets, but the records {path} only hold text or labels. "
      "Record with records.kind=sampled (dense for few classes), or set train.online=True."
    )
  try:
    fn.check_records(manifest.kind, manifest.logp, manifest.temperature, manifest.missing_mass)
  except InputError as error:
    raise InputError(f"losses.{name} cannot use the records {path}: {error}") from error


def check_schedules(config: Config) -> None:
  """Raises InputError if the schedule of a loss ends after the last training step."""
  for name, fn in config.losses.items():
    for key, schedule in fn.schedules().items():
      if schedule.last_step > config.train.steps:
        raise InputError(
          f"The schedule losses.{name}.{key} ends at step {schedule.last_step:g}; expected at most "
          f"{config.train.steps} (train.steps). Shorten it."
        )


def check_features(config: Config, step: Step, stores: Stores) -> None:
  """Raises InputError if the features that losses compare are not in the models or records."""
  _, by_teacher = step.feature_specs()  # raises if a layer does not exist
  theirs = by_teacher.get(TEACHER, FeatureSpec())
  for name, fn in step.feature_losses.items():
    runs_here = fn.teacher in config.teachers or (fn.teacher == "teacher" and config.train.online)
    if fn.compares_embeddings and not runs_here:
      raise InputError(
        f"losses.{name} compares embeddings, which records do not hold. Set train.online=True."
      )
  if config.train.online or not theirs.taps:
    return
  if any(store.manifest.taps != stores[0].manifest.taps for store in stores):
    raise InputError(
      f"The stores {', '.join(config.train.records)} have different taps. Mix stores with the same "
      "taps."
    )
  for kind, layers in (("hidden", theirs.hidden), ("qkv", theirs.qkv)):
    held = step.recorded.taps if step.recorded.tap_kind == kind else ()
    if missing := sorted(set(layers) - set(held)):
      raise InputError(
        f"The losses compare {kind} features of teacher layers {list(layers)}, but the records "
        f"lack layers {missing}. Record with records.tap_kind={kind} and "
        f"records.taps={tuple(layers)}, or set train.online=True."
      )
