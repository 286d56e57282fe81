"""Shared layers: gradients summed, what they start from, a run that resumes, its export."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import steps as training_steps
import tiny
from tiny_run import train

from distill_jax import config
from distill_jax.commands import export
from distill_jax.commands.record import run as record
from distill_jax.errors import InputError
from distill_jax.models import deepseek_v3, gemma3, llama, loading, qwen3
from distill_jax.models.options import StudentOptions
from distill_jax.models.trainables import LayerSharing
from distill_jax.nn import layer_sharing, layers, params, sharding
from distill_jax.nn.layer_sharing import ShareOptions
from distill_jax.nn.lora import LoraOptions
from distill_jax.preflight import flops
from distill_jax.training import validate
from distill_jax.training.metric_writer import read_metrics

torch, transformers = parity.torch, parity.transformers
HOW = layers.ComputeConfig()
ON = ("q_proj", "o_proj", "down_proj")
CASES = {  # name: (module, Config, spec, distinct layer of each layer)
  "cyclic": (
    llama,
    dataclasses.replace(llama.TINY, num_hidden_layers=5),
    ShareOptions(2),
    [0, 1] * 3,
  ),
  "grouped": (
    llama,
    dataclasses.replace(llama.TINY, num_hidden_layers=5),
    ShareOptions(2, order="grouped"),
    [0, 0, 0, 1, 1],
  ),
  "experts": (qwen3, qwen3.CONFIGS["tiny-moe"], ShareOptions(1), [0, 0, 0]),
  "windows": (gemma3, gemma3.TINY, ShareOptions(2), [0, 1, 0]),
  "two stacks": (
    deepseek_v3,
    dataclasses.replace(deepseek_v3.TINY, num_hidden_layers=4),
    ShareOptions(3),
    [0, 1, 2, 1],
  ),
}


def draw(tree, seed=0):
  """Returns a model with random values from numpy, without compiling."""
  rng = np.random.default_rng(seed)
  return params.map_params(
    lambda v: v.replace(jnp.asarray(rng.normal(0, 0.2, v.shape), jnp.float32)), tree
  )


def random_model(module, c):
  return draw(jax.eval_shape(lambda: module.Model(c, jax.random.key(1))))


def started(model, spec, fit=True):
  start = functools.partial(layer_sharing.start, spec=spec, fit=fit)
  return jax.jit(start)(model, key=jax.random.key(0))


@pytest.mark.parametrize("name", CASES)
def test_layers_that_share_are_equal_and_their_gradients_add_up(name):
  """For any gradient of the model of L layers, the shared gradient is numpy's sum over a group."""
  module, c, spec, of = CASES[name]
  shared = started(random_model(module, c), spec, fit=False)
  whole = shared.unshare()
  assert whole.config == c and shared.unique.config.num_hidden_layers == spec.layers
  grads = draw(whole, seed=1)
  (got,) = jax.jit(lambda s, g: jax.vjp(lambda s: s.unshare(), s)[1](g))(shared, grads)
  first = 0
  for stack, _, n in module.Model.layer_stacks(c):
    local = np.array(of[first : first + n]) - of[first]
    ours, theirs = (dict(params.named_params(getattr(t, stack))) for t in (whole, grads))
    for path, v in params.named_params(getattr(got.unique, stack)):
      assert v.shape[0] == len(set(local))
      for i, x in enumerate(np.asarray(v[...])):
        total = np.float64(theirs[path][...])[local == i].sum(0)
        np.testing.assert_allclose(x, total, atol=1e-6, err_msg=path)
      np.testing.assert_array_equal(
        ours[path][...], np.asarray(ours[path][...])[[list(local).index(i) for i in local]]
      )
    first += n
  np.testing.assert_array_equal(got.unique.embed[...], grads.embed[...])


def test_the_gradient_is_the_sum_over_the_unshared_model():
  """Compares with the gradient of an ordinary model of 5 layers, including deltas."""
  model = random_model(llama, CASES["cyclic"][1])
  spec = ShareOptions(2, lora=LoraOptions(rank=2, alpha=3.0, targets=ON))
  shared = started(model, spec, fit=False)
  shared = shared.replace(deltas=draw(shared.deltas))
  tokens = np.random.default_rng(0).integers(0, 256, (2, 12)).astype(np.int32)
  inputs = parity.plain_inputs(tokens)
  loss = lambda m: jnp.sum(jnp.sin(m(inputs, HOW).hidden_BTD))
  both = lambda s, m: (jax.grad(lambda s: loss(s.with_adapters()))(s), jax.grad(loss)(m))
  got, want = jax.jit(both)(shared, shared.merge_adapters())
  theirs = dict(params.named_params(want))
  for path, v in params.named_params(got.unique):
    x = np.float64(theirs[path][...])
    if path.startswith("layers."):
      x = np.stack([x[0::2].sum(0), x[1::2].sum(0)])
    assert parity.error(v[...], x) < parity.GRADIENT, path
  for path, delta in got.deltas.items():  # d(W + s A B) / dA, by hand
    w, b = np.float64(theirs[path][...]), np.float64(shared.deltas[path].b[...])
    rows = delta.a[...].shape[0], -1, int(np.prod(b.shape[2:]))
    a = 1.5 * np.einsum("Lio,Lro->Lir", w.reshape(rows), b.reshape(5, 2, -1))
    assert parity.error(np.asarray(delta.a[...]).reshape(a.shape), a) < parity.GRADIENT, path


@pytest.mark.parametrize(
  "compute, order, of", [("mean", "cyclic", [0, 1, 0, 1, 0]), ("first", "grouped", [0, 0, 0, 1, 1])]
)
def test_initial_shared_layers_and_deltas(compute, order, of):
  """A shared layer is the mean or the first; deltas of full rank restore the original layers."""
  model = random_model(llama, CASES["cyclic"][1])
  deltas = LoraOptions(rank=32, alpha=7.0, targets=("q_proj", "down_proj"))
  shared = started(model, ShareOptions(2, order, compute, deltas))
  unique = dict(params.named_params(shared.unique.layers))
  for path, v in params.named_params(model.layers):
    for i in range(2):
      same = np.float64(v[...])[np.array(of) == i]
      want = same.mean(0) if compute == "mean" else same[0]
      np.testing.assert_allclose(unique[path][i], want, atol=1e-6, err_msg=path)
  merged = jax.jit(layer_sharing.SharedLayers.merge_adapters)(shared)
  assert sorted(shared.deltas) == ["layers.down", "layers.q"]
  for name in ("q", "down"):
    got, want = (getattr(m.layers, name)[...] for m in (merged, model))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_deltas_are_the_best_low_rank_approximation():
  """The remaining Frobenius norm is that of the remaining singular values from numpy."""
  model = random_model(llama, CASES["cyclic"][1])
  shared = started(model, ShareOptions(2, lora=LoraOptions(rank=3, targets=ON)))
  whole, merged = jax.jit(lambda s: (s.unshare(), s.merge_adapters()))(shared)
  for at in ("q", "o", "down"):
    w, base, near = (np.float64(getattr(m.layers, at)[...]) for m in (model, whole, merged))
    rows = 32 if at == "q" else w[0].size // 32  # inputs
    for layer in range(5):
      s = np.linalg.svd((w - base)[layer].reshape(rows, -1), compute_uv=False)
      left = np.linalg.norm((w - near)[layer])
      np.testing.assert_allclose(left, np.sqrt((s[3:] ** 2).sum()), rtol=1e-4)


def test_a_zero_delta_has_a_gradient():
  """Layers 0 and 1 equal the shared ones, so A is random and B is 0, as in LoRA."""
  model = random_model(llama, CASES["cyclic"][1])
  spec = ShareOptions(2, start="first", lora=LoraOptions(rank=2, targets=("q_proj",)))
  for fit in (True, False):
    delta = started(model, spec, fit).deltas["layers.q"]
    a, b = np.asarray(delta.a[...]), np.asarray(delta.b[...])
    assert not b[:2].any() and (np.abs(a[:2]) > 0).all()
    assert b[2:].any() == fit


def steps(mesh_shape=(1, 1, 1)):
  """Returns (trained parameters, metrics) after three steps."""
  spec = ShareOptions(2, lora=LoraOptions(rank=2))
  step = training_steps.make_step(trainable=LayerSharing(options=spec))
  mesh = sharding.make_mesh(*mesh_shape, devices=jax.devices()[: int(np.prod(mesh_shape))])
  with jax.set_mesh(mesh):
    init = lambda key: step.init(
      layer_sharing.start(llama.Model(llama.TINY, key), spec, key, False)
    )
    where = sharding.shardings(jax.eval_shape(init, jax.random.key(0)), mesh, step.student.rules)
    state = jax.jit(init, out_shardings=where)(jax.random.key(0))
    step_fn = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
    rows = []
    for n in range(3):
      batch = jax.device_put(training_steps.make_batch(n), sharding.batch_sharding(mesh))
      state, metrics = step_fn(state, batch, {})
      rows.append({k: float(v) for k, v in metrics.items()})
  return jax.device_get(state.params), rows


@pytest.mark.slow
def test_mesh_does_not_change_training():
  (one, rows), (four, others) = steps(), steps((1, 2, 2))
  for row, want in zip(others, rows, strict=True):
    for name in want:
      assert row[name] == pytest.approx(want[name], rel=1e-5), name
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)  # 1% of one of Adam's first updates


def shared_config(folder):
  """Returns a config that shares two of three layers, with deltas and integer weights."""
  c = tiny.tiny(folder)
  c.teacher.source = ""
  c.student.source = str(folder / "base")
  c.student.train, c.student.share.layers = "shared", 2
  c.student.share.lora.rank = 3
  c.student.quantise.grid = "int8"
  return c


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """A folder with the student's initial weights."""
  path = tmp_path_factory.mktemp("share")
  shape = {k: v for k, v in llama.TINY.to_hf().items() if k != "model_type"}
  parity.torch_model("llama", **shape).save_pretrained(path / "base")
  return path


@pytest.fixture(scope="module")
def folder(base):
  """The same folder after a training run."""
  c = shared_config(base)
  record(config.resolve(c), base / "records")
  train(c, base / "whole")
  return base


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(folder):
  shutil.copytree(folder / "whole", folder / "stopped")
  shutil.rmtree(folder / "stopped" / "checkpoints" / "6")
  train(shared_config(folder), folder / "stopped")
  mesh = sharding.make_mesh()
  whole, stopped = (loading.open_run(folder / name).restore(mesh) for name in ("whole", "stopped"))
  assert isinstance(whole, layer_sharing.SharedLayers) and len(whole.unique.layers.q) == 2
  jax.tree.map(np.testing.assert_array_equal, whole, stopped)
  rows = read_metrics(folder / "whole")
  assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.slow
def test_the_export_has_unshared_layers(folder):
  """transformers reads three layers with tied embeddings and computes the same logits."""
  c = shared_config(folder)
  c.export.dir, c.export.dtype, c.export.quant = str(folder / "export"), "float32", "float"
  resolved = config.resolve(c)
  made = export.run(resolved, folder / "whole")
  assert made["shared_parameters"] == params.count(
    loading.open_source(resolved.student).abstract_trainable
  )
  assert made["shared_parameters"] < made["parameters"]
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  trained = loading.open_run(folder / "whole").restore(mesh)
  compute, tokens_BT = loading.compute_config(resolved.student), parity.tokens()
  out = jax.jit(lambda s, i: s.with_adapters()(i, compute))(trained, parity.plain_inputs(tokens_BT))
  model = transformers.AutoModelForCausalLM.from_pretrained(folder / "export").eval()
  assert len(model.model.layers) == 3
  with torch.no_grad():
    want = model(torch.from_numpy(tokens_BT).long()).logits
  assert parity.error(out.hidden_BTD @ out.head_VD.T, want) < parity.FORWARD
  assert (
    "2 distinct layers (cyclic), repeated, each with a merged LoRA difference of rank 3"
    in (folder / "export" / "README.md").read_text()
  )


def test_a_run_can_be_a_source(folder):
  """The loaded model has all layers; without deltas, layers that share are equal."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  plain = StudentOptions(source=f"run:{folder / 'whole'}")
  model = loading.open_source(plain).load(mesh, jax.random.key(0)).model
  assert model.config == loading.open_source(plain).config and model.config.num_hidden_layers == 3
  np.testing.assert_array_equal(model.layers.attn_norm[0], model.layers.attn_norm[2])
  assert (model.layers.q[0] != model.layers.q[2]).any()
  again = dataclasses.replace(plain, train="shared", share=ShareOptions(1))
  model = loading.open_source(again).load(mesh, jax.random.key(0)).model
  np.testing.assert_array_equal(model.layers.q[0], model.layers.q[2])


def test_preflight_counts_the_deltas(base):
  c = config.resolve(shared_config(base))
  weights = sum(
    params.count(v)
    for p, v in params.named_params(loading.open_source(c.student).abstract)
    if p in loading.open_source(c.student).abstract_trainable.deltas
  )
  assert flops.step_flops(c, "train", 4)["adapters"] == 3 * 2 * 3 * weights


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"layers": 4}, r"layers is 4; expected a number from 1 to 3 for this student"),
    ({"layers": -1}, r"layers is -1"),
    ({"layers": 0}, r"layers is 0; .*set student.train='whole'"),
    ({"order": "groups"}, r"order is 'groups'; expected one of cyclic, grouped"),
    ({"start": "last"}, r"start is 'last'; expected one of mean, first"),
    ({"lora": {"rank": 99}}, r"student.share.lora.rank is 99; .* layers.q is 32 by 32"),
    ({"lora": {"rank": 2, "targets": ("x",)}}, r"student.share.lora.targets is 'x'"),
  ],
)
def test_invalid_share_options_are_refused(base, changes, message):
  c = shared_config(base)
  c.student.share.update(changes)
  with pytest.raises(InputError, match=message):
    validate.check_run(config.resolve(c), [])


def test_adapters_with_shared_layers_are_refused(base):
  c = shared_config(base)
  c.student.lora.rank, c.student.quantise.grid = 2, ""
  with pytest.raises(
    InputError, match=r"student.train is .shared.; expected .* because student.lora is set"
  ):
    validate.check_run(config.resolve(c), [])
  with pytest.raises(
    InputError, match=r"from 2 to 3 .*the first 1 of its 3 layers are of another kind"
  ):
    layer_sharing.check(ShareOptions(1), random_model(deepseek_v3, deepseek_v3.TINY))
