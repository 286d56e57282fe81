"""Integer weights: rows on their grid, the gradient, a run, its export."""

import dataclasses
import functools

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers

from distill_jax import config
from distill_jax.commands import export
from distill_jax.commands.record import run as record
from distill_jax.errors import InputError
from distill_jax.hub.declared import Layout
from distill_jax.models import deepseek_v3, llama, loading, qwen3
from distill_jax.nn import grids, params, quantise, sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.nn.quantise import QuantiseOptions
from distill_jax.runtime.workdir import Workdir
from distill_jax.training.loop import train
from distill_jax.training.metric_writer import read_metrics
from distill_jax.types import Inputs

KINDS = {
  "llama": (llama, llama.TINY),
  "experts": (qwen3, dataclasses.replace(qwen3.CONFIGS["tiny-moe"], moe_intermediate_size=32)),
  "latent": (deepseek_v3, deepseek_v3.TINY),
}
SPECS = [
  QuantiseOptions("int8"),
  QuantiseOptions("int4", 8),
  QuantiseOptions("Q8_0"),
  QuantiseOptions("Q4_0"),
]
quantised_tree = jax.jit(quantise.tree, static_argnums=1)


@functools.cache
def random_model(name):
  module, c = KINDS[name]
  return jax.jit(lambda key: module.Model(c, key))(jax.random.key(0))


def theirs(v):
  """Returns a parameter's tensors in Hugging Face's layout, [n, out, in]."""
  loops = sum(a in quantise.LOOPS for a in v.get_metadata()["axes"])
  flat = np.asarray(v[...]).reshape(-1, *v.shape[loops:])
  layout = Layout(v)
  return np.stack([layout.to_stored(x, np.dtype("float32")) for x in flat])


def stored_rows(rows, spec):
  """Returns rows [n, inputs] as the gguf package stores them; for integers, as numpy does."""
  if spec.grid in grids.GGUF:
    kind = getattr(gguf.GGMLQuantizationType, spec.grid)
    return gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind)
  most = grids.LARGEST[spec.grid]
  groups = rows.reshape(-1, spec.group or rows.shape[-1])
  scale = (np.abs(groups).max(1, keepdims=True) / most).astype(jnp.bfloat16).astype(np.float32)
  return (np.clip(np.round(groups * (1 / scale)), -most, most) * scale).reshape(rows.shape)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_rows_are_those_that_are_stored(name, spec):
  """Each output of each weight is on the grid, along its inputs in a checkpoint."""
  model = random_model(name)
  if name == "latent" and spec.grid in grids.GGUF:
    with pytest.raises(InputError, match=r"expected 'int8' or 'int4' because groups of 32 do not"):
      quantise.check(spec, model)
    return
  quantise.check(spec, model)
  done = dict(params.named_params(quantised_tree(model, spec)))
  quantised = 0
  for path, v in params.named_params(model):
    if not quantise.is_quantised(v):
      np.testing.assert_array_equal(done[path][...], v[...])
      continue
    quantised += 1
    w_NOI = theirs(v)
    want = stored_rows(w_NOI.reshape(-1, w_NOI.shape[-1]), spec)
    np.testing.assert_array_equal(theirs(done[path]).reshape(want.shape), want, err_msg=path)
  assert quantised >= 7
  assert not any(quantise.is_quantised(v) for p, v in params.named_params(model) if "router" in p)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rounding_twice_is_rounding_once(spec):
  """A loaded student, whose weights are on the grid, is rounded again in its computation."""
  once = quantised_tree(random_model("llama"), spec)
  jax.tree.map(np.testing.assert_array_equal, quantised_tree(once, spec), once)


def test_the_gradient_passes_the_rounding():
  model = random_model("llama")
  tokens = np.random.default_rng(1).integers(0, 256, (2, 9))
  inputs = Inputs(tokens, jnp.broadcast_to(jnp.arange(9), (2, 9)), jnp.ones_like(tokens))
  loss = lambda m, compute: jnp.sum(jnp.sin(m(inputs, compute).hidden_BTD))
  spec = QuantiseOptions("int4", 8)
  gradient = jax.jit(jax.grad(loss), static_argnums=1)
  got = gradient(model, ComputeConfig(quantise=spec))
  want = gradient(quantised_tree(model, spec), ComputeConfig())  # as if those were the weights
  for (path, a), (_, b) in zip(params.named_params(got), params.named_params(want), strict=True):
    np.testing.assert_allclose(a[...], b[...], rtol=1e-4, atol=1e-4, err_msg=path)


def test_invalid_quantise_options_are_refused():
  model = random_model("llama")
  with pytest.raises(InputError, match=r"quantise.grid is 'Q2_K'; expected one of int8, int4, Q8"):
    quantise.check(QuantiseOptions("Q2_K"), model)
  with pytest.raises(InputError, match=r"group is 64; expected 0 because .* is 'Q8_0'"):
    quantise.check(QuantiseOptions("Q8_0", 64), model)
  with pytest.raises(
    InputError, match=r"group is 12; expected a divisor of 64, the number of inputs of layers.down"
  ):
    quantise.check(QuantiseOptions("int8", 12), model)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A trained student with 4-bit weights."""
  path = tmp_path_factory.mktemp("quantise")
  c = tiny.tiny(path)
  c.teacher.source = ""
  c.student.train, c.student.quantise = "quantised", {"grid": "int4", "group": 16}
  c.train.steps = c.train.checkpoint_every = 12
  c.export.dir, c.export.dtype, c.export.quant = str(path / "export"), "float32", "float"
  resolved = config.resolve(c)
  record(resolved, path / "records")
  with Workdir(path / "run", resolved) as workdir:
    train(resolved, workdir)
    made = export.run(resolved, workdir)
  return path, resolved, made


def test_a_four_bit_student_is_trained_and_exported(run):
  """The weights that transformers loads are rounded, and give the logits of the run."""
  path, c, made = run
  rows = read_metrics(path / "run")
  assert rows[-1]["loss"] < rows[0]["loss"]
  mesh = c.mesh.make()
  spec = config.StudentOptions(source=f"run:{path / 'run'}")
  with jax.set_mesh(mesh):
    built = loading.open_source(spec).load(mesh, jax.random.key(0))
    tokens = np.arange(80).reshape(4, 20) * 7 % 256
    places = jnp.broadcast_to(jnp.arange(20), tokens.shape)
    out = built.model(Inputs(jnp.asarray(tokens), places, jnp.ones_like(places)), built.compute)
    logits = np.asarray(out.hidden_BTD @ out.head_VD.T)
  model = transformers.AutoModelForCausalLM.from_pretrained(path / "export", dtype=torch.float32)
  with torch.no_grad():
    want = model(torch.tensor(tokens)).logits.numpy()
  np.testing.assert_allclose(logits, want, atol=1e-4)
  down = model.model.layers[1].mlp.down_proj.weight.detach().numpy().reshape(-1, 16)
  levels = np.round(down / (np.abs(down).max(1, keepdims=True) / 7))
  assert len(np.unique(levels)) <= 15
  np.testing.assert_allclose(levels * np.abs(down).max(1, keepdims=True) / 7, down, atol=1e-6)
  assert made["bytes"] == (path / "export/model.safetensors").stat().st_size


def test_the_integers_of_training_are_exported_by_default(run):
  path, c, made = run
  options = dataclasses.replace(c.export, dir=str(path / "int4"), quant="")
  packed = export.run(dataclasses.replace(c, export=options), path / "run")
  assert packed["bytes"] < 0.5 * made["bytes"]  # the embedding table is in float32
  assert "kl_to_float" not in packed
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  of_run, of_folder = (
    loading.open_source(config.StudentOptions(source=source)).load(mesh, jax.random.key(0)).model
    for source in (f"run:{path / 'run'}", str(path / "int4"))
  )
  jax.tree.map(np.testing.assert_array_equal, of_run, of_folder)


def test_adapters_and_integers_are_refused(run):
  path, _, _ = run
  c = tiny.tiny(path)
  c.teacher.source = ""
  c.student.train, c.student.quantise.grid, c.student.lora.rank = "quantised", "int8", 2
  with pytest.raises(
    InputError, match=r"student.train is .quantised.; expected .* because student.lora is set"
  ):
    train(config.resolve(c), path / "refused")
