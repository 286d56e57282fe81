"""Tests of evaluation during training: its values, schedule, resuming, best checkpoint and end."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny_run import record_heldout, train

from distill_jax import config
from distill_jax.commands import export
from distill_jax.errors import InputError
from distill_jax.models import loading
from distill_jax.models.options import ModelOptions
from distill_jax.nn import sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.preflight import estimate
from distill_jax.records import collate
from distill_jax.records.store import open_store
from distill_jax.runtime import checkpoint, distributed
from distill_jax.training import heldout, optim
from distill_jax.training.best import Best
from distill_jax.training.metric_writer import read_metrics
from distill_jax.training.options import TrainOptions


def made(tiny_run, folder):
  """Returns a config that evaluates after 2, 4 and 6 steps, with a loss whose weight falls."""
  c = tiny.tiny(tiny_run)
  c.train.heldout, c.train.eval_every = (str(folder / "heldout"),), 2
  c.train.best_metric = c.optim.plateau_metric = "heldout/loss"
  c.optim.plateau_patience = 1
  c.losses.soft = config.loss("kd", weight=config.schedule((0, 0.7), (5, 0.2)))
  return c


@pytest.fixture(scope="module")
def folder(tiny_run, tmp_path_factory):
  """Returns a folder with 6 held-out rows, and a run that is evaluated on them in batches of 4."""
  path = tmp_path_factory.mktemp("evaluated")
  record_heldout(tiny_run, path)
  train(made(tiny_run, path), path / "whole")
  return path


def test_values_agree_with_a_dense_reference(folder, tiny_run):
  """Losses of the last state in float64, from the logits of all positions at once."""
  run = loading.open_run(folder / "whole")
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  model = run.load(mesh, ComputeConfig())
  store = open_store(folder / "heldout")
  batch = collate.collate([store[i] for i in range(6)])
  out = model(jax.tree.map(jnp.asarray, batch.inputs), ComputeConfig())
  logits = np.float64(out.hidden_BTD) @ np.float64(out.head_VD).T
  logq = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  target, mask = batch.targets["teacher"], batch.mask_BT
  ce = -np.take_along_axis(logq, batch.labels_BT[..., None], -1)[..., 0][mask].mean()
  cross = -(target.weight_BTK * np.take_along_axis(logq, target.ids_BTK, -1)).sum(-1)
  kd = (cross - target.entropy_BT)[mask].mean()
  row = read_metrics(folder / "whole")[-1]
  want = {"hard": ce, "ce": ce, "soft": kd, "kl/teacher": kd, "loss": 0.2 * kd + 0.3 * ce}
  for name, value in (want | {"perplexity": np.exp(ce), "tokens": mask.sum()}).items():
    # float32 logits and weights against float64
    assert row[f"heldout/{name}"] == pytest.approx(value, rel=2e-6), name
  evaluated = [r["step"] for r in read_metrics(folder / "whole") if "heldout/loss" in r]
  assert evaluated == [1, 3, 5]


def test_an_interrupted_run_writes_the_same_rows(folder, tiny_run):
  """Stopped in the second batch of the second evaluation, then by SIGTERM, then finished."""
  c, stopped = made(tiny_run, folder), folder / "stopped"
  real = collate.to_device

  def stop_at(call, fault):
    calls = iter(range(1, 100))

    def to_device(batch, rows):
      if next(calls) == call:
        fault()
      return real(batch, rows)

    return to_device

  def power_cut():
    raise KeyboardInterrupt

  for call, fault, error in (
    (8, power_cut, KeyboardInterrupt),  # 2 steps and 2 batches, twice
    (2, distributed.Preemption.request, distributed.Preempted),  # at step 4, with its evaluation
  ):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(error):
      patch.setattr(collate, "to_device", stop_at(call, fault))
      train(c, stopped)
  result = train(c, stopped)
  assert tiny.measured(folder / "whole") == tiny.measured(stopped)
  for workdir in (folder / "whole", stopped):
    with checkpoint.open_run(workdir) as saves:
      about = checkpoint.read_metadata(saves, 6)
      assert about["best"] == {
        "metric": "heldout/loss",
        "step": 6,
        "value": result["heldout/loss"],
        "since": 0,
      }
      sums = about["arrays"] if workdir != stopped else sums  # noqa: F821
      assert about["arrays"] == sums
  again = train(c, stopped)
  assert again["best_value"] == result["best_value"] == result["heldout/loss"]


@pytest.fixture
def scripted(monkeypatch):
  """Makes evaluations return these losses, one after the other; returns those that are left."""
  losses = [3.0, 2.0, 2.5, 2.25, 1.0]
  values = lambda *_: {"heldout/loss": losses.pop(0), "heldout/ce": 0.0}
  monkeypatch.setattr(heldout.Evaluation, "__call__", values)
  return losses


def test_the_best_is_kept_and_patience_ends_the_run(folder, tiny_run, tmp_path, scripted, capsys):
  c = made(tiny_run, folder)
  c.optim.plateau_metric, c.optim.plateau_patience = "", 0
  c.train.eval_every, c.train.checkpoint_every, c.train.keep, c.train.patience = 1, 0, 1, 2
  real, calls = collate.to_device, []

  def to_device(batch, rows):
    calls.append(batch)
    if len(calls) == 3:  # the third step is saved, and an evaluation without improvement counted
      distributed.Preemption.request()
    return real(batch, rows)

  with pytest.MonkeyPatch.context() as patch, pytest.raises(distributed.Preempted):
    patch.setattr(collate, "to_device", to_device)
    train(c, tmp_path)
  result = train(c, tmp_path)
  assert scripted == [1.0]
  summary = {"best_step": 2, "best_value": 2.0, "stopped_early": True}
  assert {key: result[key] for key in summary} == summary
  assert [row["heldout/loss"] for row in read_metrics(tmp_path)] == [3.0, 2.0, 2.5, 2.25]
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]
  again = train(c, tmp_path)
  assert {key: again[key] for key in summary} == summary and again["step"] == 3
  assert scripted == [1.0]
  best, last = (
    loading.open_source(ModelOptions(source=f"run:{tmp_path}{which}")) for which in ("@best", "")
  )
  assert best.run.step == 2 and best.digest == checkpoint.digest(tmp_path, 2)
  assert last.run.step is None and last.digest == checkpoint.digest(tmp_path, 4) != best.digest
  c.export.best, c.export.dir = True, str(tmp_path / "export")
  export.run(config.resolve(c), tmp_path)
  assert "for 2 steps" in (tmp_path / "export" / "README.md").read_text()
  line = "train evaluates 6 held-out rows every 1 steps (66.7% of the computation)"
  assert line in capsys.readouterr().err
  with pytest.raises(InputError, match="does not have a best checkpoint"):
    loading.open_source(ModelOptions(source=f"run:{tiny_run / 'whole'}@best"))


def test_best_by_accuracy_ignores_values_that_are_not_numbers():
  best = Best(TrainOptions(best_metric="heldout/accuracy/main", patience=3), {})
  assert best.metadata == {} and best.summary(1) == {}
  for step, value in enumerate([float("nan"), 0.2, 0.5, float("nan"), 0.5, 0.4], 1):
    assert not best.ended
    best.see(step, {"heldout/accuracy/main": value})
  assert (best.step, best.ended) == (3, True)
  assert best.summary(6)["stopped_early"]


def test_the_plateau_follows_evaluations():
  """The rate is halved after two evaluations without a lower value, whatever the steps between."""
  o = config.OptimOptions(plateau_patience=2, plateau_metric="heldout/loss", weight_decay=0.0)
  tx, p = optim.optimizer(o), {"w": jnp.ones((2, 2))}
  state, sizes = tx.init(p), []
  for value in (None, 2.0, None, 2.0, None, 3.0, None, 1.0, 1.0, 1.0, None):
    if value is not None:
      state = optim.observe(state, value)
    updates, state = tx.update({"w": jnp.ones((2, 2))}, state, p, value=jnp.asarray(1.0))
    sizes.append(float(updates["w"][0, 0]))
  np.testing.assert_allclose(sizes, [1] * 5 + [0.5] * 4 + [0.25] * 2, rtol=1e-6)


@pytest.mark.parametrize(
  ("online", "every", "cost"),
  # 6 rows in 2 batches of 4: 8 rows of 4 per step. A third of a step's computation is its forward
  # pass; with an online teacher, which runs in both, all of it may be.
  [(False, 34, 2 / 3), (True, 100, 2)],
)
def test_the_default_interval_costs_two_percent(folder, tiny_run, online, every, cost):
  from distill_jax.training import loop, stores

  c = made(tiny_run, folder)
  c.train.eval_every, c.train.online, c.train.steps = 0, online, 150
  c = config.resolve(c)
  opened = stores.open_stores(c)
  step = loop.make_step(c, opened)
  it = heldout.Evaluation(c, step, opened, stores.open_heldout(c), sharding.make_mesh())
  assert (it.every, it.cost) == (every, pytest.approx(cost))
  assert it.cost / it.every <= heldout.SHARE
  due = [n for n in range(1, 151) if it.due(n)]
  assert due == [*range(every, 150, every), 150]


def as_changed(key, value):
  """Returns a function that makes a copy of the held-out store with another manifest."""

  def change(c, folder, tmp_path):
    shutil.copytree(folder / "heldout", tmp_path / "other")
    file = tmp_path / "other" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    c.train.heldout = (str(tmp_path / "other"),)

  return change


def keys(**values):
  def change(c, *_):
    for key, value in values.items():
      section, _, name = key.partition("_")
      c[section][name] = value

  return change


def test_bad_input_is_refused(folder, tiny_run, tmp_path):
  """One sentence each, before anything is loaded or compiled."""
  metrics = (
    "heldout/agreement/teacher, heldout/ce, heldout/hard, heldout/kl/teacher, heldout/loss, "
  )
  other, own = (str(tiny_run / "text"),), (str(folder / "heldout"),)
  trained_on = open_store(tiny_run / "records").manifest.corpus
  cases = [
    (
      keys(train_best_metric="heldout/mse"),
      f"metric is 'heldout/mse'; expected one of {metrics}",
    ),
    (keys(train_best_metric="heldout/tokens"), "'heldout/tokens'; expected one of"),
    (keys(optim_plateau_metric="loss"), "optim.plateau_metric is 'loss'; expected one of"),
    (keys(optim_plateau_metric="heldout/agreement/teacher"), "a metric that is minimised"),
    (keys(optim_plateau_patience=0), "plateau_metric is .*; expected '' without optim.plateau_pat"),
    (keys(train_eval_every=-1), "train.eval_every is -1; expected 0 or more"),
    (keys(train_patience=-1), "train.patience is -1; expected 0 or more"),
    (keys(train_patience=2, train_best_metric=""), "expected 0 without train.best_metric"),
    (keys(train_heldout=()), "train.eval_every is 2; expected 0 without train.heldout"),
    (keys(train_heldout=(), train_eval_every=0), "train.best_metric is .*; expected '' without"),
    (
      keys(train_heldout=(str(tiny_run / "records"),)),
      "expected a store of text that is not trained on",
    ),
    (keys(train_heldout=other), "needs a teacher's targets, but the records"),
    (keys(train_heldout=(str(tmp_path),)), "manifest.json"),
    (keys(train_heldout_teachers={"x": own}), "stores of the same teachers as in train.teachers"),
    (keys(train_heldout_teachers={"x": ()}), "of the same text for each of train.heldout"),
    (as_changed("tokenizer", "0" * 64), "were made with another tokenizer"),
    (as_changed("vocab_size", 300), "have a vocabulary of 300 tokens, but the student's"),
    (
      as_changed("vocab_size", 200),
      "a vocabulary or classes of 200, but those of training have 256",
    ),
    (as_changed("temperature", 2.0), "temperature"),
    (as_changed("corpus", trained_on), "expected a store of text that is not trained on"),
    (
      as_changed("heldout_fraction", 0.2),
      "data.heldout_fraction is 0.0; expected at least 0.2, that of",
    ),
    (as_changed("teacher", {"digest": "ab"}), "have teacher 'ab', but those of training have"),
  ]
  for i, (change, message) in enumerate(cases):
    c = made(tiny_run, folder)
    with c.unlocked():
      change(c, folder, tmp_path / f"{i}")
    with pytest.raises(InputError, match=message):
      train(c, tmp_path / f"{i}" / "run")
    assert not (tmp_path / f"{i}" / "run" / "checkpoints").exists(), message


def test_preflight_counts_evaluation():
  """40 rows are 5 batches: 5 / 3 steps of 50; twice as many forward passes per LoRA step."""
  c = config.base()
  c.train.heldout, c.train.batch_size = ("held",), 8
  share = lambda verb="train": estimate.evaluation_share(config.resolve(c), verb)
  assert (share(), share("record")) == (heldout.SHARE, 0)
  c.train.eval_every = 50
  assert share() is None
  c.records.heldout_sequences = 40
  assert share() == pytest.approx(5 / 3 / 50)
  c.student.train, c.student.lora.rank = "lora", 2
  assert share() == pytest.approx(5 / 2 / 50)
  c.train.online = True
  assert share() == pytest.approx(5 / 50)
