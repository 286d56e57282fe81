"""Compares the fused head with materialised logits: memory and time of the loss and its gradient.

  python tools/bench/head.py [--rounds=5] [--cases=d256,d1024,online,length]
  python tools/bench/head.py --cases=v5p

There are 2 sequences of 512 tokens, V=151,936, in float32, with hard labels and 63 sampled targets
per token (for `online`: the hidden states and head of a teacher, D=256). Gradients are with respect
to the hidden states and the head. Every round runs, in varying order:

  fused          fused_head.loss with the losses kd and ce, as in the training step;
  textbook       logits [B, T, V], kd from jax.nn.log_softmax, ce from optax;
  one_softmax    the same with a single log_softmax for both losses;
  same_losses    our kd and ce on logits [B, T, V];
  products       only the three matrix products, on all positions at once, which every head with a
                 gradient needs.

The others than fused use jax.value_and_grad. `time_ratio` is the median over rounds of fused /
textbook, wall clock. `temp_ratio` is the ratio of the temporaries from memory_analysis(). Both are
the maximum over the two D. `NAME.time_ratio` and `NAME.temp_ratio` compare with the other variants.
`length.T=N.temp_bytes` are the temporaries of the fused head by sequence length; they grow by a
copy of the hidden states and their gradient. The last line is a JSON object.

`online.products4.time_ratio` compares with four products, the teacher's logits included. Every
`cpu_ratio` is the `time_ratio` in CPU time of all threads, for machines with other work.

Measured in CPU time on one thread of a machine with other work, medians of 2 to 4 rounds:
0.98 of the products for d1024, 1.17 for d256, and 1.19 of the four products for online.

The case `v5p` compiles for one TPU v5p without running: an online teacher of width 5,120 and a
student of width 4,096 in bfloat16. `v5p.C.hbm_ratio` is the ratio of the bytes that a chunk of C
positions accesses, by the compiler's cost analysis, to those of its four products alone, the sum of
the head's gradient included. It is 1.10, 1.20 and 1.33 for C = 256, 512 and 1,024.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax.losses import DenseTargets, SampledTargets, ce, kd
from distill_jax.nn import fused_head
from distill_jax.types import Batch, Mean

B, T, V, POINTS = 2, 512, 151_936, 63
SOFT, HARD = 0.7, 0.3
# Case: (D, kind of targets, positions of each sequence per chunk).
CASES = {"d256": (256, "sampled", 86), "d1024": (1024, "sampled", 86), "online": (256, "dense", 64)}
RIVALS = ("textbook", "one_softmax", "same_losses")


def problem(D: int, kind: str, T: int = T) -> tuple[jax.Array, jax.Array, Batch]:
  """Returns hidden states, a head that gives logits of about unit size, and a batch."""
  keys = jax.random.split(jax.random.key(0), 7)
  hidden_BTD = jax.random.normal(keys[0], (B, T, D))

  def rows(key):
    return jax.random.normal(key, (V, D)) / D**0.5

  targets: DenseTargets | SampledTargets
  if kind == "dense":
    targets = DenseTargets(hidden_BTD=jax.random.normal(keys[1], (B, T, D)), head_VD=rows(keys[2]))
  else:
    ids = jnp.sort(jax.random.randint(keys[3], (B, T, POINTS), 0, V), -1)
    weight = jax.random.dirichlet(keys[4], jnp.ones(POINTS), (B, T))
    targets = SampledTargets(ids_BTK=ids, weight_BTK=weight, entropy_BT=jnp.ones((B, T)))
  labels = jax.random.randint(keys[5], (B, T), 0, V)
  batch = Batch(None, labels, jnp.ones((B, T), bool), {"teacher": targets})
  return hidden_BTD, rows(keys[6]), batch


def ours(logits_BCV: jax.Array, batch: Batch, count: float) -> tuple[jax.Array, dict]:
  """Returns the weighted sum of the losses as in step.Step, without metrics."""
  total = jnp.zeros(())
  for weight, loss in ((SOFT, kd.Loss()), (HARD, ce.Loss())):
    mean = Mean.of(loss.token_loss(logits_BCV, batch, jnp.zeros((), jnp.int32)), batch.mask_BT)
    total += weight / count * mean.total
  return total, {}


def textbook(logits_BTV: jax.Array, batch: Batch, one_softmax: bool) -> jax.Array:
  """Returns the mean of kd and ce, computed from the log-probabilities of all tokens."""
  logq_BTV = jax.nn.log_softmax(logits_BTV)
  t = batch.targets["teacher"]
  if isinstance(t, DenseTargets):
    logp_BTV = jax.nn.log_softmax(jnp.einsum("BTD,VD->BTV", t.hidden_BTD, t.head_VD))
    soft_BT = jnp.sum(jnp.exp(logp_BTV) * (logp_BTV - logq_BTV), -1)
  else:
    assert isinstance(t, SampledTargets)
    picked_BTK = jnp.take_along_axis(logq_BTV, t.ids_BTK, -1)
    soft_BT = -t.entropy_BT - jnp.sum(t.weight_BTK * picked_BTK, -1)
  if one_softmax:
    hard_BT = -jnp.take_along_axis(logq_BTV, batch.labels_BT[..., None], -1)[..., 0]
  else:
    hard_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch.labels_BT)
  return jnp.mean(SOFT * soft_BT + HARD * hard_BT)


def programs(args: tuple, chunk: int) -> dict[str, Any]:
  """Returns all variants, compiled for the same arguments."""

  def fused(hidden, rows, batch):
    fn = functools.partial(ours, count=batch.mask_BT.size)
    return fused_head.loss(fn, hidden, rows, batch, chunk)[0]

  def materialised(loss: Callable):
    return lambda hidden, rows, batch: loss(
      jnp.einsum("BTD,VD->BTV", hidden, rows, preferred_element_type=jnp.float32), batch
    )

  def products(hidden, rows, batch):
    """Returns a logit, and both gradients of half the squared norm of all logits."""
    del batch
    hidden_XD = hidden.reshape(-1, hidden.shape[-1])  # XLA's CPU products of [B, T, ...] are slower
    z_XV = hidden_XD @ rows.T
    return z_XV[0, 0], (z_XV @ rows, z_XV.T @ hidden_XD)

  losses = {
    "fused": fused,
    "textbook": materialised(functools.partial(textbook, one_softmax=False)),
    "one_softmax": materialised(functools.partial(textbook, one_softmax=True)),
    "same_losses": materialised(lambda z, batch: ours(z, batch, batch.mask_BT.size)[0]),
  }

  def products4(hidden, rows, batch):
    t = batch.targets["teacher"]
    teacher_XV = t.hidden_BTD.reshape(-1, t.hidden_BTD.shape[-1]) @ t.head_VD.T
    return teacher_XV[0, 0], *products(hidden, rows, batch)

  def compile(f):
    return jax.jit(f).lower(*args).compile()

  made = {n: compile(jax.value_and_grad(f, argnums=(0, 1))) for n, f in losses.items()}
  made["products"] = compile(products)
  if isinstance(args[-1].targets["teacher"], DenseTargets):
    made["products4"] = compile(products4)
  return made


def temporaries(program: Any) -> int:
  return program.memory_analysis().temp_size_in_bytes


def check(programs: dict[str, Any], args: tuple) -> None:
  """Checks that all variants return the same loss and gradients."""
  (want, grads) = jax.device_get(programs["fused"](*args))
  for name in RIVALS:
    value, got = jax.device_get(programs[name](*args))
    np.testing.assert_allclose(value, want, rtol=1e-5, err_msg=name)
    for a, b in zip(got, grads, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max(), err_msg=name)


def measure(name: str, rounds: int) -> dict[str, float]:
  D, kind, chunk = CASES[name]
  args = problem(D, kind)
  made = programs(args, chunk)
  check(made, args)  # also warms up
  seconds: dict[str, list[float]] = {n: [] for n in made}
  cpu: dict[str, list[float]] = {n: [] for n in made}
  order = list(made)
  for i in range(rounds):
    for n in order[i % len(order) :] + order[: i % len(order)]:
      start, cpu_start = time.perf_counter(), time.process_time()
      jax.block_until_ready(made[n](*args))
      seconds[n].append(time.perf_counter() - start)
      cpu[n].append(time.process_time() - cpu_start)
  out = {f"{n}.seconds": statistics.median(s) for n, s in seconds.items()}
  out |= {f"{n}.temp_bytes": temporaries(p) for n, p in made.items()}
  for rival in (n for n in made if n != "fused"):
    for key, times in (("time_ratio", seconds), ("cpu_ratio", cpu)):
      pairs = zip(times["fused"], times[rival], strict=True)
      out[f"{rival}.{key}"] = statistics.median(a / b for a, b in pairs)
    if rival in RIVALS:
      out[f"{rival}.temp_ratio"] = temporaries(made["fused"]) / temporaries(made[rival])
  out |= {key: out[f"textbook.{key}"] for key in ("time_ratio", "temp_ratio")}
  return {f"{name}.{key}": value for key, value in out.items()}


def lengths(chunk: int = 64) -> dict[str, float]:
  """Returns the temporaries by sequence length. The programs are compiled but not run."""
  out = {}
  for n in (512, 1024, 2048, 4096):
    args = jax.eval_shape(lambda n=n: problem(256, "sampled", n))

    def fn(h, w, b):
      return fused_head.loss(functools.partial(ours, count=1.0), h, w, b, chunk)[0]

    program = jax.jit(jax.value_and_grad(fn, argnums=(0, 1))).lower(*args).compile()
    out[f"length.T={n}.temp_bytes"] = temporaries(program)
  return out


def v5p() -> dict[str, float]:
  """Returns the bytes that chunks access on a TPU v5p, and their ratios to the products' own."""
  from distill_jax.preflight import topology

  topology.prepare()
  device = jax.sharding.SingleDeviceSharding(topology.devices("v5p:2x2x1")[0])
  D, teacher_D, n = 4096, 5120, 2

  def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

  def bytes_of(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["bytes accessed"]

  rows, teacher_rows = array(V, D), array(V, teacher_D)
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  own = {
    "logits": lambda h, w: dot("XD,VD->XV", h, w),
    "hidden": lambda g, w: dot("XV,VD->XD", g, w),
  }
  sum_bytes = 2 * 4 * V * D  # the sum of the head's gradient is read and written
  out = {}
  for C in (256, 512, 1024):
    targets = DenseTargets(hidden_BTD=array(1, n * C, teacher_D), head_VD=teacher_rows)
    labels, mask = array(1, n * C, dtype=jnp.int32), array(1, n * C, dtype=bool)
    batch = Batch(None, labels, mask, {"teacher": targets})

    def fused(h, w, b, C=C):
      return fused_head.loss(functools.partial(ours, count=1.0), h, w, b, C)[0]

    # The cost analysis counts one chunk, and what follows the chunks: the conversion of the sum.
    once = V * D * (4 + 2)
    got = (
      bytes_of(jax.value_and_grad(fused, argnums=(0, 1)), array(1, n * C, D), rows, batch) - once
    )
    products = bytes_of(own["logits"], array(C, D), rows)
    products += bytes_of(own["logits"], array(C, teacher_D), teacher_rows)
    products += bytes_of(own["hidden"], array(C, V), rows)
    products += sum_bytes + 2 * C * (V + D)
    out |= {f"v5p.{C}.bytes": got, f"v5p.{C}.hbm_ratio": got / products}
  return out


SHAPES = {"length": lengths, "v5p": v5p}  # cases that are compiled but not run


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--cases", default="d256,d1024,online,length")
  args = parser.parse_args()
  figures: dict[str, float] = {}
  for name in args.cases.split(","):
    new = SHAPES[name]() if name in SHAPES else measure(name, args.rounds)
    for key, value in new.items():
      print(f"{key:36}{value:16,.3f}", flush=True)
    figures |= new
  for key in ("temp_ratio", "time_ratio"):
    values = [figures[f"{d}.{key}"] for d in ("d256", "d1024") if f"{d}.{key}" in figures]
    figures |= {key: max(values)} if values else {}
  print(f"load {os.getloadavg()[0]:.1f}")
  print(json.dumps({k: round(v, 4) for k, v in figures.items()}))


if __name__ == "__main__":
  main()
