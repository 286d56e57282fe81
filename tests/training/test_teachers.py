"""Tests of several teachers: joined records of one text, and the loss "mixture"."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from tiny_run import train

from distill_jax import config
from distill_jax.commands.record import run as record
from distill_jax.errors import InputError
from distill_jax.losses import DenseTargets, TopKTargets, kd, mixture
from distill_jax.records.multi_teacher import MultiTeacherStore
from distill_jax.records.store import open_store
from distill_jax.training import token_metrics
from distill_jax.training.metric_writer import read_metrics
from distill_jax.types import Batch, Inputs

B, C, V, D = 2, 3, 11, 5
NAMES = ("a", "b")


# ---------------------------------------------------------------- the loss


@pytest.fixture(scope="module")
def outputs():
  """Returns (logits, labels, hidden states and head of each teacher), float64."""
  rng = np.random.default_rng(0)
  teachers = {n: (rng.normal(size=(B, C, D)), 2 * rng.normal(size=(V, D))) for n in NAMES}
  return rng.normal(size=(B, C, V)), rng.integers(0, V, (B, C)), teachers


def batch_of(outputs):
  _, labels, teachers = outputs
  f32 = lambda x: jnp.asarray(x, jnp.float32)
  targets = {n: DenseTargets(hidden_BTD=f32(h), head_VD=f32(w)) for n, (h, w) in teachers.items()}
  zeros = jnp.zeros((B, C), jnp.int32)
  inputs = Inputs(zeros, zeros, zeros + 1)
  return Batch(inputs, jnp.asarray(labels, jnp.int32), jnp.ones((B, C), bool), targets)


def reference(outputs, by, shares, sharpness, trust, T):
  """Returns (loss, gradient) in float64 with torch, from the formula."""
  logits, labels, teachers = outputs
  z = torch.tensor(logits, requires_grad=True)
  label = torch.tensor(labels)[..., None]
  q_T, q = (z / T).log_softmax(-1), z.log_softmax(-1)
  weights, losses, right = [], [], []
  for (hidden, head), fixed in zip(teachers.values(), shares, strict=True):
    t = torch.tensor(hidden) @ torch.tensor(head).T
    p_T, p = (t / T).log_softmax(-1), t.log_softmax(-1)
    right.append(p.gather(-1, label)[..., 0].exp())
    entropy = -(p.exp() * p).sum(-1)
    of = {
      "shares": torch.full_like(entropy, fixed),
      "label": right[-1] ** sharpness,
      "entropy": (-sharpness * entropy).exp(),
    }
    weights.append(of[by])
    losses.append(T**2 * (p_T.exp() * (p_T - q_T)).sum(-1))
  total = sum(weights)
  soft = sum(w / total * x for w, x in zip(weights, losses, strict=True))
  denied = trust * (1 - sum(w / total * r for w, r in zip(weights, right, strict=True)))
  loss = (1 - denied) * soft - denied * q.gather(-1, label)[..., 0]
  loss.sum().backward()
  return loss.detach().numpy(), z.grad.numpy()


@pytest.mark.parametrize(
  ("by", "shares", "sharpness", "trust", "T"),
  [
    ("shares", (1.0, 1.0), 1.0, 0.0, 1.0),
    ("shares", (3.0, 1.0), 1.0, 0.5, 2.0),
    ("label", (1.0, 1.0), 1.0, 0.0, 1.0),
    ("label", (1.0, 1.0), 3.0, 1.0, 1.5),
    ("entropy", (1.0, 1.0), 2.0, 0.3, 1.0),
  ],
)
def test_a_mixture_and_its_gradient(outputs, by, shares, sharpness, trust, T):
  fn = mixture.Loss(
    temperature=mixture.constant(T),
    teachers=NAMES,
    by=by,
    sharpness=sharpness,
    label_trust=trust,
    shares=shares if by == "shares" else (),
  )
  batch, z = batch_of(outputs), jnp.asarray(outputs[0], jnp.float32)
  total = lambda z: fn.token_loss(z, batch, jnp.asarray(0)).sum()
  want, want_grad = reference(outputs, by, shares, sharpness, trust, T)
  # float32 against float64: a few units in the last place of sums of V terms
  np.testing.assert_allclose(fn.token_loss(z, batch, jnp.asarray(0)), want, rtol=2e-6, atol=2e-6)
  np.testing.assert_allclose(jax.grad(total)(z), want_grad, rtol=1e-5, atol=2e-6)


def test_a_mixture_of_one_teacher_equals_kd(outputs):
  batch, z = batch_of(outputs), jnp.asarray(outputs[0], jnp.float32)
  one = mixture.Loss(teachers=("b",), by="entropy").token_loss(z, batch, jnp.asarray(0))
  np.testing.assert_array_equal(one, kd.Loss(teacher="b").token_loss(z, batch, jnp.asarray(0)))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"by": "chance"}, "by is 'chance'"),
    ({"label_trust": 1.5}, r"label_trust is 1\.5; expected a number from 0 to 1"),
    ({"sharpness": 0.0}, r"sharpness is 0\.0; expected a number above 0"),
    ({"teachers": ("a", "a")}, r"teachers is \('a', 'a'\); expected .* different names"),
    ({"teachers": ()}, r"teachers is \(\); expected one or more"),
    ({"shares": (1.0,), "teachers": NAMES}, "one number for each of"),
    ({"shares": (0.0,)}, "numbers of at least 0 with a positive sum"),
    ({"shares": (1.0,), "by": "label"}, r"shares is \(1\.0,\); expected \(\) for by='label'"),
  ],
)
def test_invalid_mixtures_are_refused(fields, message):
  with pytest.raises(InputError, match=message):
    mixture.Loss(**fields)


# ---------------------------------------------------------------- their records


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Returns a folder with records of two random teachers on one text, and of another text."""
  path = tmp_path_factory.mktemp("teachers")
  c = tiny.tiny(path)
  c.teacher.source = ""
  for seed, name in enumerate(("records", "other")):
    c.seed = seed
    record(config.resolve(c), path / name)
  c.data.sequences = 12
  record(config.resolve(c), path / "shorter")
  return path


def config_of(folder):
  c = tiny.tiny(folder)
  c.teacher.source = ""
  c.train.teachers = {"other": (str(folder / "other"),)}
  c.losses = {
    "soft": config.loss("mixture", teachers=("teacher", "other"), by="label", label_trust=0.5)
  }
  return c


def test_training_on_records_of_two_teachers(folder):
  c = config_of(folder)
  train(c, folder / "two")
  rows = read_metrics(folder / "two")
  assert rows[-1]["loss"] < rows[0]["loss"]
  assert rows[0]["teacher_ce/other"] != rows[0]["teacher_ce/teacher"]
  first, second = open_store(folder / "records"), open_store(folder / "other")
  one = MultiTeacherStore(first, {"other": second})[3]
  np.testing.assert_array_equal(one["other/ids_TK"], second[3]["ids_TK"])
  np.testing.assert_array_equal(one["ids_TK"], first[3]["ids_TK"])
  # The metrics of a teacher are the same when its records are used alone.
  c = tiny.tiny(folder)
  c.train.records = (str(folder / "other"),)
  train(c, folder / "alone")
  alone = read_metrics(folder / "alone")[0]
  for name in ("kl", "teacher_ce", "teacher_entropy", "agreement"):
    assert alone[f"{name}/teacher"] == rows[0][f"{name}/other"], name


def test_training_on_a_recorded_and_an_online_teacher(folder):
  """The online teacher is the recorded one, so both give the same metrics."""
  c = tiny.tiny(folder)
  c.teacher.source = ""
  c.teachers = {"here": ""}
  c.losses = {"soft": config.loss("mixture", teachers=("teacher", "here"), by="entropy")}
  train(c, folder / "mixed")
  row = read_metrics(folder / "mixed")[0]
  for name in ("teacher_ce", "teacher_entropy"):  # float16 in the records
    assert row[f"{name}/here"] == pytest.approx(row[f"{name}/teacher"], rel=1e-3)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"max_position_embeddings": 16},
      "sequences of 32, but the online teacher 'teacher' .* 16 pos",
    ),
    ({"vocab_size": 100}, "has 256 tokens .* the online teacher 'teacher' has 100 tokens"),
  ],
)
def test_an_online_teacher_that_is_too_small_for_the_text_is_refused(
  folder, changes, message, tmp_path
):
  """Ids and positions beyond its tables would be clamped."""
  c = tiny.tiny(folder)
  c.teacher.source, c.train.online = "", True
  c.teacher.changes = changes
  with pytest.raises(InputError, match=message):
    train(c, tmp_path / "out")


def test_metrics_of_a_teacher_exclude_text_without_its_targets():
  """A batch of text and of top-k records has zeros where the text lacks targets."""
  rng = np.random.default_rng(0)
  logp = jax.nn.log_softmax(rng.normal(size=(B, C, V)))[..., :3]
  ids = np.broadcast_to(np.arange(3, dtype=np.int32), (B, C, 3))
  entropy = np.ones((B, C), np.float32)
  z = jnp.asarray(rng.normal(size=(B, C, V)), jnp.float32)

  def means(rows, has_targets):
    of = lambda x: jnp.asarray(x * has_targets[:, None, None].astype(x.dtype))
    targets = TopKTargets(
      ids_BTK=of(ids), logp_BTK=of(logp), entropy_BT=of(entropy[..., None])[..., 0]
    )
    tokens = jnp.zeros((B, C), jnp.int32)
    batch = Batch(
      Inputs.of(tokens), tokens, jnp.asarray(rows)[:, None] & (tokens == 0), {"t": targets}
    )
    return {k: float(m.value()) for k, m in token_metrics.means(z, batch).items() if "/" in k}

  first = np.array([True, False])
  assert means(np.array([True, True]), first) == means(first, np.array([True, True]))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda c, f: c.train.teachers.update(other=(str(f / "shorter"),)),
      "have 12 sequences, but .* have 20",
    ),
    (
      lambda c, f: c.train.teachers.update(other=()),
      r"train.teachers.other is \(\); expected 1 stores",
    ),
    (lambda c, f: c.teachers.update(other=""), "Two teachers have the name 'other'"),
    (lambda c, f: c.teachers.update(teacher=""), "Two teachers have the name 'teacher'"),
    (
      lambda c, f: c.losses.soft.update(teachers=("x",)),
      "needs the teacher 'x'; expected one of other, teacher",
    ),
    (lambda c, f: c.losses.soft.update(temperature=2.0), "losses.soft cannot use the records"),
  ],
)
def test_teachers_that_do_not_fit_are_refused(folder, change, message, tmp_path):
  c = config_of(folder)
  with c.unlocked():
    change(c, folder)
  with pytest.raises(InputError, match=message):
    train(c, tmp_path / "refused")
