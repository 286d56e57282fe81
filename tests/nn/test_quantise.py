"""Integer weights: the grid beside torch's own, the gradient, a run, its export."""

import functools

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
from distill_jax.nn import params, quantise, sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.nn.quantise import QuantiseOptions
from distill_jax.runtime.workdir import Workdir
from distill_jax.training.loop import train
from distill_jax.training.metric_writer import read_metrics
from distill_jax.types import Inputs

KINDS = {
  "llama": (llama, llama.TINY),
  "experts": (qwen3, qwen3.CONFIGS["tiny-moe"]),
  "latent": (deepseek_v3, deepseek_v3.TINY),
}
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


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [0, 8])
@pytest.mark.parametrize("name", KINDS)
def test_rounding_matches_torch(name, bits, group):
  """Compares each row, or group of a row, with torch's fake quantisation."""
  model, spec, most = random_model(name), QuantiseOptions(bits, group), 2 ** (bits - 1) - 1
  done = dict(params.named_params(quantised_tree(model, spec)))
  quantised = 0
  for path, v in params.named_params(model):
    if not quantise.is_quantised(v):
      np.testing.assert_array_equal(done[path][...], v[...])
      continue
    quantised += 1
    w_NOI = torch.tensor(theirs(v))
    rows = w_NOI.reshape(-1, group or w_NOI.shape[-1])
    scale = rows.abs().amax(1) / most
    zero = torch.zeros(len(rows), dtype=torch.int32)
    want = torch.fake_quantize_per_channel_affine(rows, scale, zero, 0, -most, most)
    got = theirs(done[path]).reshape(rows.shape)
    # where torch multiplies by 1/s and we divide by s, a tie may fall on the other side
    near = np.abs(got - want.numpy()) <= 1e-6 * np.abs(want.numpy())
    assert near.mean() > 0.999 and np.abs(got - want.numpy()).max() <= 1.01 * scale.max().item()
  assert quantised >= 7
  assert not any(quantise.is_quantised(v) for p, v in params.named_params(model) if "router" in p)


def test_the_gradient_passes_the_rounding():
  model = random_model("llama")
  tokens = np.random.default_rng(1).integers(0, 256, (2, 9))
  inputs = Inputs(tokens, jnp.broadcast_to(jnp.arange(9), (2, 9)), jnp.ones_like(tokens))
  loss = lambda m, compute: jnp.sum(jnp.sin(m(inputs, compute).hidden_BTD))
  spec = QuantiseOptions(4, 8)
  gradient = jax.jit(jax.grad(loss), static_argnums=1)
  got = gradient(model, ComputeConfig(quantise=spec))
  want = gradient(quantised_tree(model, spec), ComputeConfig())  # as if those were the weights
  for (path, a), (_, b) in zip(params.named_params(got), params.named_params(want), strict=True):
    np.testing.assert_allclose(a[...], b[...], rtol=1e-4, atol=1e-4, err_msg=path)


def test_invalid_quantise_options_are_refused():
  model = random_model("llama")
  with pytest.raises(InputError, match=r"quantise.bits is 3; expected 4, 8, or 0"):
    quantise.check(QuantiseOptions(3), model)
  with pytest.raises(
    InputError, match=r"group is 12; expected a divisor of 64, the number of inputs of layers.down"
  ):
    quantise.check(QuantiseOptions(8, 12), model)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A trained student with 4-bit weights."""
  path = tmp_path_factory.mktemp("quantise")
  c = tiny.tiny(path)
  c.teacher.source = ""
  c.student.train, c.student.quantise = "quantised", {"bits": 4, "group": 16}
  c.train.steps = c.train.checkpoint_every = 12
  c.export.dir, c.export.dtype = str(path / "export"), "float32"
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
  mesh = sharding.make_mesh(**vars(c.mesh))
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
  assert made["integer_bytes"] < 4 * made["parameters"]


def test_adapters_and_integers_are_refused(run):
  path, _, _ = run
  c = tiny.tiny(path)
  c.teacher.source = ""
  c.student.train, c.student.quantise.bits, c.student.lora.rank = "quantised", 8, 2
  with pytest.raises(
    InputError, match=r"student.train is .quantised.; expected .* because student.lora is set"
  ):
    train(config.resolve(c), path / "refused")
