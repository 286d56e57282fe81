"""Small random decoders and their samples, for tests of the engine, the scheduler and the cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.generation.engine import Engine, EngineSpec
from distill_jax.generation.options import DecodingOptions
from distill_jax.generation.sampling import Sampling
from distill_jax.generation.scheduler import Scheduler, Task
from distill_jax.generation.stops import Stops
from distill_jax.generation.unrolled import unroll
from distill_jax.models import runs
from distill_jax.nn import layers, sharding
from distill_jax.nn.params import map_params
from distill_jax.registry import load as load_module

SIZE, NEW, COMPUTE = 40, 20, layers.ComputeConfig()
GREEDY, DRAWN = Sampling(0.0), Sampling(0.9, top_p=0.9)
MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}


class Numbers:
  """A tokenizer whose text is the ids."""

  kind, raw = "huggingface", b'{"decoder": null}'

  def decode(self, ids):
    return " ".join(map(str, ids))


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


def prompts(vocab: int, lengths=(1, 5, 9, 17, 20)) -> dict[int, list[int]]:
  rng = np.random.default_rng(0)
  return {i: rng.integers(0, vocab, n).tolist() for i, n in enumerate(lengths)}


def copied(model):
  return map_params(lambda v: v.replace(jnp.copy(v[...])), model)


@functools.cache
def random_model(family: str = "llama", **changes):
  module = load_module("models", family)
  c = dataclasses.replace(module.TINY, **changes).keep_layers((0, 1))
  return jax.jit(lambda key: module.Model(c, key))(jax.random.key(1))


def engine_of(model, mesh, sampling, rows=3, fill=2, eos=(), records=None, cache_dtype=""):
  """Returns an engine for a copy of a model, which can be used again."""
  with jax.set_mesh(mesh):
    vocab_size = model.config.vocab_size
    spec = EngineSpec(COMPUTE, sampling, 4, eos, vocab_size, records, cache_dtype)
    unrolled = unroll(copied(model), COMPUTE)
    return Engine(unrolled, mesh, spec, rows, fill, SIZE, runs.keys(3))


def run(engine, mesh, read, wanted=None, rows=3, fill=2, eos=(), stops=None):
  """Decodes samples of prompts in chunks of 8 tokens, and returns them by (prompt, sample)."""
  wanted = wanted or [(p, 0) for p in read]
  options = DecodingOptions(cache_len=SIZE, batch_size=rows, prefill_rows=fill, prefill_chunk=8)
  scheduler = Scheduler(engine, stops or Stops(Numbers()), eos, options, NEW)
  tasks = [Task(p, s, read[p]) for p, s in wanted]
  with jax.set_mesh(mesh):
    done = [s for finished, _ in scheduler.run(tasks) for s in finished]
  assert sorted(s.key for s in done) == sorted(wanted)
  return {s.key: s for s in done}


def decode(model, mesh, sampling, read, wanted=None, rows=3, fill=2, records=None, cache_dtype=""):
  engine = engine_of(model, mesh, sampling, rows, fill, records=records, cache_dtype=cache_dtype)
  return run(engine, mesh, read, wanted, rows, fill)
