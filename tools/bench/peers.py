"""Compares our training step with those of other libraries, on the same shapes.

  PY_TUNIX=…/python PY_TRL=…/python python tools/bench/peers.py [--configs=small32k,vocab152k]
      [--rounds=2] [--peers=../shared/bench/peers] [--only=ours]

The others are scripts in the folder `--peers`, whose README describes what they run and what their
interpreters need: Tunix DistillationTrainer, TRL GKDTrainer and TRL DistillationTrainer. If the
variable with an interpreter is not set, its script is skipped and reported as absent. Ours are

  online   step.Step on a qwen3 with the same shape, with equal weights for kd (T=2) and ce, and
           with the teacher in the step, as in Tunix and TRL;
  records  the same on 63 sampled targets per token, without a teacher.

Each runs in a separate process, in turn, and is timed by peer_shapes.StepClock in the folder of the
others: wall and CPU time per step after warm-up, and peak memory. `CONFIG.PEER.time_ratio` is ours
(online) over the other, the median over rounds. `memory_ratio` is the ratio of peak resident
memory. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
PEERS = {  # name: (environment variable with its interpreter, script and flags)
  "tunix": ("PY_TUNIX", ["bench_tunix.py"]),
  "trl_gkd": ("PY_TRL", ["bench_trl.py", "--trainer", "gkd"]),
  "trl_distill": ("PY_TRL", ["bench_trl.py", "--trainer", "distill"]),
}
OURS = ("online", "records")
LIMIT = 580  # seconds for one process


def ours(folder: str, name: str, kind: str) -> None:
  """Runs one of our variants in this process; prints a result in the format of the others."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  sys.path.insert(0, folder)
  shapes = importlib.import_module("peer_shapes")
  from distill_jax import config
  from distill_jax.losses import SampledTargets, ce, kd
  from distill_jax.models import qwen3
  from distill_jax.nn import params
  from distill_jax.nn.layers import ComputeConfig
  from distill_jax.schedules import constant
  from distill_jax.training import optim
  from distill_jax.training.step import Step
  from distill_jax.types import Batch, Inputs

  c = shapes.CONFIGS[name]
  V, B, T, points = c["vocab"], c["batch"], c["seq"], 63

  def model(s: dict[str, int], seed: int) -> qwen3.Model:
    shape = qwen3.Config(
      vocab_size=V,
      hidden_size=s["d"],
      intermediate_size=s["ffn"],
      num_hidden_layers=s["layers"],
      num_attention_heads=s["heads"],
      num_key_value_heads=s["kv"],
      head_dim=s["head_dim"],
      max_position_embeddings=T,
      rope_theta=1e6,
      tie_word_embeddings=True,
    )
    return qwen3.Model(shape, jax.random.key(seed))

  rng = np.random.default_rng(0)

  def i32(x):
    return jnp.asarray(x, jnp.int32)

  hot = shapes.TEMPERATURE

  def batch() -> Batch:
    tokens = rng.integers(1, V, (B, T))
    inputs = Inputs(i32(tokens), i32(np.tile(np.arange(T), (B, 1))), i32(np.ones((B, T))))
    mask = jnp.broadcast_to(jnp.arange(T) < T - 1, (B, T))
    if kind == "online":
      return Batch(inputs, i32(np.roll(tokens, -1, 1)), mask)
    targets = SampledTargets(
      ids_BTK=i32(np.sort(rng.integers(0, V, (B, T, points)), -1)),
      weight_BTK=jnp.full((B, T, points), 1 / points),
      entropy_BT=jnp.full((B, T), 2.0),
      temperature=hot,
    )
    return Batch(inputs, i32(np.roll(tokens, -1, 1)), mask, {"teacher": targets})

  student = model(c["student"], 0)
  teachers = {"teacher": model(c["teacher"], 1)} if kind == "online" else {}
  o, half = config.OptimOptions(peak_lr=shapes.LEARNING_RATE, schedule="constant"), constant(0.5)
  step = Step(
    losses={"soft": kd.Loss(weight=half, temperature=hot), "hard": ce.Loss(weight=half)},
    learning_rate=optim.learning_rate(o, 100),
    optimizer=optim.optimizer(o),
    student=ComputeConfig(),
    teacher=ComputeConfig(),
    chunk=128 // B,
    vocab_size=V,
  )
  program, state = jax.jit(step, donate_argnums=0), step.init(student)
  counts = [params.count(m) for m in (student, *teachers.values())]
  clock = shapes.StepClock(c["warmup"])
  clock.start()
  for _ in range(c["steps"]):
    state, metrics = program(state, batch(), teachers)
    jax.block_until_ready(state.params)
    assert np.isfinite(float(metrics["loss"]))
    clock.tick()
  clock.report(
    f"distill_jax/{kind}",
    name,
    B * T,
    temperature=hot,
    student_params=counts[0],
    teacher_params=sum(counts[1:]),
    cores=len(os.sched_getaffinity(0)),
  )


def record_of(command: list[str]) -> dict[str, Any] | str:
  """Runs a process; returns the JSON on its last line, or a message if it fails."""
  done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
  if done.returncode:
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"failed: exit {done.returncode}, {last}"
  return json.loads(done.stdout.strip().splitlines()[-1])


def commands(folder: Path, config: str, only: str) -> tuple[dict[str, list[str]], dict[str, str]]:
  """Returns (commands by name, reasons for absent ones by name)."""
  run, absent = {}, {}
  for kind in OURS:
    flags = ["--peers", str(folder), "--one", config, kind]
    run[f"ours_{kind}"] = [sys.executable, str(HERE), *flags]
  for name, (variable, script) in PEERS.items():
    python = os.environ.get(variable, "")
    if only == "ours":
      absent[name] = "skipped: --only=ours"
    elif not Path(python).is_file():
      found = f"; {python} is not a file" if python else ""
      absent[name] = f"absent: set {variable}{found}"
    else:
      run[name] = [python, str(folder / script[0]), config, *script[1:]]
  return run, absent


def compare(config: str, rounds: list[dict[str, dict[str, Any]]]) -> dict[str, float]:
  """Returns medians over rounds, and the ratios of ours (online) to each other."""
  out = {}
  for name in rounds[0]:

    def median(key, name=name):
      return statistics.median(r[name][key] for r in rounds)

    for key in ("step_ms_median", "cpu_ms_median", "peak_rss_mb", "tokens_per_s"):
      out[f"{config}.{name}.{key}"] = median(key)
    if name in PEERS:

      def ratio(key, name=name):
        return statistics.median(r["ours_online"][key] / r[name][key] for r in rounds)

      out[f"{config}.{name}.time_ratio"] = ratio("step_ms_median")
      out[f"{config}.{name}.cpu_time_ratio"] = ratio("cpu_ms_median")
      out[f"{config}.{name}.memory_ratio"] = ratio("peak_rss_mb")
  return out


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--peers", default=str(HERE.parents[3] / "shared/bench/peers"))
  parser.add_argument("--configs", default="small32k,vocab152k", help="names in peer_shapes.py")
  parser.add_argument("--rounds", type=int, default=2)
  parser.add_argument("--only", default="", choices=["", "ours"])
  parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # runs in this process
  args = parser.parse_args()
  folder = Path(args.peers).resolve()
  if not (folder / "peer_shapes.py").is_file():
    sys.exit(f"{folder} does not contain peer_shapes.py. Set --peers to the folder of the scripts.")
  if args.one:
    return ours(str(folder), *args.one)
  figures: dict[str, Any] = {}
  for config in args.configs.split(","):
    run, missing = commands(folder, config, args.only)
    rounds = []
    for _ in range(args.rounds):
      got = {name: record_of(command) for name, command in run.items() if name not in missing}
      missing |= {name: error for name, error in got.items() if isinstance(error, str)}
      rounds.append(got)
    kept = [{n: r for n, r in got.items() if n not in missing} for got in rounds]
    figures |= missing
    if lost := [name for name in run if name.startswith("ours") and name in missing]:
      sys.exit("; ".join(f"{name} {missing[name]}" for name in lost))
    figures |= {k: round(v, 4) for k, v in compare(config, kept).items()}
  for name, value in figures.items():
    print(f"{name:40}{value:>14}" if isinstance(value, str) else f"{name:40}{value:14,.3f}")
  print(f"load {os.getloadavg()[0]:.1f}")
  print(json.dumps(figures))
  return None


if __name__ == "__main__":
  main()
