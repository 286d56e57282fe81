"""What the backward pass recomputes: by the policy's name, and never by XLA's own choice."""

import functools
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow
import steps as training_steps
import tiny
from jax.experimental.compilation_cache import compilation_cache

from distill_jax import registry
from distill_jax.errors import InputError
from distill_jax.models import llama
from distill_jax.nn import layers, sharding
from distill_jax.types import Inputs

XLA_GAVE_UP = "Involuntary full rematerialization"


@functools.cache
def gradient(remat: str):
  model = jax.jit(lambda key: llama.Model(llama.TINY, key))(jax.random.key(0))
  inputs = Inputs(*(jnp.asarray(np.tile(np.arange(16), (2, 1)), jnp.int32),) * 3)
  inputs = inputs.replace(segments_BT=jnp.ones_like(inputs.segments_BT))
  loss = lambda m: jnp.sum(m(inputs, layers.ComputeConfig(remat=remat)).hidden_BTD ** 2)
  return jax.jit(jax.grad(loss))(model)


@pytest.mark.parametrize("remat", [r for r in layers.REMAT if r != "none"])
def test_remat_does_not_change_gradients(remat):
  for got, want in zip(
    jax.tree.leaves(gradient(remat)), jax.tree.leaves(gradient("none")), strict=True
  ):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())


def test_an_unknown_policy_is_refused():
  with pytest.raises(InputError, match="remat is 'some'; expected one of none, full"):
    gradient("some")


TPU = """
from distill_jax.preflight import topology
topology.prepare()
import json, jax, jax.numpy as jnp
from distill_jax.nn import layers, sharding
from distill_jax.nn.sharding import MeshOptions
from distill_jax.models import llama
from distill_jax.types import Inputs
mesh = topology.make_mesh(MeshOptions(fsdp=2, tensor=2), "v5e:2x2")
rows = jax.ShapeDtypeStruct((8, 256), jnp.int32, sharding=sharding.batch_sharding(mesh))
host = {}
for remat in ("dots", "offload"):
  compute = layers.ComputeConfig("bfloat16", remat=remat)
  like = jax.eval_shape(lambda key: llama.Model(llama.TINY, key), jax.random.key(0))
  where = sharding.shardings(like, mesh, compute.rules)
  loss = lambda m, x: jnp.sum(m(x, compute).hidden_BTD.astype(jnp.float32) ** 2)
  with jax.set_mesh(mesh):
    step = jax.jit(jax.grad(loss), out_shardings=where)
    compiled = step.lower(sharding.with_shardings(like, where), Inputs(rows, rows, rows)).compile()
  host[remat] = compiled.memory_analysis().host_temp_size_in_bytes
print(json.dumps(host))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_offload_stores_products_in_host_memory_on_a_tpu():
  """A CPU has no separate host memory, so this compiles for four v5e chips."""
  done = subprocess.run([sys.executable, "-c", TPU], capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-2000:]
  host = json.loads(done.stdout.splitlines()[-1])
  c, positions, bf16 = llama.TINY, 8 * 256 // 2, 2
  # At least the two products of the gated feed-forward in each layer.
  assert host["offload"] >= c.num_hidden_layers * positions * 2 * c.intermediate_size // 2 * bf16
  assert host["dots"] == 0


def compile_step(family: str, shape: str, rules: sharding.Rules, mesh_shape) -> None:
  """Compiles a whole training step for four devices."""
  module = registry.load("models", family)
  mesh = sharding.make_mesh(*mesh_shape)
  step = training_steps.make_step(student=layers.ComputeConfig(rules=rules))
  init = lambda key: step.init(module.Model(module.CONFIGS[shape], key))
  like = jax.eval_shape(init, jax.random.key(0))
  where = sharding.shardings(like, mesh, rules)
  rows = sharding.batch_sharding(mesh)
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), training_steps.make_batch()
  )
  with jax.set_mesh(mesh):
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
    jitted.lower(sharding.with_shardings(like, where), batch, {}).compile()


@pytest.fixture
def compiled_afresh():
  """XLA prints no warnings for a program from the cache."""
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()  # jax checks only once whether the cache is used
  yield
  jax.config.update("jax_enable_compilation_cache", True)
  compilation_cache.reset_cache()


@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize(
  "family",
  # The layout of the matrices is llama's in the slow ones.
  slow.all_but(
    (("llama", "tiny"), ("deepseek_v3", "tiny"), ("qwen3", "tiny-moe")),
    [f for f in tiny.decoder_shapes() if f[1] in ("tiny", "tiny-moe")],
  ),
  ids=" ".join,
)
def test_xla_partitions_a_step_without_replication(family, capfd):
  """XLA prints a warning on stderr if it must replicate an array to change its sharding."""
  compile_step(*family, sharding.Rules(), (1, 2, 2))
  assert XLA_GAVE_UP not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize("mesh_shape", [(1, 1, 2, 2), (1, 2, 1, 2)])
@pytest.mark.parametrize("family", [("llama", "tiny"), ("deepseek_v3", "tiny")], ids=" ".join)
def test_a_context_axis_causes_no_replication(family, mesh_shape, capfd):
  compile_step(*family, sharding.Rules(), mesh_shape)
  assert XLA_GAVE_UP not in capfd.readouterr().err


@pytest.mark.usefixtures("compiled_afresh")
def test_replication_would_be_detected(capfd):
  """Looking up a table that is sharded like the batch, which the rule `table` avoids."""
  both = ("fsdp", "tensor")
  table = sharding.TABLE | {"vocab": (None, None), "table": (both, both)}
  compile_step("llama", "tiny", sharding.Rules(tuple(table.items())), (1, 2, 2))
  assert XLA_GAVE_UP in capfd.readouterr().err
