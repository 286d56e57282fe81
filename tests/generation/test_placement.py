"""Weights are gathered once where they fit: the same texts, and no gather per token."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow
from decoding import COMPUTE, DRAWN, GREEDY, SIZE, copied, prompts, random_model

from distill_jax import config
from distill_jax.generation import placement
from distill_jax.generation.engine import Engine, EngineSpec, RowState, decode_steps
from distill_jax.generation.options import DecodingOptions
from distill_jax.generation.unrolled import cache_shapes, unrolled_shapes
from distill_jax.models import llama, runs
from distill_jax.nn import sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.preflight import collectives

STEPS = 8
OPTIONS = DecodingOptions(cache_len=SIZE, batch_size=4, prefill_rows=4)


def placed(model, mesh, gather):
  spread = jax.device_put(copied(model), sharding.shardings(model, mesh, COMPUTE.rules))
  with jax.set_mesh(mesh):
    return placement.place(spread, COMPUTE, mesh, dataclasses.replace(OPTIONS, gather=gather))


@pytest.mark.parametrize("family", ["llama", slow.param("deepseek_v3")])
def test_texts_and_records_are_equal_bit_for_bit(family):
  model, read = random_model(family), prompts(256, (3, 9, 14))
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2)
  got = {}
  for gather in ("per_token", "once"):
    unrolled = placed(model, mesh, gather)
    with jax.set_mesh(mesh):
      spec = EngineSpec(COMPUTE, DRAWN, 4, (), 256, config.RecordsOptions(n=15))
      engine = Engine(unrolled, mesh, spec, 4, 4, SIZE, runs.keys(3))
    got[gather] = decoding.run(engine, mesh, read, rows=4, fill=4)
  for key, s in got["per_token"].items():
    other = got["once"][key]
    assert (other.tokens, other.logps) == (s.tokens, s.logps)
    for name, x in s.records.items():
      np.testing.assert_array_equal(np.array(other.records[name]), np.array(x), name)


def compiled_bytes(mesh, slots):
  """Returns the bytes of weights and caches, and by column the bytes gathered in each step."""
  compute = ComputeConfig("bfloat16")
  c = dataclasses.replace(llama.TINY, hidden_size=128, intermediate_size=512, vocab_size=2_048)
  model = jax.eval_shape(lambda key: llama.Model(c, key), jax.random.key(0))
  need = placement.memory(model, compute, mesh, dataclasses.replace(OPTIONS, cache_len=slots))
  whole = sharding.replicated(mesh)
  shape_of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
  rows = RowState(*(shape_of(jnp.int32, 4),) * 6).replace(alive_B=shape_of(bool, 4))
  keys = {"generate": shape_of(jax.eval_shape(jax.random.key, 0).dtype)}
  spec = EngineSpec(compute, GREEDY, STEPS, (), c.vocab_size)
  result = {"need": need._asdict()}
  for column in ("storage", "compute"):
    model_shapes = unrolled_shapes(model, compute, mesh, column)
    cache = cache_shapes(model_shapes, 4, slots, compute, mesh)
    with jax.set_mesh(mesh):
      where = jax.tree.map(lambda x: x.sharding, cache), whole
      step = jax.jit(functools.partial(decode_steps, spec=spec), out_shardings=where)
      compiled = step.lower(model_shapes, cache, rows, keys).compile()
    sent = collectives.HloText(compiled.as_text()).sent()
    result[column] = {
      "sent": sum(n for kind, n in sent.items() if "all-gather" in kind) / STEPS,
      "arguments": compiled.memory_analysis().argument_size_in_bytes,
    }
  return result


def check_compiled(r, gathers):
  """Checks the bytes, given the number of times that a step of the old way gathers all weights."""
  need = r["need"]
  each = need["gathered"] - need["stored"]
  assert each > 400_000
  assert r["storage"]["sent"] > 0.9 * each * gathers
  assert r["compute"]["sent"] < 100  # the chosen tokens
  cache = need["cache"]  # the layouts of small arguments are padded
  assert r["storage"]["arguments"] == pytest.approx(need["stored"] + cache, rel=0.1)
  assert r["compute"]["arguments"] == pytest.approx(need["gathered"] + cache, rel=0.1)


def test_no_weights_are_gathered_in_a_step():
  """The compiler for CPUs moves the gathers of the old way out of the loop of 8 steps."""
  check_compiled(compiled_bytes(sharding.make_mesh(fsdp=2, tensor=2), SIZE), gathers=1 / STEPS)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_no_weights_are_gathered_in_a_step_on_tpus():
  script = """if True:
    from distill_jax.preflight import topology
    topology.prepare()
    import json, test_placement
    from distill_jax.nn.sharding import MeshOptions
    mesh = topology.make_mesh(MeshOptions(fsdp=2, tensor=2), "v5e:2x2")
    print(json.dumps(test_placement.compiled_bytes(mesh, slots=256)))"""
  folders = [str(Path(__file__).parent), *filter(None, sys.path)]
  env = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
  run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
  assert run.returncode == 0, run.stderr
  check_compiled(json.loads(run.stdout.splitlines()[-1]), gathers=1)


@pytest.mark.parametrize("limit, once", [(0, False), (2**20, True), (1_000, False)])
def test_auto_gathers_once_if_it_fits(limit, once, monkeypatch, capsys):
  placement._print_once.cache_clear()
  model, mesh = random_model(), sharding.make_mesh(fsdp=4)
  monkeypatch.setattr(placement, "_memory_to_decode", lambda mesh, model: limit)
  need = placement.memory(model, COMPUTE, mesh, OPTIONS)
  unrolled = placed(model, mesh, "auto")
  assert placement.bytes_per_device(unrolled) == (need.gathered if once else need.stored)
  assert need.stored < need.gathered < need.gathered_once < 0.9 * 2**20
  told = capsys.readouterr().err
  reason = (
    "" if once else "do not report" if limit == 0 else "0.0 GiB of 0.0 GiB that are left per device"
  )
  assert reason in told and bool(told) != once


def test_other_arrays_leave_less_memory():
  """In training, the state and the teachers are in memory, and a copy of the student."""
  GiB, mesh = placement.GiB, types.SimpleNamespace(local_devices=[])

  def gib_left(*stats):
    mesh.local_devices = [types.SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
    return placement._memory_to_decode(mesh, 2 * GiB) / GiB

  assert gib_left({"bytes_limit": 16 * GiB, "bytes_in_use": 2 * GiB}) == 16
  training = {"bytes_limit": 16 * GiB, "bytes_in_use": 7 * GiB}
  assert gib_left(training) == 11
  assert gib_left(training, {"bytes_limit": 16 * GiB, "bytes_in_use": 9 * GiB}) == 9
  assert gib_left({"bytes_limit": 16 * GiB}) == 16
  assert gib_left(None) == 0


def test_one_group_of_devices_has_nothing_to_gather(capsys):
  placed(random_model(), sharding.make_mesh(fsdp=1, tensor=2, devices=jax.devices()[:2]), "auto")
  assert capsys.readouterr().err == ""


def test_rows_are_rounded_up_to_the_devices():
  options = placement.divisible(DecodingOptions(), sharding.make_mesh(data=2, fsdp=2))
  assert (options.batch_size, options.prefill_rows) == (32, 4)
  options = DecodingOptions(batch_size=5, prefill_rows=1)
  options = placement.divisible(options, sharding.make_mesh(data=2, fsdp=2))
  assert (options.batch_size, options.prefill_rows) == (8, 4)
