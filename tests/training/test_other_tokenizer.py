"""An online teacher with another tokenizer: its step beside a reference on dense targets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_pair
import tiny_run

from distill_jax import config
from distill_jax.cross_tokenizer.rows import align_rows
from distill_jax.errors import InputError
from distill_jax.models import loading
from distill_jax.nn import logits as logits_lib
from distill_jax.nn import sharding
from distill_jax.records.multi_teacher import MultiTeacherStore
from distill_jax.records.store import open_store
from distill_jax.training import aligned_store, loop, state, stores, validate
from distill_jax.training.aligned_store import AlignedStore
from distill_jax.training.step import Fixed

LENGTH = 32


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  """The folder of a store of text in the teacher's tokens, and of the tokenizers."""
  folder = tmp_path_factory.mktemp("text")
  c = tiny_pair.teacher_config(folder, 1200)
  c.records.kind = "text"
  tiny_run.record(c, folder / "text")
  return folder


def online(folder):
  """A config that trains with the teacher in the step."""
  c = tiny_pair.teacher_config(folder, 1200)
  c.retarget.tokenizer = str(folder / "student.json")
  c.retarget.seq_len, c.retarget.min_mass = LENGTH, 0.1
  c.train.online = True
  c.train.records = (str(folder / "text"),)
  c.train.batch_size, c.train.chunk = 4, 20
  return c


@pytest.mark.slow
def test_the_gradient_is_that_of_the_enumerated_distributions(text):
  """The loss and its gradient, with the targets of each position enumerated in float64."""
  c = config.resolve(online(text))
  opened = stores.open_stores(c)
  (store,) = opened
  assert isinstance(store, AlignedStore) and store.manifest.seq_len == LENGTH
  mesh = sharding.make_mesh()
  student = loading.open_source(c.student, 1)
  models = {name: s.load(mesh, jax.random.key(0)).model for name, s in teachers(c).items()}
  step = loop.make_step(c, opened, student)
  batch = next(stores.batches(c, opened))
  model = student.load(mesh, jax.random.key(1)).model
  weights = {"soft": 0.7, "hard": 0.3}

  @jax.jit
  def ours(model, batch, teachers):
    fixed = Fixed(teachers, 0, 1.0)
    of = lambda model: step.loss((model, {}), batch, fixed, weights)[0]
    return jax.value_and_grad(of)(model)

  got, grad = ours(model, batch, state.with_tables(models, c, opened))
  target_BTV, mask = enumerated(models["teacher"], batch, store.rows.tables, step.teacher)

  @jax.jit
  def wanted(model):
    out = model(batch.inputs, step.student)
    z_BTV = logits_lib.logits(out.hidden_BTD, out.head_VD)[..., : target_BTV.shape[-1]]
    logq_BTV = jax.nn.log_softmax(z_BTV)
    entropy = jnp.sum(jnp.where(target_BTV > 0, target_BTV * jnp.log(target_BTV), 0), -1)
    kl_BT = entropy - jnp.sum(target_BTV * logq_BTV, -1)
    ce_BT = -jnp.take_along_axis(logq_BTV, batch.labels_BT[..., None], -1)[..., 0]
    return jnp.sum(jnp.where(mask, 0.7 * kl_BT + 0.3 * ce_BT, 0))

  want, want_grad = jax.value_and_grad(wanted)(model)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(want_grad), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * np.abs(b).max())


def teachers(c):
  return state.online_teachers(c)


def enumerated(teacher, batch, tables, compute):
  """The targets of a batch, float32 [B, T, V], and its mask."""
  inputs = batch.targets["teacher"].inputs
  out = jax.jit(lambda model, inputs: model(inputs, compute))(teacher, inputs)
  z_BTV = np.float64(logits_lib.logits(out.hidden_BTD, out.head_VD))[..., : tables.teacher.size]
  p_BTV = np.exp(z_BTV) / np.exp(z_BTV).sum(-1, keepdims=True)
  names = ("tokens_T", "segments_T")
  rows = [
    dict(zip(names, row, strict=True))
    for row in zip(np.array(inputs.tokens_BT), np.array(inputs.segments_BT), strict=True)
  ]
  for row in rows:  # of one document
    row["mask_T"] = np.append(row["segments_T"][1:] > 0, False)
  aligned = align_rows(tables, rows, LENGTH)
  p_GV = p_BTV[aligned.row_G, aligned.position_G - 1]
  reference = tiny_pair.Enumeration(tables, aligned.aligned, p_GV, aligned.known_G)
  target_BTV = np.zeros((*batch.labels_BT.shape, tables.student.size), np.float32)
  mask = np.zeros(batch.labels_BT.shape, bool)
  for x, i, t in zip(aligned.token_X, aligned.row_X, aligned.position_X, strict=True):
    want, mass, _ = reference.target(x)
    target_BTV[i, t] = want if mass >= 0.1 else np.eye(len(want))[batch.labels_BT[i, t]]
    mask[i, t] = True
  np.testing.assert_array_equal(mask, batch.mask_BT)
  return target_BTV, mask


def test_stores_in_the_students_tokens_stay_as_they_are(text):
  c = online(text)
  c.retarget.tokenizer = c.data.tokenizer
  (store,) = stores.open_stores(config.resolve(c))
  assert not isinstance(store, AlignedStore)


def test_what_is_refused(text, tmp_path):
  c = online(text)
  c.data.tokenizer = str(tiny.write_tokenizer(tmp_path / "bytes.json"))
  with pytest.raises(InputError, match="in train.records has tokens of digest .*; expected those"):
    stores.open_stores(config.resolve(c))
  c = online(text)
  c.losses.hidden = config.loss("hidden")
  with pytest.raises(InputError, match="losses.hidden is .*; expected a loss of logits for an onl"):
    stores.open_stores(config.resolve(c))
  c = online(text)
  plain = MultiTeacherStore(open_store(text / "text"), {})
  c.train.teachers = {"other": (str(text / "text"),)}
  with pytest.raises(InputError, match="train.teachers is .*; expected {} for an online teacher"):
    student = loading.open_source(c.student, 0)
    aligned_store.align(config.resolve(c), student, "train.records", [plain])


def test_a_teacher_does_not_read_tokens_of_another_tokenizer(text):
  """Its text must be in its own tokens, also the held-out text."""
  c = online(text)
  resolved = config.resolve(c)
  aligned, models = stores.open_stores(resolved), teachers(resolved)
  student = loading.open_source(resolved.student, 0)
  validate.check_online(resolved, aligned, (), models, student)
  other = MultiTeacherStore(open_store(text / "text"), {})
  other.manifest = dataclasses.replace(other.manifest, tokenizer=aligned[0].manifest.tokenizer)
  with pytest.raises(InputError, match="The online teacher 'teacher' has the tok.* but would"):
    validate.check_online(resolved, aligned, [other], models, student)
  c.retarget.tokenizer, c.data.tokenizer = "", c.retarget.tokenizer
  validate.check_online(config.resolve(c), [other], (), models, student)


@pytest.mark.slow
def test_a_run_learns_resumes_and_does_not_depend_on_the_mesh(text, tmp_path):
  """The student comes near the teacher, which is random, and its cross-entropy does not fall."""
  heldout = tiny_pair.teacher_config(tmp_path, 1200)
  heldout.records.kind = "text"
  (tmp_path / "text.txt").write_text("ab ba aab bbab " * 30)
  tiny_run.record(heldout, tmp_path / "heldout")
  c = online(text)
  c.train.steps, c.train.checkpoint_every, c.optim.peak_lr = 12, 6, 3e-3
  c.train.heldout, c.train.eval_every = (str(tmp_path / "heldout"),), 6
  whole = tiny_run.train(c, tmp_path / "whole")
  rows = tiny.measured(tmp_path / "whole")
  kl = [row["kl/teacher"] for row in rows if "kl/teacher" in row]
  assert kl[-1] < 0.7 * kl[0] and whole["heldout/kl/teacher"] < 0.8 * kl[0]

  stopped = stores.loader.batches
  calls = []

  def some(*args, **kwargs):
    for n, batch in enumerate(stopped(*args, **kwargs)):
      if n == 8 and not calls:
        calls.append(n)
        raise KeyboardInterrupt
      yield batch

  with pytest.MonkeyPatch.context() as m:
    m.setattr(stores.loader, "batches", some)
    with pytest.raises(KeyboardInterrupt):
      tiny_run.train(c, tmp_path / "stopped")
    tiny_run.train(c, tmp_path / "stopped")
  assert tiny.measured(tmp_path / "stopped") == rows
  c.mesh.update({"data": 2, "tensor": 2})
  spread = tiny_run.train(c, tmp_path / "spread")
  for name in ("loss", "kl/teacher", "teacher_entropy/teacher"):
    assert spread[name] == pytest.approx(whole[name], rel=1e-3), name
