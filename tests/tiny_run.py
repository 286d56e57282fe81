"""A finished run on tiny.py's text, which is made once per test process (conftest.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import tiny

from distill_jax import config
from distill_jax.commands import record as record_command
from distill_jax.runtime.workdir import Workdir
from distill_jax.training import loop, stores


def record(c, workdir: Path) -> dict:
  """Records with a config that is not resolved yet."""
  return record_command.run(config.resolve(c), workdir)


def train(c, workdir: Path) -> dict[str, float]:
  """Trains with a config that is not resolved yet; returns the last metrics."""
  resolved = config.resolve(c)
  with Workdir(workdir, resolved) as path:
    return loop.train(resolved, path)


def step_of(resolved, model):
  """Returns the step of a config, a random student and teacher of its shape, and the first batch.

  Args:
    resolved: The config.
    model: The class of both models.
  """
  opened = stores.open_stores(resolved)
  step = loop.make_step(resolved, opened)
  make = jax.jit(lambda key: model(step.student_config, key))
  student, teacher = make(jax.random.key(0)), make(jax.random.key(1))
  batch = jax.tree.map(jnp.asarray, next(stores.batches(resolved, opened)))
  return step, student, teacher, batch


def record_heldout(folder: Path, workdir: Path) -> None:
  """Writes workdir/heldout, 6 rows of another text, by the teacher of `tiny.tiny(folder)`."""
  c = tiny.tiny(folder)
  text = workdir / "other.txt"
  text.write_text("\n".join(reversed(tiny.sentences())))
  c.data.path, c.data.sequences = str(text), 6
  record(c, workdir / "heldout")


def make(folder: Path) -> None:
  """Writes the run of `tiny.tiny(folder)` and all that it reads.

  folder/text: a store of text without targets. folder/teacher: a run of 60 steps on it.
  folder/records: the store of that teacher. folder/whole: the student's run of 6 steps.
  """
  c = tiny.tiny(folder)
  c.teacher.source = ""
  c.records.kind = "text"
  record(c, folder / "text")
  c.train.records = (str(folder / "text"),)
  c.losses = {"hard": config.loss("ce")}
  c.train.steps = c.train.checkpoint_every = 60
  train(c, folder / "teacher")
  c = tiny.tiny(folder)
  record(c, folder / "records")
  train(c, folder / "whole")
