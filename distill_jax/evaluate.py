"""`evaluate`: the teacher, the student before training, and any models, on held-out text."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill_jax import build, files, params, processes, sharding
from distill_jax.config import Config
from distill_jax.data import corpus, loader
from distill_jax.evals import lm
from distill_jax.progress import Progress
from distill_jax.step import online
from distill_jax.types import Batch, Mean

TIMED = 2  # passes over one batch that the throughput is taken from


def evaluate(config: Config, folder: Path) -> dict[str, Any]:
  """Measures every model on the same held-out sequences, against the teacher's own pass.

  Writes evaluation.json into the workdir and returns it: `models` by name ("teacher",
  "start", then those of evaluate.models), each with ce, perplexity, kl, agreement, accuracy,
  entropy, parameters, bytes and tokens_per_second (scoring, measured here).
  """
  mesh = sharding.make_mesh(**vars(config.mesh))
  sharding.check_batch("evaluate.batch_size", config.evaluate.batch_size, mesh)
  with jax.set_mesh(mesh):
    keys = build.keys(config.seed)
    specs = {"start": config.student}
    specs |= {n: dataclasses.replace(config.student, source=s, keep_layers=())
              for n, s in config.evaluate.models.items()}  # fmt: skip
    teacher = build.build(config.teacher, mesh, keys["teacher"])
    data = dataclasses.replace(config.data, split="heldout", sequences=config.evaluate.sequences)
    tokenizer = corpus.tokenizer_of(data, teacher.pretrained)
    corpus.check(data, tokenizer, teacher.config.vocab_size, teacher.config.max_position_embeddings)
    rows = list(corpus.sequences(data, tokenizer, teacher.pretrained))
    models = {"teacher": teacher} | {
      n: build.build(s, mesh, keys["student"]) for n, s in specs.items()
    }
    results = _measure_all(config, models, rows, tokenizer.vocab_size, mesh)
  tokens = results["teacher"].pop("tokens")
  for row in results.values():
    row.pop("tokens", None)
  evaluation = {"models": results, "tokens": tokens, "corpus": f"{data.kind} {data.path} heldout"}
  processes.on_first(lambda: files.write_json(folder / "evaluation.json", evaluation))
  return evaluation


def _measure_all(
  config: Config, models: dict[str, build.Built], rows: list[dict[str, np.ndarray]],
  vocab_size: int, mesh: Any,
) -> dict[str, dict[str, float]]:  # fmt: skip
  """Every model on every batch; the teacher runs once a batch for all of them."""
  chunk, size = config.train.chunk, config.evaluate.batch_size
  where = sharding.batch_sharding(mesh)
  forward = {n: jax.jit(functools.partial(online, how=m.how)) for n, m in models.items()}
  compare = jax.jit(
    functools.partial(lm.compare, chunk=chunk, vocab_size=vocab_size),
    out_shardings=sharding.replicated(mesh),
  )
  totals: Any = None
  batches = list(_batches(rows, size))
  with Progress("evaluate", len(batches) * size * len(rows[0]["mask_T"]), "tokens") as progress:
    for batch in batches:
      batch = loader.to_device(batch, where)
      outputs = {n: forward[n](m.model, batch.inputs)[0] for n, m in models.items()}
      means = jax.device_get(compare(outputs, batch))
      totals = means if totals is None else jax.tree.map(np.add, totals, means)
      progress.add(batch.mask_BT.size)
  return {n: _row(totals[n]) | _size(m) | _speed(m, batch, chunk) for n, m in models.items()}


def _row(means: dict[str, Mean]) -> dict[str, float]:
  row = {name: float(mean.value()) for name, mean in means.items()}
  return row | {"perplexity": math.exp(min(row["ce"], 700)), "tokens": float(means["ce"].count)}


def _size(m: build.Built) -> dict[str, int]:
  weights = jax.tree.leaves(m.model)
  return {"parameters": params.count(m.model), "bytes": sum(w.nbytes for w in weights)}


def _speed(m: build.Built, batch: Batch, chunk: int) -> dict[str, float]:
  score = jax.jit(functools.partial(lm.score, how=m.how, chunk=chunk))
  jax.block_until_ready(score(m.model, batch))  # compile
  start = time.perf_counter()
  for _ in range(TIMED):
    jax.block_until_ready(score(m.model, batch))
  return {"tokens_per_second": TIMED * batch.mask_BT.size / (time.perf_counter() - start)}


def _batches(rows: list[dict[str, np.ndarray]], size: int) -> Iterator[Batch]:
  """This process's rows of batches of one size; the last is filled up with padding alone."""
  empty = {name: np.zeros_like(x) for name, x in rows[0].items()}
  for i in range(0, len(rows), size):
    some = rows[i : i + size]
    whole = some + [empty] * (size - len(some))
    yield loader.collate(whole[jax.process_index() :: jax.process_count()])
