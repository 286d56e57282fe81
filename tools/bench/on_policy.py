"""Compares on-policy runs: live against offline rounds, and the parts of a round.

  python tools/bench/on_policy.py [--small] [--every=4] [--rounds=2]

A live run has rounds of one step, with the teacher in the step. An offline run has rounds of
--every steps: the teacher's log-probabilities of the tokens are stored first, and the loss is the
policy gradient. Both train a student of 12 layers on equally many sampled tokens, from a teacher
of 30 layers; the models are SmolLM2-135M with random weights. The first --every steps, which
compile, are not counted.

  live_over_offline_seconds          seconds of the steps and of everything before them
  generate_share, score_share, train_share
                                     parts of the offline run's seconds
  live.generate_share                the same part of the live run's seconds
  self_teacher_loss                  first loss of a student that is its own teacher, in nats
  resume_identical                   1.0 if a run that is killed while it samples, scores and trains
                                     ends with the same bits and metrics as one that is not killed
  live_peak_bytes, materialised_peak_bytes, peak_ratio
                                     memory per device of the live training step, and of one with
                                     the same loss and the logits of both models in memory: Qwen3
                                     0.6B from 1.7B, 8 texts of 1,024 tokens per device, compiled
                                     for v5p:2x2x1 (libtpu; no TPU is needed)

The runs are processes of `distill-jax on_policy` on this machine's CPUs. Seconds are without the
diagnosis of rounds. The last line is a JSON object. --small uses tiny models.

With --rounds=1 on 2 busy cores, live takes 1.36 times as long as offline (104 and 77 seconds for 4
steps); the offline run's shares are 0.16, 0.13 and 0.71, and generation is 0.46 of the live run.
The live step takes 7.7 GB, and 13.6 GB with materialised logits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import config
from distill_jax.models import loading
from distill_jax.models.options import StudentOptions
from distill_jax.nn import sharding
from distill_jax.preflight import compiler, programs, round_teachers, topology
from distill_jax.training.metric_writer import read_metrics
from distill_jax.training.run_log import CLOCK
from distill_jax.training.step import Fixed, Step
from distill_jax.types import Batch, Mean, PyTree

BEFORE = ("generate_seconds", "score_seconds")  # metrics of the first step of a round
# Shape of the models, layers of the student, positions of a text, generated tokens.
NORMAL, SMALL = ("smollm2-135m", tuple(range(12)), 128, 64), ("tiny", (), 64, 16)
ROWS = 4  # texts per step
TOPOLOGY = "v5p:2x2x1"
CONFIG = """
import sys
sys.path.insert(0, {tests!r})
import pathlib, tiny
from distill_jax import config
SHAPE, LAYERS, POSITIONS, TOKENS = {size!r}
FOLDER = pathlib.Path({folder!r})
def get_config(kind):
  c = config.base()
  c.student.shape = c.teacher.shape = SHAPE
  c.student.keep_layers = LAYERS
  if kind == "self":
    for model in (c.student, c.teacher):
      model.source, model.shape = "run:" + str(FOLDER / "live"), ""
    c.student.keep_layers = ()
  c.data.tokenizer = str(tiny.write_tokenizer(FOLDER / "tokenizer.json"))
  c.generate.prompts = str(tiny.write_text(FOLDER / "prompts.txt"))
  c.generate.cache_len, c.generate.max_new_tokens = POSITIONS, TOKENS
  c.on_policy.every = {every} if kind == "offline" else 1
  c.generate.batch_size = c.on_policy.every * {rows}
  c.train.batch_size = c.records.batch_size = {rows}
  c.train.steps, c.train.chunk = 1 if kind == "self" else {steps}, POSITIONS
  c.train.checkpoint_every = 1
  if kind == "offline":
    c.records.kind, c.losses.soft = "labels", config.loss("policy_gradient")
  else:
    c.train.online, c.losses.soft = True, config.loss("kd", divergence="reverse_kl")
  return c
"""


class Bench:
  """Runs of one size, in the folders `live`, `offline` and so on of a folder."""

  def __init__(self, folder: Path, small: bool, every: int, steps: int):
    folder.mkdir(exist_ok=True)
    self.folder, self.every, self.steps = folder, every, steps
    tests = str(Path(__file__).resolve().parents[2] / "tests")
    size = SMALL if small else NORMAL
    values = {"tests": tests, "folder": str(folder), "every": every, "steps": steps, "rows": ROWS}
    (folder / "config.py").write_text(CONFIG.format(size=size, **values))

  def run(self, kind: str, name: str = "", until: Callable[[Path], bool] | None = None) -> Path:
    """Runs to the end, or kills the run when `until` of its folder is true; returns the folder."""
    workdir = self.folder / (name or kind)
    command = [sys.executable, "-m", "distill_jax.cli", "on_policy", f"--workdir={workdir}"]
    command.append(f"--config={self.folder / 'config.py'}:{kind}")
    with (self.folder / "log").open("ab") as log:
      process = subprocess.Popen(command, stdout=log, stderr=log)
      while until is not None and process.poll() is None:
        if until(workdir):
          process.kill()
        time.sleep(0.002)
      if process.wait() and until is None:
        raise SystemExit((self.folder / "log").read_text()[-2000:])
    return workdir

  def seconds(self, workdir: Path) -> dict[str, float]:
    """Returns the seconds of the counted steps by part of a round."""
    rows = read_metrics(workdir)[self.every :]
    parts = {name: sum(row.get(name, 0.0) for row in rows) for name in (*BEFORE, "step_seconds")}
    return dict(zip(("generate", "score", "train"), parts.values(), strict=True))

  def compare(self) -> dict[str, float]:
    """Returns the metrics about seconds."""
    live, offline = (self.seconds(self.run(kind)) for kind in ("live", "offline"))
    print(f"live {live}\noffline {offline}", flush=True)
    whole = sum(offline.values())
    shares = {f"{part}_share": seconds / whole for part, seconds in offline.items()}
    live_share = live["generate"] / sum(live.values())
    ratio = sum(live.values()) / whole
    return {"live_over_offline_seconds": ratio, **shares, "live.generate_share": live_share}

  def resume_identical(self) -> float:
    """Returns 1.0 if runs that are killed and are not killed have equal results."""

    def exists(name: str) -> Callable[[Path], bool]:
      return lambda workdir: (workdir / "rounds" / "00001" / "teacher" / name).exists()

    def trained(workdir: Path) -> bool:
      path = workdir / "metrics.jsonl"
      return path.exists() and path.read_bytes().count(b"\n") > self.every + 1

    for until in (exists("rollouts"), exists("records"), trained):
      self.run("offline", "killed", until)
    both = [result(self.run("offline", name)) for name in ("killed", "whole")]
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), *both)
    return float(all(jax.tree.leaves(same)))


def result(workdir: Path) -> PyTree:
  """Returns the weights of a run, and its metrics without those that are times."""
  mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:1])
  source = loading.open_source(StudentOptions(source=f"run:{workdir}"))
  weights = jax.device_get(jax.tree.leaves(source.load(mesh, jax.random.key(0)).model))
  return weights, [
    {name: x for name, x in row.items() if name not in CLOCK} for row in read_metrics(workdir)
  ]


def materialised(
  self: Step, trained: PyTree, batch: Batch, fixed: Fixed, weights: dict[str, jax.Array]
) -> tuple[jax.Array, dict[str, Mean]]:
  """Returns what Step.loss does for reverse KL, with the logits of both models in memory."""
  prepared = self.prepare(self.trainable.model(trained[0], fixed.base), batch, fixed.teachers)

  def logp(out: Any) -> jax.Array:
    logits_BTV = jnp.einsum("BTD,VD->BTV", out.hidden_BTD, out.head_VD)
    return jax.nn.log_softmax(logits_BTV.astype(jnp.float32))

  logq_BTV, logp_BTV = logp(prepared.out), logp(prepared.batch.targets["teacher"])
  kl = Mean.of(jnp.sum(jnp.exp(logq_BTV) * (logq_BTV - logp_BTV), -1), batch.mask_BT)
  labels_BT1 = batch.labels_BT[..., None]
  ce = Mean.of(-jnp.take_along_axis(logq_BTV, labels_BT1, -1)[..., 0], batch.mask_BT)
  return weights["soft"] * kl.total / fixed.label_count, {"soft": kl, "ce": ce}


def peaks(small: bool) -> dict[str, float]:
  """Returns the metrics about memory."""
  c = config.base()
  for model, shape in ((c.student, "qwen3-0.6b"), (c.teacher, "qwen3-1.7b")):
    model.family, model.shape = "qwen3", "tiny" if small else shape
    model.dtype, model.remat = "bfloat16", "full"
  c.teacher.param_dtype = "bfloat16"
  c.train.online, c.losses.soft = True, config.loss("kd", divergence="reverse_kl")
  c.generate.cache_len, c.train.batch_size, c.train.chunk = 128 if small else 1_024, 32, 128
  run = round_teachers.as_training(config.resolve(c))
  topology.prepare()
  mesh = topology.make_mesh(run.mesh, TOPOLOGY)

  def peak() -> int:
    program = programs.lower(run, "on_policy", mesh)
    return compiler.compile_step(program, compiler.LOW_EFFORT)[0].peak

  live = peak()
  with mock.patch.object(Step, "loss", materialised):
    rival = peak()
  names = "live_peak_bytes", "materialised_peak_bytes", "peak_ratio"
  return dict(zip(names, (live, rival, live / rival), strict=True))


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--small", action="store_true", help="use tiny models")
  parser.add_argument("--every", type=int, default=4)
  parser.add_argument("--rounds", type=int, default=2, help="counted rounds of the offline run")
  args = parser.parse_args()
  os.environ["JAX_PLATFORMS"] = "cpu"
  out: dict[str, float] = peaks(args.small)
  print(out, flush=True)
  with tempfile.TemporaryDirectory() as folder:
    steps = args.every * (1 + args.rounds)
    bench = Bench(Path(folder) / "speed", args.small, args.every, steps)
    out |= bench.compare()
    out["self_teacher_loss"] = read_metrics(bench.run("self"))[0]["soft"]
    out["resume_identical"] = Bench(Path(folder) / "resume", True, 2, 6).resume_identical()
  print(json.dumps({name: round(x, 9) for name, x in out.items()}))


if __name__ == "__main__":
  main()
