"""Compares training steps on hard labels, on records, with an online teacher, and a frozen head.

  python tools/bench/step.py [--rounds=5] [--layers=12] [--chunk=64] [--small]

The student has the shape of SmolLM2-135M with 12 layers, random weights in float32, AdamW, and 2
sequences of 512 tokens per step. Every round runs one step of each, in varying order:

  hard     only cross-entropy;
  records  kd on 63 sampled targets per token, and cross-entropy;
  online   the same losses with a teacher of 30 layers in the step;
  frozen   as records, but the embedding, which is the head too, is not trained;
  lora     as records, with adapters of rank 8 on a base model that is not trained;
  naive    as records, but norms, activations and attention keep all their intermediate results for
           the backward pass, and products keep the axes of rows and positions apart (for what
           nn/products.py does).

Each is a step.Step, compiled as in training, with its metrics. `A_over_B` is the median over rounds
of the ratio of two steps, wall clock; `…_cpu_time` is the same of the CPU time of all threads, for
machines with other work, and `…_temp_bytes` of the compiled programs' temporary memory. The last
line is a JSON object.

`…_evaluation_over_step` is the CPU time of heldout.evaluate on the same batch over that of the
step. `…_evaluation_share` is the share of the computation that evaluation costs at the default
interval of train.eval_every, which is chosen for at most 2%.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import config
from distill_jax.losses import SampledTargets, ce, kd
from distill_jax.models import _decoder, llama, trainables
from distill_jax.nn import dense, layers
from distill_jax.nn.layers import ComputeConfig
from distill_jax.nn.lora import LoraOptions
from distill_jax.schedules import constant
from distill_jax.training import heldout, optim
from distill_jax.training.step import Step
from distill_jax.types import Batch, Inputs

RATIOS = (
  ("records", "hard"),
  ("online", "hard"),
  ("frozen", "records"),
  ("lora", "records"),
  ("records", "naive"),
)
FORWARD = {"records": 1 / 3, "lora": 1 / 2, "online": 1.0}  # see heldout.forward_share
POINTS, ENTRIES = 63, 20  # points of systematic sampling, and distinct tokens among them


def batch_of(vocab_size: int, B: int, T: int) -> Batch:
  """Returns a batch of random tokens with random targets of sampled records."""
  rng = np.random.default_rng(0)

  def i32(x):
    return jnp.asarray(x, jnp.int32)

  def f32(x):
    return jnp.asarray(x, jnp.float32)

  tokens = rng.integers(0, vocab_size, (B, T))
  ids = np.sort(rng.integers(0, vocab_size, (B, T, POINTS)), -1)
  weight = np.zeros((B, T, POINTS))  # padded to N entries, as the loader does
  weight[..., :ENTRIES] = rng.multinomial(POINTS, np.ones(ENTRIES) / ENTRIES, (B, T)) / POINTS
  targets = SampledTargets(
    ids_BTK=i32(ids),
    weight_BTK=f32(weight),
    entropy_BT=f32(rng.uniform(1, 4, (B, T))),
    label_logp_BT=f32(-rng.uniform(1, 4, (B, T))),
    argmax_BT=i32(ids[..., 0]),
  )
  positions = np.broadcast_to(np.arange(T), (B, T))
  inputs = Inputs(i32(tokens), i32(positions), i32(np.ones((B, T))))
  mask = jnp.ones((B, T), bool)
  return Batch(inputs, i32(np.roll(tokens, -1, 1)), mask, {"teacher": targets})


@contextlib.contextmanager
def naive_layers() -> Iterator[None]:
  """Replaces the functions of nn/products.py in models by what they improve on."""

  def product(x, w, contracted=1):
    return jnp.tensordot(x, w, contracted)

  def recomputed(fn, *args):
    return fn(*args)

  with contextlib.ExitStack() as stack:
    for module, fn in (
      (_decoder, product),
      (layers, product),
      (layers, recomputed),
      (dense, recomputed),
    ):
      stack.enter_context(mock.patch.object(module, fn.__name__, fn))
    jax.clear_caches()  # jax keeps what it traced of a scan's body
    yield
  jax.clear_caches()


def contestants(student: llama.Config, teacher: llama.Config, batch: Batch, chunk: int):
  """Returns [compiled step, initial state, batch, teachers, base model, evaluation] by name."""
  soft, hard = kd.Loss(weight=constant(0.7)), ce.Loss(weight=constant(0.3))
  both = {"soft": soft, "hard": hard}
  plain, model = batch.replace(targets={}), llama.Model(student, jax.random.key(0))
  online = {"teacher": llama.Model(teacher, jax.random.key(1))}
  frozen = trainables.Frozen(("model.embed_tokens",))
  lora = trainables.Lora(options=LoraOptions(rank=8))
  o = config.OptimOptions()
  made = {}
  for name, losses, given, teachers, trainable in (
    ("hard", {"hard": ce.Loss()}, plain, {}, trainables.WHOLE),
    ("records", both, batch, {}, trainables.WHOLE),
    ("online", both, plain, online, trainables.WHOLE),
    ("frozen", both, batch, {}, frozen),
    ("lora", both, batch, {}, lora),
    ("naive", both, batch, {}, trainables.WHOLE),
  ):
    step = Step(
      losses=losses,
      learning_rate=optim.learning_rate(o, 1000),
      optimizer=optim.optimizer(o),
      student=ComputeConfig(),
      teacher=ComputeConfig(),
      chunk=chunk,
      vocab_size=student.vocab_size,
      trainable=trainable,
    )
    trained = trainable.init(model, jax.random.key(2), pretrained=False)
    state = step.init(jax.tree.map(jnp.copy, trained))  # a copy, because the step donates it
    arguments = [state, given, teachers, model if trainable.has_base else None]
    with naive_layers() if name == "naive" else contextlib.nullcontext():
      program = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
    of_step = functools.partial(heldout.evaluate, step, 999)
    evaluation = jax.jit(of_step).lower((state.params, state.adapters), *arguments[1:]).compile()
    made[name] = [program, *arguments, evaluation]
  return made


def evaluate(contestant: list[Any]) -> float:
  """Evaluates the state on the batch of the step; returns the CPU seconds."""
  _, state, *arguments, evaluation = contestant
  cpu = time.process_time()
  jax.block_until_ready(evaluation((state.params, state.adapters), *arguments))
  return time.process_time() - cpu


def run(contestant: list[Any]) -> tuple[float, float]:
  """Runs one step from the state of the last; returns its wall and CPU seconds."""
  program, *arguments, _ = contestant
  start, cpu = time.perf_counter(), time.process_time()
  contestant[1], metrics = program(*arguments)
  loss = float(metrics["loss"])
  seconds = time.perf_counter() - start, time.process_time() - cpu
  assert np.isfinite(loss), loss
  return seconds


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--layers", type=int, default=12)
  parser.add_argument("--chunk", type=int, default=64, help="positions per chunk of logits")
  parser.add_argument("--small", action="store_true", help="tiny shapes, to check the script")
  args = parser.parse_args()
  teacher = llama.TINY if args.small else llama.CONFIGS["smollm2-135m"]
  depth = 2 if args.small else args.layers
  student = dataclasses.replace(teacher, num_hidden_layers=depth)
  B, T = (2, 32) if args.small else (2, 512)
  made = contestants(student, teacher, batch_of(student.vocab_size, B, T), args.chunk)
  names = list(made)
  wall, cpu, evaluated = ({n: [] for n in names} for _ in range(3))
  for i in range(args.rounds + 1):
    for name in names[i % len(names) :] + names[: i % len(names)]:
      seconds = run(made[name])
      if i:  # the first round warms up
        wall[name].append(seconds[0])
        cpu[name].append(seconds[1])
      if name in FORWARD:
        evaluated[name].append(evaluate(made[name]))

  def ratio(times: dict[str, list[float]], a: str, b: str) -> float:
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

  temporary = {n: m[0].memory_analysis().temp_size_in_bytes for n, m in made.items()}
  state_bytes = {n: sum(x.nbytes for x in jax.tree.leaves(m[1])) for n, m in made.items()}
  figures = {}
  for a, b in RATIOS:
    figures[f"{a}_over_{b}"] = ratio(wall, a, b)
    figures[f"{a}_over_{b}_cpu_time"] = ratio(cpu, a, b)
    figures[f"{a}_over_{b}_temp_bytes"] = temporary[a] / temporary[b]
  for n, assumed in FORWARD.items():
    share = statistics.median(x / y for x, y in zip(evaluated[n][1:], cpu[n], strict=True))
    figures[f"{n}_evaluation_over_step"] = share
    figures[f"{n}_evaluation_share"] = heldout.SHARE * share / assumed
    bytes_of = made[n][-1].memory_analysis().temp_size_in_bytes
    figures[f"{n}_evaluation_temp_bytes_over_step"] = bytes_of / temporary[n]
  figures |= {f"{n}_seconds": statistics.median(s) for n, s in wall.items()}
  figures |= {f"{n}_temp_bytes": n_bytes for n, n_bytes in temporary.items()}
  figures |= {f"{n}_state_bytes": n_bytes for n, n_bytes in state_bytes.items()}
  figures |= {"tokens": B * T, "student_layers": depth, "chunk": args.chunk}
  for name, value in figures.items():
    print(f"{name:40}{value:18,.4f}")
  print(f"load {os.getloadavg()[0]:.1f}")
  print(json.dumps({k: round(v, 4) for k, v in figures.items()}))


if __name__ == "__main__":
  main()
