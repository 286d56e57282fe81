"""A small training step, batches for it, and three steps of it: for tests of several packages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import config
from distill_jax.losses import SampledTargets, ce, kd
from distill_jax.models import llama
from distill_jax.nn import sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.schedules import constant
from distill_jax.training import optim
from distill_jax.training.step import Step
from distill_jax.types import Batch, Inputs

B, T, K, V = 8, 16, 5, llama.TINY.vocab_size


def make_batch(seed: int = 0) -> Batch:
  """Two documents a row, uneven masks, targets that sum to 1."""
  rng = np.random.default_rng(seed)
  cut = rng.integers(4, T - 4, B)
  t_BT = np.broadcast_to(np.arange(T), (B, T))
  second = t_BT >= cut[:, None]
  positions = np.where(second, t_BT - cut[:, None], t_BT)
  mask = (t_BT != cut[:, None] - 1) & (t_BT < rng.integers(T // 2, T, B)[:, None])
  weight = rng.dirichlet(np.ones(K), (B, T))
  ids = np.sort(rng.permuted(np.tile(np.arange(V), (B * T, 1)), axis=1)[:, :K]).reshape(B, T, K)
  targets = SampledTargets(
    ids_BTK=jnp.asarray(ids, jnp.int32),
    weight_BTK=jnp.asarray(weight, jnp.float32),
    entropy_BT=jnp.asarray(-(weight * np.log(weight)).sum(-1), jnp.float32),
  )
  tokens = rng.integers(0, V, (B, T))
  inputs = Inputs(*(jnp.asarray(x, jnp.int32) for x in (tokens, positions, second + 1)))
  labels = jnp.asarray(np.roll(tokens, -1, 1), jnp.int32)
  return Batch(inputs, labels, jnp.asarray(mask), {"teacher": targets})


def make_step(**changes) -> Step:
  o = config.OptimOptions(peak_lr=1e-2, warmup_steps=2)
  step = Step(
    losses={"soft": kd.Loss(weight=constant(0.7)), "hard": ce.Loss(weight=constant(0.3))},
    learning_rate=optim.learning_rate(o, 10),
    optimizer=optim.optimizer(o),
    student=ComputeConfig(),
    teacher=ComputeConfig(),
    chunk=5,
  )
  return dataclasses.replace(step, **changes)


def run(step: Step, mesh_shape=(1, 1, 1), steps: int = 3, batches=None, online=False):
  batches = batches or [make_batch(n) for n in range(steps)]
  devices = jax.devices()[: int(np.prod(mesh_shape))]
  mesh = sharding.make_mesh(*mesh_shape, devices=devices)
  with jax.set_mesh(mesh):
    init = lambda key: step.init(llama.Model(llama.TINY, key))
    where = sharding.shardings(jax.eval_shape(init, jax.random.key(0)), mesh, step.student.rules)
    state = jax.jit(init, out_shardings=where)(jax.random.key(0))
    step_fn = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
    teachers = {}
    if online:
      make = lambda key: llama.Model(llama.TINY, key)
      like = jax.eval_shape(make, jax.random.key(1))
      theirs = sharding.shardings(like, mesh, step.teacher.rules)
      teachers["teacher"] = jax.jit(make, out_shardings=theirs)(jax.random.key(1))
    rows = []
    for batch in batches:
      batch = jax.device_put(batch, sharding.batch_sharding(mesh))
      state, metrics = step_fn(state, batch, teachers)
      rows.append({k: float(v) for k, v in metrics.items()})
  return jax.device_get(state), rows
