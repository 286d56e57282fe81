"""Compares the fused head with materialised logits: memory and time of the loss and its gradient.

  python tools/bench/head.py [--rounds=5] [--cases=d256,d1024,online,length]

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
    z_BTV = jnp.einsum("BTD,VD->BTV", hidden, rows, preferred_element_type=jnp.float32)
    grads = jnp.einsum("BTV,VD->BTD", z_BTV, rows), jnp.einsum("BTV,BTD->VD", z_BTV, hidden)
    return z_BTV[0, 0, 0], grads

  losses = {
    "fused": fused,
    "textbook": materialised(functools.partial(textbook, one_softmax=False)),
    "one_softmax": materialised(functools.partial(textbook, one_softmax=True)),
    "same_losses": materialised(lambda z, batch: ours(z, batch, batch.mask_BT.size)[0]),
  }

  def compile(f):
    return jax.jit(f).lower(*args).compile()

  made = {n: compile(jax.value_and_grad(f, argnums=(0, 1))) for n, f in losses.items()}
  return made | {"products": compile(products)}


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
  order = list(made)
  for i in range(rounds):
    for n in order[i % len(order) :] + order[: i % len(order)]:
      start = time.perf_counter()
      jax.block_until_ready(made[n](*args))
      seconds[n].append(time.perf_counter() - start)
  out = {f"{n}.seconds": statistics.median(s) for n, s in seconds.items()}
  out |= {f"{n}.temp_bytes": temporaries(p) for n, p in made.items()}
  for rival in (*RIVALS, "products"):
    pairs = zip(seconds["fused"], seconds[rival], strict=True)
    out[f"{rival}.time_ratio"] = statistics.median(a / b for a, b in pairs)
    if rival != "products":
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


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--cases", default="d256,d1024,online,length")
  args = parser.parse_args()
  figures: dict[str, float] = {}
  for name in args.cases.split(","):
    new = lengths() if name == "length" else measure(name, args.rounds)
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
