"""What can be known to be wrong with a training run before anything is read or compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.losses import supports
from distill_jax.models import loading
from distill_jax.nn import params, quantise
from distill_jax.records.store import Manifest
from distill_jax.training.step import Step
from distill_jax.types import IN_BATCH_CLASSES


def check_run(config: Config, stores: Sequence[Any]) -> None:
  """Refuses losses, records and a student that do not fit together."""
  if not config.losses:
    raise InputError("losses is empty, so there is nothing to train on; add ce or kd")
  if all(v == 0 for fn in config.losses.values() for v in fn.weight.values):
    raise InputError("every weight in losses is 0, so nothing would be trained")
  if config.optim.accumulate < 1:
    raise InputError(f"optim.accumulate is {config.optim.accumulate}; it is at least 1")
  if config.optim.accumulate > 1 and any(s.manifest.vocab_size == IN_BATCH_CLASSES for s in stores):
    raise InputError(
      f"optim.accumulate is {config.optim.accumulate}, and each part of a batch would find its "
      "pairs among fewer; set it to 1"
    )
  _check_teachers(config)
  _, shape = loading.family_and_config(config.student)
  loading.abstract_trainable(
    config.student
  )  # adapters or sharing that do not fit the student are refused
  quantise.check(config.student.quantise, loading.abstract(config.student))
  if config.student.quantise.bits and config.student.lora.rank:
    raise InputError(
      f"student.quantise.bits is {config.student.quantise.bits} and student.lora.rank "
      f"{config.student.lora.rank}; a student is trained as integers or by adapters: set one to 0"
    )
  if config.student.share.layers and config.student.lora.rank:
    raise InputError(
      f"student.share.layers is {config.student.share.layers} and student.lora.rank "
      f"{config.student.lora.rank}; shared layers are trained whole, with student.share.lora for "
      "what each is on its own: set one to 0"
    )
  if config.student.frozen:
    _check_frozen(config)
  tokenizer = None if config.tasks else _tokenizer(config)
  paths = config.train.records or tuple(config.tasks)  # tasks bring their data with them
  for path, store in zip(paths, stores, strict=True):
    about = store.manifest
    if not config.tasks and about.vocab_size > shape.vocab_size:
      raise InputError(
        f"records {path} are over {about.vocab_size} tokens and the student has "
        f"{shape.vocab_size} rows; record with the student's tokenizer"
      )
    if not config.tasks and about.seq_len > shape.max_position_embeddings:
      raise InputError(
        f"records {path} hold sequences of {about.seq_len} tokens and the student reads at most "
        f"{shape.max_position_embeddings}; record with a smaller data.seq_len"
      )
    if tokenizer is not None and tokenizer.digest != about.tokenizer:
      raise InputError(
        f"records {path} were made with tokenizer {about.tokenizer[:12]} and {tokenizer.where} is "
        f"{tokenizer.digest[:12]}; record with the student's tokenizer, or name the records' in "
        "data.tokenizer"
      )
    recorded = about.teacher.get("digest")
    if config.teacher.digest and about.kind != "text" and recorded != config.teacher.digest:
      raise InputError(
        f"records {path} are of a teacher with digest {recorded} and teacher.digest is "
        f"{config.teacher.digest}; name the records of that teacher"
      )
    for name, fn in config.losses.items():
      for teacher in teachers_of(fn):
        if teacher == "teacher" and not config.train.online:
          _check_records(name, fn, path, about, {s.manifest.kind for s in stores})
        elif teacher in store.others:
          _check_records(name, fn, path, store.others[teacher].manifest, set())
  for name, fn in config.losses.items():
    for key in ("weight", "temperature"):
      last = getattr(fn, key, fn.weight).last_step
      if last > config.train.steps:
        raise InputError(
          f"losses.{name}.{key} is scheduled to step {last:g} and training ends at "
          f"{config.train.steps}; end it by then"
        )


def _check_frozen(config: Config) -> None:
  frozen = config.student.frozen
  names = [v.get_metadata()["hf"] for _, v in params.named_params(loading.abstract(config.student))]
  lost = [start for start in frozen if not any(n.startswith(start) for n in names)]
  if lost or all(n.startswith(frozen) for n in names):
    which = f"{lost[0]!r}, with which no" if lost else f"{frozen}, with which every"
    raise InputError(
      f"student.frozen names {which} parameter of the student begins; they are called "
      f"{', '.join(sorted(set(names)))}"
    )
  if config.student.lora.rank:
    raise InputError(
      f"student.frozen is {frozen} and student.lora.rank {config.student.lora.rank}; adapters "
      "leave all the rest as it is anyway: set one of the two"
    )


def teachers_of(fn: Any) -> tuple[str, ...]:
  """The teachers that a loss learns from."""
  return getattr(fn, "teachers", (fn.teacher,) if hasattr(fn, "teacher") else ())


def _check_teachers(config: Config) -> None:
  """Refuses a loss that learns from a teacher that is not there, and teachers of one name."""
  recorded, here = set(config.train.teachers), set(config.teachers)
  if twice := sorted(recorded & here | {"teacher"} & (recorded | here)):
    raise InputError(
      f"teacher {twice[0]!r} is named twice; `teacher`, `teachers` and train.teachers each name "
      "others"
    )
  known = {"teacher"} | recorded | here
  for name, fn in config.losses.items():
    if unknown := [t for t in teachers_of(fn) if t not in known]:
      raise InputError(
        f"losses.{name} learns from teacher {unknown[0]!r}, and the config names "
        f"{', '.join(sorted(known))}; add it to train.teachers with its records, or to teachers "
        "with its source"
      )


def _tokenizer(config: Config) -> Tokenizer | None:
  """The student's tokenizer; None for a random student when the config names none."""
  source = loading.pretrained(config.student)
  if not config.data.tokenizer and (source is None or source.tokenizer is None):
    return None
  return corpus.tokenizer_of(config.data, source)


def _check_records(name: str, fn: Any, path: str, about: Manifest, kinds: set[str]) -> None:
  """Refuses a loss that these records cannot serve.

  Beside sampled records, text has no targets, and a loss of each token says nothing of it.
  """
  if about.kind == "text" and kinds == {"text", "sampled"} and hasattr(fn, "token_loss"):
    return
  if about.kind == "text":
    raise InputError(
      f"losses.{name} wants a teacher and records {path} hold text alone; record with "
      "records.kind=sampled (dense, of few classes), mix it with sampled records alone, or set "
      "train.online=True"
    )
  if not hasattr(fn, "divergence"):  # it reads features, or the likeliest token alone
    return
  other = any(t != about.temperature for t in fn.temperature.values)
  try:
    supports.check(about.kind, about.logp, fn.divergence, other)
  except InputError as error:
    raise InputError(f"losses.{name} over records {path}: {error}") from error
  if about.kind in ("topk", "dense") and fn.missing_mass != about.missing_mass:
    raise InputError(
      f"losses.{name}.missing_mass is {fn.missing_mass!r} and records {path} were made with "
      f"{about.missing_mass!r}; name the same convention"
    )
  if about.kind == "topk" and other and about.missing_mass == "tail_bucket":
    raise InputError(
      f"losses.{name}.temperature is {fn.temperature.values} over top-k records with a tail "
      f"bucket, which does not say what a temperature makes of the tail; keep it at "
      f"{about.temperature:g} or record with records.missing_mass=renormalise"
    )


def check_features(config: Config, step: Step, stores: Sequence[Any]) -> None:
  """Refuses whole-sequence losses whose layers are not there, or not in the records."""
  _, needs = step.needs()  # a layer map that does not fit raises here
  for name, fn in config.losses.items():
    if hasattr(fn, "embeds") and not (
      fn.teacher in config.teachers or (fn.teacher == "teacher" and config.train.online)
    ):
      raise InputError(
        f"losses.{name} compares embeddings, which records do not hold; set train.online=True"
      )
  if config.train.online or not needs.taps:
    return
  if any(store.manifest.taps != stores[0].manifest.taps for store in stores):
    raise InputError(f"records {config.train.records} hold other taps; mix stores with the same")
  for of, layers in (("hidden", needs.hidden), ("qkv", needs.qkv)):
    held = step.recorded.taps if step.recorded.taps_of == of else ()
    if missing := sorted(set(layers) - set(held)):
      raise InputError(
        f"the losses compare {of} of teacher layers {list(layers)} and the records lack {missing}; "
        f"record with records.taps_of={of} and records.taps={tuple(layers)}, or set "
        "train.online=True"
      )
