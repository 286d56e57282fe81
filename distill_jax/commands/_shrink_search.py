"""The search: several students near one size, each distilled a little, and the best named."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax

from distill_jax.commands import record
from distill_jax.config import Config
from distill_jax.efficiency.measure import BenchmarkedModel
from distill_jax.errors import InputError
from distill_jax.generation.unrolled import unroll
from distill_jax.hub.weights import float_dtype
from distill_jax.losses import kd
from distill_jax.models import loading
from distill_jax.nn import sharding
from distill_jax.nn.layer_sharing import ShareOptions
from distill_jax.nn.lora import LoraOptions
from distill_jax.pruning import candidates, shapes
from distill_jax.pruning.options import ShrinkOptions
from distill_jax.pruning.students import Teacher
from distill_jax.runtime import distributed, json_io
from distill_jax.runtime.workdir import Workdir
from distill_jax.training import loop

TARGETS = ("target_params", "target_bytes", "target_decode_rate")
MADE, SCORE, RATE = "made.json", "score.json", "decode_rate.json"


def search(config: Config, workdir: Path, target: str) -> dict[str, Any]:
  """Proposes, makes, distils and scores; a finished part is not done again.

  Candidates are in `workdir`/candidates, each with its folder, `model`, and its run, `run`. They
  learn from train.records, or, where there are none, from the teacher beside them on the text
  of `data`, for shrink.steps steps with the losses of the config (kd, where it has none).

  Returns: target, wanted, steps; teacher (ce); candidates by name (kept, dir, run,
    parameters, bytes, ce_before, ce, and decode_rate where that is the target); recommended,
    the one with the lowest held-out ce.

  Raises:
    InputError: a target that no shape meets.
  """
  proposed = propose(config, workdir, target)
  folders = {name: workdir / "candidates" / name for name in proposed}
  _make(config, proposed, folders)
  config = with_text(config, workdir)
  for folder in folders.values():
    if not (folder / SCORE).exists():
      distil(config, folder)
  score(config, folders, target == "target_decode_rate")
  rows, of_teacher = {}, {}
  for name, folder in folders.items():
    made, scored = _read(folder / MADE), _read(folder / SCORE)
    student, of_teacher = made["models"]["student"], made["models"]["teacher"]
    rows[name] = {
      "kept": made["kept"],
      "dir": made["dir"],
      "run": str(folder / "run"),
      "parameters": student["parameters"],
      "bytes": student["bytes"],
      "ce_before": student["ce"],
      **scored,
    }
  return {
    "target": f"shrink.{target}",
    "wanted": getattr(config.shrink, target),
    "steps": config.shrink.steps,
    "teacher": of_teacher,
    "candidates": rows,
    "recommended": min(rows, key=lambda name: rows[name]["ce"]),
  }


def propose(config: Config, workdir: Path, target: str) -> dict[str, ShrinkOptions]:
  """The shapes to try, by name.

  Decoding one text reads every weight that a token needs, and takes as long as that: the
  teacher's rate is measured once, and a shape's is that times how many fewer it has.
  """
  s, wanted = config.shrink, getattr(config.shrink, target)
  if not 0 < wanted < math.inf:
    raise InputError(f"shrink.{target} is {wanted}; it is a positive number")
  family, shape = loading.family_and_config(config.teacher)
  shapes.check(s, family, shape)
  itemsize = float_dtype(config.shrink.dtype).itemsize
  cost = lambda c: shapes.cost(family, c)
  size: candidates.Size = {
    "target_params": lambda c: cost(c).parameters,
    "target_bytes": lambda c: cost(c).parameters * itemsize,
    "target_decode_rate": lambda c: cost(c).active,
  }[target]
  if target == "target_decode_rate":
    have = _teachers_rate(config, workdir)
    if wanted <= have:
      raise InputError(
        f"shrink.{target} is {wanted:g} and the teacher itself decodes {have:.3g} a second here; "
        "name more"
      )
    wanted = cost(shape).active * have / wanted
    target = f"{target} at {have:.3g} tokens a second of the teacher, in parameters a token,"
  mesh, rules = (
    sharding.make_mesh(**vars(config.mesh)),
    loading.compute_config(config.teacher).rules,
  )
  fits = lambda c: sharding.shardings(shapes.abstract(family, c), mesh, rules)
  return candidates.propose(s, family, shape, size, wanted, target, fits)


def _make(config: Config, proposed: dict[str, ShrinkOptions], folders: dict[str, Path]) -> None:
  """The candidates' folders, by one teacher that is measured once."""
  todo = [name for name in proposed if not (folders[name] / MADE).exists()]
  source = Teacher(config) if todo else None
  for name in todo:
    assert source is not None
    folder = folders[name]
    # What is there was cut off before it was written down.
    distributed.run_on_process_0(
      functools.partial(shutil.rmtree, folder / "model", ignore_errors=True)
    )
    _write(folder / MADE, source.make(proposed[name], folder / "model", random=False))


def with_text(config: Config, workdir: Path) -> Config:
  """The config with records: its own, or the text alone with the teacher beside the student."""
  if config.train.records:
    return config
  text = workdir / "text"
  records = dataclasses.replace(config.records, kind="text", logprobs="", taps=())
  record.run(dataclasses.replace(config, records=records), text)
  online = dataclasses.replace(config.train, records=(str(text),), online=True)
  return dataclasses.replace(config, train=online)


def distil(config: Config, folder: Path) -> None:
  """One candidate's short training; goes on from its last checkpoint."""
  steps = config.shrink.steps
  student = dataclasses.replace(
    config.student,
    source=str(folder / "model"),
    shape="",
    digest="",
    keep_layers=(),
    lora=LoraOptions(),
    share=ShareOptions(),
  )
  every = min(config.train.checkpoint_every, steps)
  length = dataclasses.replace(config.train, steps=steps, checkpoint_every=every, keep=1)
  warmup = min(config.optim.warmup_steps, steps // 10)
  run = dataclasses.replace(
    config,
    student=student,
    train=length,
    losses=config.losses or {"soft": kd.Loss()},
    optim=dataclasses.replace(config.optim, warmup_steps=warmup),
  )
  with Workdir(folder / "run", run) as workdir:
    loop.train(run, workdir)


def score(config: Config, folders: dict[str, Path], rates: bool) -> None:
  """Held-out cross-entropy after training, and how fast it decodes where that is asked."""
  todo = [folder for folder in folders.values() if not (folder / SCORE).exists()]
  judge = Teacher(config) if todo else None
  for folder in todo:
    assert judge is not None
    built = trained(config, judge, folder)
    said = {"ce": judge.cross_entropy(built.model)}
    if rates:
      said["decode_rate"] = _rate(config, built, judge.mesh)
    _write(folder / SCORE, said)


def trained(config: Config, judge: Teacher, folder: Path) -> loading.LoadedModel:
  """What a candidate has become."""
  run = f"{loading.RUN}{folder / 'run'}"
  spec = dataclasses.replace(config.student, source=run, keep_layers=(), share=ShareOptions())
  with jax.set_mesh(judge.mesh):
    return loading.build(spec, judge.mesh, loading.keys(config.seed)["student"])


def _teachers_rate(config: Config, workdir: Path) -> float:
  """Measured once: candidates do not change while the search goes on."""
  if not (workdir / RATE).exists():
    mesh = sharding.make_mesh(**vars(config.mesh))
    with jax.set_mesh(mesh):
      built = loading.build(config.teacher, mesh, loading.keys(config.seed)["teacher"])
    rate = _rate(config, built, mesh)
    _write(workdir / RATE, {"teacher": rate})
  return _read(workdir / RATE)["teacher"]


def _rate(config: Config, built: loading.LoadedModel, mesh: Any) -> float:
  """Tokens a second of one text a group of devices; the model is taken apart."""
  rows = math.prod(mesh.shape[axis] for axis in sharding.BATCH)
  with jax.set_mesh(mesh):
    s, unrolled = config.shrink, unroll(built.model, built.compute)
    model = BenchmarkedModel(built, unrolled, mesh, s.decode, s.context, rows, config.seed)
    model.run()  # compiles
    return model.run()["decode"] / rows


def _write(path: Path, tree: dict[str, Any]) -> None:
  distributed.run_on_process_0(lambda: json_io.write_json(path, tree))


def _read(path: Path) -> dict[str, Any]:
  return json.loads(path.read_text())
