"""The parts of tools/bench/gpu.py, whose docstring describes them. Each runs in its own process.

  python tools/gpu_parts.py step [--small]

The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distill_jax import config
from distill_jax.evals import next_token
from distill_jax.generation.engine import Engine, EngineSpec, RowState
from distill_jax.generation.sampling import Sampling
from distill_jax.generation.unrolled import Unrolled, unroll
from distill_jax.losses import DenseTargets, ce, kd
from distill_jax.models import loading, qwen2, runs
from distill_jax.models.loading import LoadedModel, ModelSource
from distill_jax.models.options import StudentOptions
from distill_jax.nn import attention, fused_head, sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.preflight import flops
from distill_jax.records.teacher_pass import TeacherPass
from distill_jax.schedules import constant
from distill_jax.training import optim
from distill_jax.training.step import Step
from distill_jax.types import Batch, Inputs, Mean

sys.path.insert(0, str(Path(__file__).parent / "bench"))
from step import batch_of  # noqa: E402

# Dense bfloat16 operations and bytes of memory per second, from NVIDIA's data sheets (SXM).
PEAKS = {
  "A100": (312e12, 2.0e12),
  "H100": (989e12, 3.35e12),
  "H200": (989e12, 4.8e12),
  "B200": (2250e12, 8.0e12),
}
ROUNDS, POINTS = 5, 63
Figures = dict[str, Any]


def card() -> tuple[str, float | None, float | None]:
  """Returns the device's name, its operations and its bytes of memory per second."""
  name = jax.devices()[0].device_kind
  known = next((peaks for key, peaks in PEAKS.items() if key in name), (None, None))
  return name, *known


def seconds_of(function: Callable[[], Any], rounds: int = ROUNDS) -> float:
  """Returns the median seconds of a call whose result is awaited; a first call compiles."""
  jax.block_until_ready(function())
  taken = []
  for _ in range(rounds):
    start = time.perf_counter()
    jax.block_until_ready(function())
    taken.append(time.perf_counter() - start)
  return statistics.median(taken)


def mfu(flops: float, seconds: float) -> Figures:
  peak = card()[1]
  return {"mfu": flops / seconds / peak} if peak else {}


def model_source(shape: str, small: bool, **changes: Any) -> ModelSource:
  """Returns a Qwen2 model with random weights, as a config would name it."""
  shape, dtype = ("tiny", "float32") if small else (shape, "bfloat16")
  options = StudentOptions(family="qwen2", shape=shape, dtype=dtype, **changes)
  return loading.open_source(options, seed=0)


def load(source: ModelSource) -> LoadedModel:
  return source.load(sharding.make_mesh(devices=jax.devices()[:1]), jax.random.key(0))


def by_kind(measure: Callable[[str, bool], Figures], kinds: Sequence[str], small: bool) -> Figures:
  """Returns the figures of each kind, whose memory is free before the next one begins."""
  return {f"{kind}.{key}": x for kind in kinds for key, x in measure(kind, small).items()}


def kernels(small: bool) -> Figures:
  T, H, G, h, document = (64, 4, 2, 16, 16) if small else (8_192, 12, 2, 128, 1_024)
  rng = np.random.default_rng(0)
  edges = np.cumsum(rng.integers(document // 2, 3 * document // 2, 2 * T // document))
  segments_1T = jnp.asarray(np.searchsorted(edges, np.arange(T), "right")[None] + 1, jnp.int32)
  arrays = [jax.random.normal(jax.random.key(i), (1, T, n, h)) for i, n in enumerate((H, G, G, H))]
  q, k, v, out_grad = (x.astype(jnp.float32 if small else jnp.bfloat16) for x in arrays)
  found: Figures = {}
  outputs: dict[str, jax.Array] = {}
  for kernel in ("xla",) if jax.default_backend() == "cpu" else ("xla", "cudnn", "cudnn_packed"):

    def both(q, k, v, kernel=kernel):
      run = functools.partial(attention.attention, segments_BT=segments_1T, kernel=kernel)
      out, backward = jax.vjp(run, q, k, v)
      return out, backward(out_grad)

    program = jax.jit(both)
    found[f"{kernel}.milliseconds"] = 1e3 * seconds_of(lambda p=program: p(q, k, v))
    outputs[kernel] = program(q, k, v)[0].astype(jnp.float32)
  for kernel, out in outputs.items():
    found[f"{kernel}.over_xla"] = found[f"{kernel}.milliseconds"] / found["xla.milliseconds"]
    found[f"{kernel}.largest_difference"] = float(jnp.max(jnp.abs(out - outputs["xla"])))
  return found


def parity(small: bool) -> Figures:
  config = qwen2.TINY if small else qwen2.CONFIGS["qwen2.5-1.5b"]
  config = config.keep_layers(range(min(4, config.num_hidden_layers)))
  T = 32 if small else 256
  rng = np.random.default_rng(0)
  tokens_1T = rng.integers(0, config.vocab_size, (1, T)).astype(np.int32)
  labels_1T = np.roll(tokens_1T, -1, 1)
  model = jax.device_get(qwen2.Model(config, jax.random.key(0)))

  def loss(model, compute):
    inputs = Inputs(tokens_1T, np.arange(T, dtype=np.int32)[None], np.ones_like(tokens_1T))
    out = model(inputs, compute)
    logits_BTV = jnp.einsum(
      "BTD,VD->BTV", out.hidden_BTD, out.head_VD, preferred_element_type=jnp.float32
    )
    logp_BTV = jax.nn.log_softmax(logits_BTV)
    return -jnp.mean(jnp.take_along_axis(logp_BTV, labels_1T[..., None], -1)), logp_BTV

  def run(device, dtype):
    compute = ComputeConfig(dtype=dtype, attention="xla" if device.platform == "cpu" else "auto")
    program = jax.jit(jax.value_and_grad(functools.partial(loss, compute=compute), has_aux=True))
    (value, logp_BTV), grads = jax.device_get(program(jax.device_put(model, device)))
    flat = np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(grads)])
    return value, np.asarray(logp_BTV, np.float64), flat

  value, logp, grad = run(jax.devices("cpu")[0], "float32")
  here_value, here_logp, here_grad = run(jax.devices()[0], "bfloat16")
  cosine = grad @ here_grad / np.linalg.norm(grad) / np.linalg.norm(here_grad)
  return {
    "kl": float((np.exp(logp) * (logp - here_logp)).sum(-1).mean()),
    "loss_difference": float(abs(value - here_value)),
    "gradient_angle_degrees": float(np.degrees(np.arccos(min(1.0, cosine)))),
    "gradient_norm_ratio": float(np.linalg.norm(here_grad) / np.linalg.norm(grad)),
  }


def step(small: bool) -> Figures:
  return by_kind(_step, ("records", "online"), small)


def _step(kind: str, small: bool) -> Figures:
  B, T = (2, 32) if small else (4, 2_048)
  source = model_source("qwen2.5-1.5b", small, remat="full")
  student, vocab_size = load(source), source.decoder_config.vocab_size
  operations = 3 * flops.forward_flops(source, B, T).total
  batch, teachers, compute = batch_of(vocab_size, B, T), {}, student.compute
  if kind == "online":
    teacher_source = model_source("qwen2.5-7b", small, param_dtype="bfloat16")
    teacher = load(teacher_source)
    operations += flops.forward_flops(teacher_source, B, T).total
    batch = batch.replace(targets={})
    teachers, compute = {"teacher": teacher.model}, teacher.compute
  o = config.OptimOptions()
  made = Step(
    losses={"soft": kd.Loss(weight=constant(0.7)), "hard": ce.Loss(weight=constant(0.3))},
    learning_rate=optim.learning_rate(o, 1000),
    optimizer=optim.optimizer(o),
    student=student.compute,
    teacher=compute,
    chunk=T // 8,
    vocab_size=vocab_size,
  )
  state = made.init(student.model)
  del student
  program = jax.jit(made, donate_argnums=0).lower(state, batch, teachers).compile()

  def run() -> jax.Array:
    nonlocal state
    state, metrics = program(state, batch, teachers)
    return metrics["loss"]

  taken = seconds_of(run)
  found = {"seconds": taken, "tokens_per_second": B * T / taken, **mfu(operations, taken)}
  if peak := (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"):
    found["peak_bytes"] = peak
  return found


def record(small: bool) -> Figures:
  B, T = (2, 32) if small else (8, 2_048)
  source = model_source("qwen2.5-7b", small, param_dtype="float32" if small else "bfloat16")
  teacher = load(source)
  c, chunk = source.decoder_config, T // 8
  options = config.RecordsOptions(n=POINTS, batch_size=B, chunk=chunk)
  targets = TeacherPass(options, teacher.compute, c.vocab_size).targets
  batch, index_B = batch_of(c.vocab_size, B, T).replace(targets={}), jnp.arange(B, dtype=jnp.int32)
  plain = jax.jit(functools.partial(next_token.score, compute=teacher.compute, chunk=chunk))
  recorded, key = jax.jit(targets), jax.random.key(0)
  alone = seconds_of(lambda: plain(teacher.model, batch))
  # The ids go to the host, as when a store is written.
  whole = seconds_of(lambda: jax.device_get(recorded(teacher.model, key, batch, index_B)))
  stored = jax.device_get(recorded(teacher.model, key, batch, index_B))
  assert all(np.all(np.isfinite(x)) for x in stored.values())
  return {
    "seconds": whole,
    "over_plain_pass": whole / alone,
    "tokens_per_second": B * T / whole,
    **mfu(flops.forward_flops(source, B, T).total, whole),
  }


def decode(small: bool) -> Figures:
  jax.set_mesh(mesh := sharding.make_mesh(devices=jax.devices()[:1]))
  source = model_source("qwen2.5-1.5b", small, param_dtype="float32" if small else "bfloat16")
  loaded = load(source)
  model = unroll(loaded.model, loaded.compute)
  vocab_size, compute = source.decoder_config.vocab_size, loaded.compute
  found: Figures = {}
  for rows in (1, 4 if small else 64):
    new = _decode(rows, model, compute, vocab_size, mesh, small)
    found |= {f"{rows}_rows.{key}": value for key, value in new.items()}
  return found


def _decode(
  rows: int, model: Unrolled, compute: ComputeConfig, vocab_size: int, mesh: Mesh, small: bool
) -> Figures:
  prompt, calls, per_call = (8, 2, 4) if small else (512, 8, 32)
  size = prompt + (ROUNDS + 1) * calls * per_call
  spec = EngineSpec(compute, Sampling(0.0), per_call, (), vocab_size)
  engine = Engine(model, mesh, spec, rows, rows, size, runs.keys(0))
  tokens = np.random.default_rng(0).integers(0, vocab_size, (rows, prompt)).astype(np.int32)
  index = np.arange(rows, dtype=np.int32)
  zero, last = 0 * index, 0 * index + prompt - 1
  state = RowState(tokens[:, -1], last, zero + size, index >= 0, index, zero)

  def run() -> None:
    nonlocal state
    for _ in range(calls):
      new = engine.decode(state)["token"]
      assert (new >= 0).all()
      state = state.replace(token_B=new[-1], position_B=state.position_B + len(new))

  start = time.perf_counter()
  engine.prefill(tokens[:, :-1], zero, last)
  engine.insert(index, index)
  run()
  begun = time.perf_counter() - start
  taken = seconds_of(run, ROUNDS - 1) / (calls * per_call)
  found = {"tokens_per_second": rows / taken, "seconds_to_compile_and_begin": begun}
  if peak := card()[2]:
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(engine._cache))
    filled = (prompt + calls * per_call * (ROUNDS + 1) / 2) / size  # mean share of the cache
    read = sum(x.nbytes for x in jax.tree.leaves(model)) + cache_bytes * filled
    found["share_of_memory_bound"] = read / peak / taken
  return found


def head(small: bool) -> Figures:
  return by_kind(_head, ("records", "online"), small)


def _head(kind: str, small: bool) -> Figures:
  B, T, D, V = (2, 32, 16, 96) if small else (2, 2_048, 1_536, 151_936)
  dtype = jnp.float32 if small else jnp.bfloat16
  keys = jax.random.split(jax.random.key(0), 4)
  hidden_BTD, taught_BTD = (jax.random.normal(k, (B, T, D)).astype(dtype) for k in keys[:2])
  head_VD, taught_VD = ((jax.random.normal(k, (V, D)) / D**0.5).astype(dtype) for k in keys[2:])
  batch = batch_of(V, B, T)
  if kind == "online":
    dense = DenseTargets(hidden_BTD=taught_BTD, head_VD=taught_VD)
    batch = batch.replace(targets={"teacher": dense})

  def losses(logits_BCV: jax.Array, batch: Batch) -> tuple[jax.Array, dict]:
    total = jnp.zeros(())
    for weight, loss in ((0.7, kd.Loss()), (0.3, ce.Loss())):
      values_BC = loss.token_loss(logits_BCV, batch, jnp.zeros((), jnp.int32))
      total += weight / (B * T) * Mean.of(values_BC, batch.mask_BT).total
    return total, {}

  def fused(hidden_BTD: jax.Array, head_VD: jax.Array, batch: Batch) -> jax.Array:
    return fused_head.loss(losses, hidden_BTD, head_VD, batch, T // 8)[0]

  def products(hidden_BTD: jax.Array, head_VD: jax.Array, batch: Batch) -> tuple:
    logits = functools.partial(jnp.einsum, "BTD,VD->BTV", preferred_element_type=jnp.float32)
    z_BTV = logits(hidden_BTD, head_VD)
    if kind == "online":
      z_BTV += logits(taught_BTD, taught_VD)
    z_BTV = z_BTV.astype(dtype)
    grad_VD = jnp.einsum("BTV,BTD->VD", z_BTV, hidden_BTD)
    return jnp.einsum("BTV,VD->BTD", z_BTV, head_VD), grad_VD

  made = jax.jit(jax.value_and_grad(fused, argnums=(0, 1))), jax.jit(products)
  ours, least = (seconds_of(lambda f=f: f(hidden_BTD, head_VD, batch)) for f in made)
  return {"seconds": ours, "over_products": ours / least}


PARTS = {f.__name__: f for f in (kernels, parity, step, record, decode, head)}

if __name__ == "__main__":
  parser = argparse.ArgumentParser()
  parser.add_argument("part", choices=PARTS)
  parser.add_argument("--small", action="store_true", help="tiny shapes, to check the script")
  args = parser.parse_args()
  print(json.dumps({"device": card()[0], **PARTS[args.part](args.small)}))
