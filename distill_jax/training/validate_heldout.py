"""Checks of evaluation during training, before anything large is read or compiled."""

from __future__ import annotations

import dataclasses

from distill_jax.config import Config
from distill_jax.errors import InputError, bad_value
from distill_jax.models import loading
from distill_jax.models.loading import ModelSource
from distill_jax.records.manifest import Manifest
from distill_jax.training import validate
from distill_jax.training.best import is_maximised
from distill_jax.training.heldout import losses_of
from distill_jax.training.stores import Stores, teacher_manifest


def check(
  config: Config, stores: Stores, heldout: Stores, student: ModelSource | None = None
) -> None:
  """Checks the options of evaluation, and that the held-out stores fit those it trains on.

  Args:
    config: The config of the run.
    stores: The stores it trains on.
    heldout: The held-out stores; () without evaluation.
    student: The model to train; None to open config.student.

  Raises:
    InputError: They do not fit.
  """
  check_options(config, bool(heldout))
  if not heldout:
    return
  c = config.train
  student = student or loading.open_source(config.student, config.seed)
  train = dataclasses.replace(c, records=c.heldout, teachers=c.heldout_teachers)
  losses = losses_of(config.losses, all(store.manifest.rollout for store in heldout))
  as_trained = dataclasses.replace(config, train=train, losses=losses)
  without_targets = config.tasks and not c.heldout and not c.online  # a task's own examples
  for name, fn in losses.items():
    if without_targets and "teacher" in fn.teacher_names:
      why = f"0 without train.heldout, because losses.{name} needs a teacher's targets"
      raise bad_value("train.eval_every", c.eval_every, why, "Name held-out records there")
  validate.check_text_fits(as_trained, student, heldout)
  validate.check_records(as_trained, heldout)
  paths = c.heldout or tuple(config.tasks)
  lengths = {store.manifest.seq_len for store in stores}
  like = stores if config.tasks else [stores[0]] * len(heldout)
  for path, store, trained in zip(paths, heldout, like, strict=True):
    found, expected = store.manifest.vocab_size, trained.manifest.vocab_size
    if found != expected:
      raise InputError(
        f"The held-out records {path} have a vocabulary or classes of {found}, but those of "
        f"training have {expected}. Record both with the same tokenizer or task."
      )
  for path, store in zip(paths, heldout, strict=True):
    _check_disjoint(config, path, store.manifest, stores)
    # Rounds have the length of a prompt and its text; they are evaluated on rows of any length.
    if store.manifest.seq_len not in lengths and not stores[0].manifest.rollout:
      raise InputError(
        f"The held-out records {path} have sequences of {store.manifest.seq_len} tokens, but those "
        f"of training have {', '.join(map(str, sorted(lengths)))}. Record both with the same "
        "data.seq_len."
      )
    manifests = {"": store.manifest} | {name: s.manifest for name, s in store.others.items()}
    for teacher, manifest in manifests.items():
      _check_same_teacher(config, path, teacher, manifest, stores)


def _check_disjoint(config: Config, path: str, heldout: Manifest, stores: Stores) -> None:
  """Raises InputError if documents of a held-out store may be trained on.

  Stores of the same documents have the same first row, of which the manifests have the digest. The
  split of a document follows from its hash and the fraction of documents that are held out, which
  the manifest of a held-out store has. So no row is read.

  Args:
    config: The config of the run.
    path: The folder of the held-out store.
    heldout: Its manifest.
    stores: The stores of the run.
  """
  expected, action = "a store of text that is not trained on", "Record held-out text"
  for trained in (store.manifest for store in stores):
    both = trained.heldout_fraction and heldout.heldout_fraction
    if heldout.corpus == trained.corpus or both:
      raise bad_value("train.heldout", path, expected, action)
  fraction = config.data.heldout_fraction
  if heldout.heldout_fraction > fraction and not config.tasks:
    raise bad_value(
      "data.heldout_fraction",
      fraction,
      f"at least {heldout.heldout_fraction}, that of the held-out records {path}, of which some "
      "documents are otherwise trained on",
      "Record both with the same fraction",
    )


def _check_same_teacher(
  config: Config, path: str, teacher: str, manifest: Manifest, stores: Stores
) -> None:
  """Raises InputError if held-out targets differ in kind from those of the same teacher.

  Args:
    config: The config of the run.
    path: The folder of the held-out store.
    teacher: Name of the teacher; "" for that of the store itself.
    manifest: The manifest of its held-out records.
    stores: The stores of the run.
  """
  like = teacher_manifest(stores) if not teacher else stores[0].others[teacher].manifest
  if manifest.kind == "text" or (config.train.online and not teacher):
    return
  named = f"of the teacher {teacher!r} " if teacher else ""
  # Texts that the student writes are evaluated on any records that the losses can use.
  keys = ("taps",) if like.rollout else ("kind", "temperature", "missing_mass", "taps", "teacher")
  for key in keys:
    found, expected = getattr(manifest, key), getattr(like, key)
    if key == "teacher":
      found, expected = found.get("digest"), expected.get("digest")
    if found != expected:
      raise InputError(
        f"The held-out records {path} {named}have {key} {found!r}, but those of training have "
        f"{expected!r}. Record both with the same teacher and settings."
      )


def check_options(config: Config, evaluates: bool) -> None:
  """Raises InputError if a key of evaluation is negative, or set without what it needs.

  Args:
    config: The config of the run.
    evaluates: True if there are held-out stores.
  """
  c, o = config.train, config.optim
  numbers = {
    "train.eval_every": c.eval_every,
    "train.patience": c.patience,
    "optim.plateau_patience": o.plateau_patience,
  }
  for key, number in numbers.items():
    if number < 0:
      raise bad_value(key, number, "0 or more", "Correct it")
  needs = [
    ("train.patience", c.patience, c.best_metric, "train.best_metric"),
    ("optim.plateau_metric", o.plateau_metric, o.plateau_patience, "optim.plateau_patience"),
    ("train.heldout_teachers", c.heldout_teachers, c.heldout, "train.heldout"),
    *(
      (key, value, evaluates, "train.heldout")
      for key, value in (
        ("train.eval_every", c.eval_every),
        ("train.eval_benchmarks", c.eval_benchmarks),
        ("train.best_metric", c.best_metric),
        ("optim.plateau_metric", o.plateau_metric),
      )
    ),
  ]
  for key, value, given, needed in needs:
    if value and not given:
      nothing = type(value)()
      raise bad_value(
        key, value, f"{nothing!r} without {needed}", f"Set {needed}, or remove the key"
      )
  if evaluates and c.heldout and sorted(c.teachers) != sorted(c.heldout_teachers):
    raise bad_value(
      "train.heldout_teachers",
      c.heldout_teachers,
      f"held-out stores of the same teachers as in train.teachers ({', '.join(c.teachers)})",
      "Add or remove teachers",
    )
  if is_maximised(o.plateau_metric, c.eval_benchmarks):
    expected = "a metric that is minimised, such as 'heldout/loss'"
    raise bad_value("optim.plateau_metric", o.plateau_metric, expected, "Choose another one")
