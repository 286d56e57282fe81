"""Tests of feature losses in training: recorded and online features, adapters, balancing."""

import shutil

import jax
import numpy as np
import pytest
import tiny
import tiny_run

from distill_jax import config
from distill_jax.commands.record import run as record
from distill_jax.errors import InputError
from distill_jax.models import llama
from distill_jax.records.store import open_store
from distill_jax.runtime.workdir import Workdir
from distill_jax.training import loop as training
from distill_jax.training.step import Fixed


def feature_config(folder):
  """Returns a config with two models of 3 layers, and all feature losses."""
  c = tiny.tiny(folder)
  c.teacher.source = ""
  c.losses = {
    "soft": config.loss("kd"),
    "hidden": config.loss("hidden", layers="0:1 1:2", weight=0.5),
    "relational": config.loss("relational", layers="0:1", tokens=8, weight=0.1),
  }
  c.records.taps = (1, 2)
  c.train.steps = c.train.checkpoint_every = 3
  return c


def run(c, folder, name):
  resolved = config.resolve(c)
  with Workdir(folder / name, resolved) as path:
    last = training.train(resolved, path)
  return last, tiny.measured(path)


def test_recorded_and_online_features_give_the_same_losses(tmp_path):
  c = feature_config(tmp_path)
  record(config.resolve(c), tmp_path / "records")
  assert open_store(tmp_path / "records")[0]["taps_PTD"].dtype == np.int8
  _, recorded = run(c, tmp_path, "recorded")
  c.train.online = True
  _, online = run(c, tmp_path, "online")
  for name in ("hidden", "relational"):
    # The error of int8 is half a step of 1/127 of the largest number of a vector.
    assert recorded[0][name] == pytest.approx(online[0][name], rel=1e-3), name
    assert recorded[-1][name] != recorded[0][name]


def test_layers_are_those_of_the_teacher_that_a_loss_names(tmp_path):
  """A further online teacher may be deeper; one without such a loss may be shallower."""
  c = feature_config(tmp_path)
  c.train.steps, c.records.kind, c.records.taps = 1, "text", ()
  record(config.resolve(c), tmp_path / "records")
  for name, depth in (("deep", 5), ("small", 2)):
    trained = feature_config(tmp_path)
    trained.student.changes = {"num_hidden_layers": depth}
    trained.losses = {"hard": config.loss("ce")}
    run(trained, tmp_path, name)
  c.train.online = True
  c.teachers = {"deep": f"run:{tmp_path / 'deep'}", "small": f"run:{tmp_path / 'small'}"}
  c.losses = {
    "soft": config.loss("kd", teacher="small"),
    "own": config.loss("hidden", layers="0:2"),
    "last": config.loss("hidden", teacher="deep", layers="last"),
  }
  _, (metrics,) = run(c, tmp_path, "last")
  c.losses["last"].layers = "2:4"
  _, (same,) = run(c, tmp_path, "fourth")
  assert metrics == same
  c.losses["last"].layers = "2:5"
  with pytest.raises(InputError, match="student layers 0 to 2 and teacher layers 0 to 4"):
    run(c, tmp_path, "fifth")


def test_features_of_a_further_recorded_teacher_are_refused(tmp_path):
  """They would be read as those of other layers."""
  c = feature_config(tmp_path)
  for name in ("records", "other"):
    record(config.resolve(c), tmp_path / name)
  c.train.teachers = {"other": (str(tmp_path / "other"),)}
  c.losses["hidden"].teacher = "other"
  with pytest.raises(InputError, match=r"losses.hidden.teacher is 'other'; expected 'teacher'"):
    run(c, tmp_path, "out")


@pytest.mark.slow
def test_relations_from_recorded_queries_keys_values(tmp_path):
  c = feature_config(tmp_path)
  c.losses = {"relations": config.loss("relations", layers="1:2", heads=2)}
  c.records.taps, c.records.tap_kind = (2,), "qkv"
  record(config.resolve(c), tmp_path / "records")
  _, recorded = run(c, tmp_path, "recorded")
  c.train.online = True
  _, online = run(c, tmp_path, "online")
  assert recorded[0]["relations"] == pytest.approx(online[0]["relations"], rel=0.02)


@pytest.mark.slow
def test_runs_with_projected_taps_and_adapters_resume(tmp_path):
  """Adapters start fitted and are checkpointed; a resumed run equals an uninterrupted one."""
  c = feature_config(tmp_path)
  c.records.taps_width, c.optim.peak_lr = 48, 1e-4
  c.losses = {
    "soft": config.loss("kd"),
    "hidden": config.loss("hidden", layers="0:1 1:2", projection="least_squares"),
  }
  record(config.resolve(c), tmp_path / "records")
  c.train.checkpoint_every = 1
  _, whole = run(c, tmp_path, "whole")
  shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
  shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "3")
  _, resumed = run(c, tmp_path, "stopped")
  assert resumed == whole
  c.losses["hidden"].projection = "orthogonal"
  _, unfitted = run(c, tmp_path, "unfitted")
  assert whole[0]["hidden"] < 0.5 * unfitted[0]["hidden"]
  c.losses["hidden"].projection = "none"
  with pytest.raises(InputError, match=r"width 32 \(student\) and 48 \(teacher\)"):
    run(c, tmp_path, "none")


def test_taps_that_the_records_lack_are_refused(tmp_path):
  c = feature_config(tmp_path)
  c.records.taps = (1,)
  record(config.resolve(c), tmp_path / "records")
  with pytest.raises(
    InputError, match=r"records lack layers \[2\]\. Record with records.tap_kind=hidden"
  ):
    run(c, tmp_path, "out")


@pytest.mark.slow
def test_balancing_brings_gradient_norms_into_the_ratio_of_the_weights(tmp_path):
  c = feature_config(tmp_path)
  c.train.online = True
  c.optim.balance_every = 2
  record(config.resolve(c), tmp_path / "records")
  resolved = config.resolve(c)
  step, student, teacher, batch = tiny_run.step_of(resolved, llama.Model)
  state, metrics = jax.jit(step)(step.init(student), batch, {"teacher": teacher})
  norms = {}
  fixed = Fixed({"teacher": teacher}, 0, np.float32(np.sum(batch.mask_BT)))
  grad = jax.jit(lambda s, weights: jax.grad(step.loss, has_aux=True)(s, batch, fixed, weights))
  for name in resolved.losses:
    g, _ = grad((student, {}), {n: np.float32(n == name) for n in resolved.losses})
    norms[name] = float(np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(g))))
  asked = {"soft": 1.0, "hidden": 0.5, "relational": 0.1}
  got = {n: float(metrics[f"weight/{n}"]) * norms[n] for n in norms}
  for name in asked:
    assert got[name] / got["soft"] == pytest.approx(asked[name], rel=1e-3), name
  kept = jax.jit(step)(state, batch, {"teacher": teacher})[0]
  assert kept.balance == state.balance  # step 1: not measured again
