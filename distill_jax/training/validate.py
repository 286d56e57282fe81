"""Refuses a training run that cannot work, before anything large is read or compiled."""

from __future__ import annotations

from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.losses import BaseLoss, TokenLoss
from distill_jax.models import loading
from distill_jax.models.loading import ModelSource
from distill_jax.records.manifest import Manifest
from distill_jax.training.step import Step
from distill_jax.training.stores import Stores
from distill_jax.types import IN_BATCH_CLASSES


def check_run(config: Config, stores: Stores, student: ModelSource | None = None) -> None:
  """Refuses losses, records and a student that do not fit together.

  Args:
    student: the model that is trained; None opens config.student.

  Raises:
    InputError: the first thing that does not fit.
  """
  student = student or loading.open_source(config.student, config.seed)
  check_losses(config)
  check_accumulation(config, stores)
  check_teachers(config)
  check_student(student)
  check_text_fits(config, student, stores)
  check_records(config, stores)
  check_schedules(config)


def check_losses(config: Config) -> None:
  """Refuses a run without anything to minimise."""
  if not config.losses:
    raise InputError("losses is empty, so there is nothing to train on; add ce or kd")
  if all(v == 0 for fn in config.losses.values() for v in fn.weight.values):
    raise InputError("every weight in losses is 0, so nothing would be trained")


def check_accumulation(config: Config, stores: Stores) -> None:
  """Refuses microbatches that there cannot be."""
  if config.optim.accumulate < 1:
    raise InputError(f"optim.accumulate is {config.optim.accumulate}; it is at least 1")
  if config.optim.accumulate > 1 and any(s.manifest.vocab_size == IN_BATCH_CLASSES for s in stores):
    raise InputError(
      f"optim.accumulate is {config.optim.accumulate}, and each microbatch of a contrastive task "
      "would find its pairs among fewer; set it to 1"
    )


def check_teachers(config: Config) -> None:
  """Refuses a loss whose teacher the config does not name, and two teachers of one name."""
  recorded, online = set(config.train.teachers), set(config.teachers)
  if twice := sorted(recorded & online | {"teacher"} & (recorded | online)):
    raise InputError(
      f"teacher {twice[0]!r} is named twice; `teacher`, `teachers` and train.teachers each name "
      "others"
    )
  known = {"teacher"} | recorded | online
  for name, fn in config.losses.items():
    if unknown := [t for t in fn.teacher_names if t not in known]:
      raise InputError(
        f"losses.{name} learns from teacher {unknown[0]!r}, and the config names "
        f"{', '.join(sorted(known))}; add it to train.teachers with its records, or to teachers "
        "with its source"
      )


def check_student(student: ModelSource) -> None:
  """Refuses adapters, sharing, integers or frozen parameters that do not fit the student."""
  student.check_digest()
  _ = student.abstract_trainable  # refuses adapters and sharing that do not fit
  student.trainable.check(student.abstract)


def check_text_fits(config: Config, student: ModelSource, stores: Stores) -> None:
  """Refuses recorded text that the student cannot read."""
  if config.tasks:
    return
  tokenizer, shape = _tokenizer(config, student), student.text_config
  for path, store in zip(config.train.records, stores, strict=True):
    manifest = store.manifest
    if manifest.vocab_size > shape.vocab_size:
      raise InputError(
        f"records {path} are over {manifest.vocab_size} tokens and the student has "
        f"{shape.vocab_size} rows; record with the student's tokenizer"
      )
    if manifest.seq_len > shape.max_position_embeddings:
      raise InputError(
        f"records {path} hold sequences of {manifest.seq_len} tokens and the student reads at most "
        f"{shape.max_position_embeddings}; record with a smaller data.seq_len"
      )
    if tokenizer is not None and tokenizer.digest != manifest.tokenizer:
      raise InputError(
        f"records {path} were made with tokenizer {manifest.tokenizer[:12]} and {tokenizer.where} "
        f"is {tokenizer.digest[:12]}; record with the student's tokenizer, or name the records' in "
        "data.tokenizer"
      )


def _tokenizer(config: Config, student: ModelSource) -> Tokenizer | None:
  """The student's tokenizer; None for a random student when the config names none."""
  if not config.data.tokenizer and student.tokenizer is None:
    return None
  return corpus.tokenizer_of(config.data, student.pretrained)


def check_records(config: Config, stores: Stores) -> None:
  """Refuses records that are of another teacher, or that a loss cannot use."""
  paths = config.train.records or tuple(config.tasks)  # tasks bring their data with them
  kinds = {store.manifest.kind for store in stores}
  for path, store in zip(paths, stores, strict=True):
    manifest = store.manifest
    recorded = manifest.teacher.get("digest")
    if config.teacher.digest and manifest.kind != "text" and recorded != config.teacher.digest:
      raise InputError(
        f"records {path} are of a teacher with digest {recorded} and teacher.digest is "
        f"{config.teacher.digest}; name the records of that teacher"
      )
    for name, fn in config.losses.items():
      for teacher in fn.teacher_names:
        if teacher == "teacher" and not config.train.online:
          _check_loss(name, fn, path, manifest, kinds)
        elif teacher in store.others:
          _check_loss(name, fn, path, store.others[teacher].manifest, set())
  kept = {p: s.manifest for p, s in zip(paths, stores, strict=True) if s.manifest.kind != "text"}
  reads_targets = any(
    isinstance(fn, TokenLoss) and "teacher" in fn.teacher_names for fn in config.losses.values()
  )
  conventions = {manifest.missing_mass for manifest in kept.values()}
  if len(conventions) > 1 and reads_targets and not config.train.online:
    named = ", ".join(f"{path} ({m.kind}, {m.missing_mass})" for path, m in kept.items())
    raise InputError(
      f"train.records mixes {named}; expected one kind and one missing_mass. Record them alike"
    )


def _check_loss(name: str, fn: BaseLoss, path: str, manifest: Manifest, kinds: set[str]) -> None:
  """Refuses a loss that these records cannot serve.

  Beside sampled records, text has no targets, and a loss of each token leaves it out.
  """
  if manifest.kind == "text" and kinds == {"text", "sampled"} and isinstance(fn, TokenLoss):
    return
  if manifest.kind == "text":
    raise InputError(
      f"losses.{name} wants a teacher and records {path} hold text alone; record with "
      "records.kind=sampled (dense, of few classes), mix it with sampled records alone, or set "
      "train.online=True"
    )
  try:
    fn.check_records(manifest.kind, manifest.logp, manifest.temperature, manifest.missing_mass)
  except InputError as error:
    raise InputError(f"losses.{name} over records {path}: {error}") from error


def check_schedules(config: Config) -> None:
  """Refuses schedules of losses that training would not reach the end of."""
  for name, fn in config.losses.items():
    for key, schedule in fn.schedules().items():
      if schedule.last_step > config.train.steps:
        raise InputError(
          f"losses.{name}.{key} is scheduled to step {schedule.last_step:g} and training ends at "
          f"{config.train.steps}; end it by then"
        )


def check_features(config: Config, step: Step, stores: Stores) -> None:
  """Refuses feature losses whose layers are not there, or not in the records."""
  _, theirs = step.feature_specs()  # a layer map that does not fit raises here
  for name, fn in step.feature_losses.items():
    runs_here = fn.teacher in config.teachers or (fn.teacher == "teacher" and config.train.online)
    if fn.compares_embeddings and not runs_here:
      raise InputError(
        f"losses.{name} compares embeddings, which records do not hold; set train.online=True"
      )
  if config.train.online or not theirs.taps:
    return
  if any(store.manifest.taps != stores[0].manifest.taps for store in stores):
    raise InputError(f"records {config.train.records} hold other taps; mix stores with the same")
  for kind, layers in (("hidden", theirs.hidden), ("qkv", theirs.qkv)):
    held = step.recorded.taps if step.recorded.tap_kind == kind else ()
    if missing := sorted(set(layers) - set(held)):
      raise InputError(
        f"the losses compare {kind} of teacher layers {list(layers)} and the records lack "
        f"{missing}; record with records.tap_kind={kind} and records.taps={tuple(layers)}, or set "
        "train.online=True"
      )
