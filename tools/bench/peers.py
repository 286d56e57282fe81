"""Compares our training step with those of Tunix, EasyDeL and TRL, on the same shapes.

  python tools/bench/peers.py [--shapes=small32k,vocab152k] [--rounds=3]
      [--environments=runs/peers] [--peers=tunix,easydel,trl_gkd,trl_distill]

The others are scripts in tools/peers, which state what they run. Each has a virtual environment
with pinned packages (ENVIRONMENTS), which is made in the folder `--environments` the first time,
with 6 GB in all, in a few minutes. A library that cannot be installed or run is reported with its
error. MaxText and Levanter are absent: MaxText requires Python 3.12 or newer, and Levanter 1.1 has
no code for distillation. Ours are

  online   step.Step on a qwen3 with the same shape, with equal weights for kd (T=2) and ce, and
           with the teacher in the step, as in Tunix and EasyDeL; TRL's losses have no
           cross-entropy;
  records  the same on 63 sampled targets per token, without a teacher.

Each runs in a separate process on one core, in turn, and is timed by peer_shapes.StepClock: seconds
and CPU seconds of a step after the first ones, and the peak of resident memory. On more cores, the
threads of torch wait for each other while another process runs, so their CPU time would count
waiting. `SHAPE.PEER.time_ratio` is ours (online) over the other, the median over rounds;
`cpu_time_ratio` and `memory_ratio` are those of CPU time and memory. The last line is a JSON
object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
SCRIPTS = HERE.parents[1] / "peers"
sys.path.insert(0, str(SCRIPTS))
import peer_shapes  # noqa: E402

ENVIRONMENTS = {
  "tunix": ("google-tunix==0.1.7", "transformers<5.13"),  # newer ones need newer safetensors
  # EasyDeL imports pillow and torch, which its metadata do not require.
  "easydel": ("easydel==0.3.0", "jax==0.9.2", "pillow==13.0.0", "torch==2.13.0"),
  "trl": ("torch==2.13.0", "trl==1.16.0", "transformers==5.23.0"),
}
PEERS = {  # name: (environment, script, arguments)
  "tunix": ("tunix", "run_tunix.py"),
  "easydel": ("easydel", "run_easydel.py"),
  "trl_gkd": ("trl", "run_trl.py", "gkd"),
  "trl_distill": ("trl", "run_trl.py", "distill"),
}
OURS = ("online", "records")
KEYS = ("step_seconds", "cpu_seconds", "peak_bytes", "tokens_per_second", "compile_seconds")
RATIOS = {
  "time_ratio": "step_seconds",
  "cpu_time_ratio": "cpu_seconds",
  "memory_ratio": "peak_bytes",
}
LIMIT = 580  # seconds for one process


def ours(name: str, kind: str) -> None:
  """Runs one of our variants in this process; prints a result in the format of the others."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from distill_jax import config
  from distill_jax.losses import SampledTargets, ce, kd
  from distill_jax.models import qwen3
  from distill_jax.nn.layers import ComputeConfig
  from distill_jax.schedules import constant
  from distill_jax.training import optim
  from distill_jax.training.step import Step
  from distill_jax.types import Batch, Inputs

  c = peer_shapes.SHAPES[name]
  V, B, T, points = c["vocab"], c["batch"], c["seq"], 63

  def model(which: str, seed: int) -> qwen3.Model:
    shape = qwen3.Config(**peer_shapes.qwen3_config(name, which))
    return qwen3.Model(shape, jax.random.key(seed))

  rng = np.random.default_rng(0)

  def i32(x):
    return jnp.asarray(x, jnp.int32)

  hot = peer_shapes.TEMPERATURE

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

  student = model("student", 0)
  teachers = {"teacher": model("teacher", 1)} if kind == "online" else {}
  o = config.OptimOptions(peak_lr=peer_shapes.LEARNING_RATE, schedule="constant")
  half = constant(0.5)
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
  clock = peer_shapes.StepClock(c["warmup"])
  clock.start()
  for _ in range(c["steps"]):
    state, metrics = program(state, batch(), teachers)
    jax.block_until_ready(state.params)
    assert np.isfinite(float(metrics["loss"]))
    clock.tick()
  clock.report(name, ("distill-jax", "jax", "flax", "optax"))


def environment(name: str, folder: Path) -> Path:
  """Returns the interpreter of a virtual environment, which is made unless it is finished.

  Raises:
    CalledProcessError: A package cannot be installed.
  """
  place, wanted = folder / name, "\n".join(ENVIRONMENTS[name])
  finished, python = place / "finished", place / "bin" / "python"
  if not finished.exists() or finished.read_text() != wanted:
    print(f"makes {place}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", *ENVIRONMENTS[name]], check=True)
    finished.write_text(wanted)
  return python


def figures_of(command: list[str]) -> dict[str, Any] | str:
  """Runs a process on one core; returns the JSON on its last line, or a message if it fails."""
  core = max(os.sched_getaffinity(0))
  pinned = ["taskset", "-c", str(core), *command]
  env = os.environ | {"JAX_PLATFORMS": "cpu"}
  try:
    done = subprocess.run(pinned, capture_output=True, text=True, timeout=LIMIT, env=env)
  except subprocess.TimeoutExpired:
    return f"failed: not finished after {LIMIT} s"
  if done.returncode:
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"failed: exit {done.returncode}, {last}"
  return json.loads(done.stdout.strip().splitlines()[-1])


def commands(shape: str, peers: list[str], folder: Path) -> dict[str, list[str] | str]:
  """Returns the command of each contestant, or the reason why it cannot run."""
  made: dict[str, list[str] | str] = {
    f"ours_{kind}": [sys.executable, str(HERE), "--one", shape, kind] for kind in OURS
  }
  for name in peers:
    where, script, *arguments = PEERS[name]
    try:
      python = environment(where, folder)
      made[name] = [str(python), str(SCRIPTS / script), shape, *arguments]
    except subprocess.CalledProcessError as error:
      made[name] = f"absent: {error}"
  return made


def compare(shape: str, rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
  """Returns medians over rounds, the versions, and the ratios of ours (online) to each other."""
  out: dict[str, Any] = {}
  for name in rounds[0]:
    for key in KEYS:
      out[f"{shape}.{name}.{key}"] = statistics.median(r[name][key] for r in rounds)
    versions = rounds[0][name]["versions"]
    out[f"{shape}.{name}.versions"] = ", ".join(f"{k} {v}" for k, v in versions.items())
    for ratio, key in RATIOS.items() if name in PEERS else ():
      values = [r["ours_online"][key] / r[name][key] for r in rounds]
      out[f"{shape}.{name}.{ratio}"] = statistics.median(values)
  return out


def measure(shape: str, peers: list[str], rounds: int, folder: Path) -> dict[str, Any]:
  """Returns the figures of a shape, and the errors of contestants that did not run."""
  lines = commands(shape, peers, folder)
  failed = {name: line for name, line in lines.items() if isinstance(line, str)}
  found: list[dict[str, Any]] = []
  for _ in range(rounds):
    found.append({})
    for name, line in lines.items():
      if name in failed:
        continue
      assert not isinstance(line, str)
      new = figures_of(line)
      if isinstance(new, str):
        failed[name] = new
      else:
        found[-1][name] = new
  if lost := [f"{name} {error}" for name, error in failed.items() if name not in PEERS]:
    sys.exit("; ".join(lost))
  whole = [{n: f for n, f in one.items() if n not in failed} for one in found]
  return {f"{shape}.{name}": error for name, error in failed.items()} | compare(shape, whole)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--shapes", default="small32k,vocab152k", help="names in peer_shapes.py")
  parser.add_argument("--peers", default=",".join(PEERS), help="none: only ours")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--environments", type=Path, default=Path("runs/peers"))
  parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # runs in this process
  args = parser.parse_args()
  if args.one:
    return ours(*args.one)
  peers = [name for name in args.peers.split(",") if name in PEERS]
  figures: dict[str, Any] = {}
  for shape in args.shapes.split(","):
    new = measure(shape, peers, args.rounds, args.environments.resolve())
    for name, value in new.items():
      print(f"{name:44}{value:>20}" if isinstance(value, str) else f"{name:44}{value:20,.4f}")
    figures |= new
  print(f"load {os.getloadavg()[0]:.1f}")
  print(json.dumps(figures))
  return None


if __name__ == "__main__":
  main()
