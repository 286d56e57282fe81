"""Tests of image classification from record to export, and of DeiT's two outputs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_images
from tiny_images import configured

from distill_jax import config
from distill_jax.commands import evaluate, export, record
from distill_jax.errors import InputError
from distill_jax.losses import DenseTargets, ce, kd, pseudo_label
from distill_jax.models import deit
from distill_jax.nn import layers
from distill_jax.runtime.workdir import Workdir
from distill_jax.tasks import dataset
from distill_jax.training import loop
from distill_jax.training import stores as training_stores
from distill_jax.training.step import Fixed, Step
from distill_jax.types import Batch, Images

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Returns (folder, config) of a run with a recorded teacher and a trained student."""
  folder = tmp_path_factory.mktemp("run")
  tiny_images.write_idx(folder)
  resolved = config.resolve(configured(folder))
  with Workdir(folder / "records", resolved) as records:
    record.run(resolved, records)
  with Workdir(folder / "student", resolved) as student:
    loop.train(resolved, student)
  return folder, configured(folder)


def test_a_loss_of_targets_is_not_evaluated_on_examples_without_records(run, tmp_path):
  c = run[1].copy_and_resolve_references()
  c.train.eval_every = 2
  expected = "train.eval_every is 2; expected 0 without train.heldout, because losses.soft needs"
  with Workdir(tmp_path, config.resolve(c)) as student, pytest.raises(InputError, match=expected):
    loop.train(config.resolve(c), student)


def test_an_exported_model_has_the_same_outputs_in_transformers(run, tmp_path):
  folder, c = run
  c.evaluate.models = {"student": f"run:{folder / 'student'}"}
  c.export.dir, c.export.dtype = str(tmp_path / "hub"), "float32"
  resolved = config.resolve(c)
  row = evaluate.run(resolved, tmp_path)["models"]["student"]
  export.run(resolved, folder / "student")
  theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hub").eval()
  assert theirs.config.id2label == dict(enumerate(tiny_images.NAMES))
  saved = json.loads((tmp_path / "hub" / "preprocessor_config.json").read_text())

  rows = dataset.open_examples(resolved, "things", "heldout", None)
  pixels = np.stack([r["pixels_WWM"] for r in rows]) * saved["rescale_factor"]
  pixels = (pixels - saved["image_mean"]) / saved["image_std"]
  labels = torch.tensor([int(r["labels_T"][0]) for r in rows])
  with torch.no_grad():
    z = theirs(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float()).logits
  # float32, one layer.
  assert row["ce"] == pytest.approx(float(torch.nn.functional.cross_entropy(z, labels)), abs=2e-6)
  assert row["accuracy"] == pytest.approx(float((z.argmax(-1) == labels).float().mean()))


def test_a_deit_trains_on_the_same_records_and_has_one_output_in_use(run, tmp_path):
  folder, c = run
  c = c.copy_and_resolve_references()
  c.student.family = "deit"
  c.losses = {"soft": config.loss("pseudo_label"), "hard": config.loss("ce")}
  resolved = config.resolve(c)
  with Workdir(tmp_path / "deit", resolved) as student:
    last = loop.train(resolved, student)
  assert last["tokens"] == 8 and last["soft"] > 0
  assert last["hard"] == pytest.approx(
    last["ce"], rel=1e-5
  )  # both are computed from the class token only
  model = jax.eval_shape(lambda key: deit.Model(deit.TINY, key), jax.random.key(0))
  seen = Images(jax.ShapeDtypeStruct((2, 12, 12, 1), jnp.float32))
  assert (
    jax.eval_shape(lambda m, i: m(i, layers.ComputeConfig()), model, seen).hidden_BTD.shape[1] == 1
  )


def test_views_are_reproducible_and_records_depend_on_the_seed(run):
  _, c = run
  resolved = config.resolve(c)
  a, b = (dataset.open_examples(resolved, "things", "train", None) for _ in "ab")
  n = len(a.source)
  assert len(a) == 2 * n
  for i in (0, 3, n, n + 3):
    np.testing.assert_array_equal(a[i]["pixels_WWM"], b[i]["pixels_WWM"])
  assert any(not np.array_equal(a[i]["pixels_WWM"], a[n + i]["pixels_WWM"]) for i in range(n))
  c = c.copy_and_resolve_references()
  c.tasks.things.seed = 1
  with pytest.raises(InputError, match="augmentation"):
    training_stores.open_stores(config.resolve(c))


CAPTURE = optax.GradientTransformationExtraArgs(  # the optimizer's state is the gradient
  lambda params: jax.tree.map(jnp.zeros_like, params), lambda g, state, *_, **__: (g, g)
)


def deit_batch(seed=0):
  rng = np.random.default_rng(seed)
  f32 = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  labels = jnp.asarray(rng.integers(0, 10, (4, 1)), jnp.int32)
  targets = DenseTargets(hidden_BTD=f32(4, 1, 6), head_VD=f32(10, 6))
  mask = jnp.asarray([[True], [True], [False], [True]])
  return Batch(Images(f32(4, 12, 12, 1)), labels, mask, {"teacher": targets})


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
def test_the_class_token_is_trained_on_labels_and_the_distillation_token_on_the_teacher(hard):
  """The loss equals equations 2 and 3 of the paper, computed from the logits of both outputs."""
  model = deit.Model(deit.TINY, jax.random.key(0))
  batch = deit_batch()
  soft = pseudo_label.Loss() if hard else kd.Loss()
  step = Step(
    losses={"soft": soft, "hard": ce.Loss()},
    learning_rate=lambda _: jnp.zeros(()),
    optimizer=CAPTURE,
    student=layers.ComputeConfig(training=True),
    teacher=layers.ComputeConfig(),
    chunk=2,
  )

  def want(model):
    out = model(batch.inputs, layers.ComputeConfig(training=True))
    z_BTV = jax.nn.log_softmax(jnp.einsum("BTD,VD->BTV", out.hidden_BTD, out.head_VD))
    t = batch.targets["teacher"]
    logp_BV = jax.nn.log_softmax(jnp.einsum("BD,VD->BV", t.hidden_BTD[:, 0], t.head_VD))
    own = -jnp.take_along_axis(z_BTV[:, 0], batch.labels_BT, -1)[:, 0]
    if hard:
      taught = -jnp.take_along_axis(z_BTV[:, 1], jnp.argmax(logp_BV, -1)[:, None], -1)[:, 0]
    else:
      taught = jnp.sum(jnp.exp(logp_BV) * (logp_BV - z_BTV[:, 1]), -1)
    return jnp.sum(jnp.where(batch.mask_BT[:, 0], own + taught, 0)) / 3

  value, grads = jax.jit(jax.value_and_grad(want))(model)
  weights = {"soft": 1.0, "hard": 1.0}
  loss = lambda m: step.loss((m, {}), batch, Fixed({}, 0, 3.0), weights)
  (got, means), got_grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(model)
  assert float(got) == pytest.approx(float(value), rel=1e-6)
  assert (
    float(means["ce"].count) == float(means["soft"].count) == 3
  )  # not the outputs of both tokens
  for a, b in zip(*map(jax.tree.leaves, (got_grads, grads)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
