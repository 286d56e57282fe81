"""Prefill and decode tokens a second, measured here: teacher and student by turns."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from distill_jax.config import Config
from distill_jax.errors import InputError
from distill_jax.generation import engine
from distill_jax.generation.sampling import Sampling
from distill_jax.generation.unrolled import Unrolled, empty_cache, unroll
from distill_jax.models import loading
from distill_jax.nn import sharding
from distill_jax.runtime.progress import Progress

CALLS = 4  # of generate.steps tokens each, that decoding is timed over


def check(config: Config, mesh: Any) -> None:
  """Refuses a measurement that cannot be made, before any weight is read."""
  c, new = config.efficiency, CALLS * config.generate.steps
  for who in ("teacher", "student"):
    if not getattr(config, who).source:
      raise InputError(
        f"efficiency.measure is on and {who}.source is empty, so there are no weights to run; name "
        "them there, or leave efficiency.measure off"
      )
  if min(config.generate.steps, config.generate.prefill_chunk) < 1 or c.context < 2 * new:
    raise InputError(
      f"efficiency.context is {c.context}, generate.steps {config.generate.steps} and "
      f"generate.prefill_chunk {config.generate.prefill_chunk}; the last two are at least 1, and a "
      f"measurement wants {2 * CALLS} times the steps as context, half of it a prompt"
    )
  for rows in c.batch_sizes:
    sharding.check_batch("efficiency.batch_sizes", rows, mesh)


class BenchmarkedModel:
  """A model and an empty cache of `rows` rows, in the programs that `generate` runs.

  Prompts fill all but the last `new` of config.efficiency.context positions.
  """

  def __init__(
    self, built: loading.LoadedModel, model: Unrolled, mesh: Any, config: Config, rows: int
  ):
    self._model, self._size, g = model, config.efficiency.context, config.generate
    self._new, self._chunk = CALLS * g.steps, g.prefill_chunk
    self._cache = empty_cache(model, rows, self._size, built.compute, mesh, g.cache_dtype)
    self.cache_bytes = sum(x.nbytes for x in jax.tree.leaves(self._cache))
    where, said = jax.tree.map(lambda x: x.sharding, self._cache), sharding.replicated(mesh)
    spec = engine.EngineSpec(built.compute, Sampling(0.0), g.steps, (), built.config.vocab_size)
    jit = functools.partial(jax.jit, donate_argnums=1)
    self._prefill = jit(
      functools.partial(engine.prefill, compute=built.compute), out_shardings=where
    )
    self._steps = jit(
      functools.partial(engine.decode_steps, spec=spec), out_shardings=(where, said)
    )
    self._keys = {"generate": loading.keys(config.seed)["generate"]}
    shape = rows, self._size
    self._tokens = np.random.default_rng(0).integers(0, built.config.vocab_size, shape, np.int32)

  def run(self) -> dict[str, float]:
    """Tokens a second of reading the prompts, and of going on from them."""
    return {
      "prefill": self._tokens.shape[0] * (self._size - self._new) / self._seconds(self._read),
      "decode": self._tokens.shape[0] * self._new / self._seconds(self._go_on),
    }

  def _seconds(self, work: Any) -> float:
    start = time.perf_counter()
    work()
    jax.block_until_ready(self._cache)
    return time.perf_counter() - start

  def _read(self) -> None:
    rows, prompt = self._tokens.shape[0], self._size - self._new
    for first in range(0, prompt, self._chunk):
      count = min(self._chunk, prompt - first)
      tokens = np.zeros((rows, self._chunk), np.int32)
      tokens[:, :count] = self._tokens[:, first : first + count]
      at = np.full(rows, first, np.int32), np.full(rows, count, np.int32)
      self._cache = self._prefill(self._model, self._cache, tokens, *at)

  def _go_on(self) -> None:
    """As decode/batch.py does: a look at the new tokens after each call."""
    rows, position = self._tokens.shape[0], self._size - self._new
    token, row = self._tokens[:, position], np.arange(rows, dtype=np.int32)
    whole = lambda n: np.full(rows, n, np.int32)
    for _ in range(CALLS):
      state = engine.RowState(
        token, whole(position), whole(self._size), whole(1).astype(bool), row, whole(0)
      )
      self._cache, said = self._steps(self._model, self._cache, state, self._keys)
      made = jax.device_get(said)["token"]
      token, position = made[-1], position + len(made)


def measure(config: Config, mesh: Any) -> dict[str, Any]:
  """Both models at every batch size, in the dtype that each is configured to compute in.

  A round runs both, in turns the one or the other first; what is said of a model is the median
  over rounds with the least and the most, and a ratio is that of the same round.

  Returns: `prompt` and `new`, tokens a row; `device`; by model, `weight_bytes` on all devices,
    dtype, and a row for each batch size; `ratios`, student over teacher.
  """
  c, new = config.efficiency, CALLS * config.generate.steps
  out: dict[str, Any] = {
    "prompt": c.context - new,
    "new": new,
    "device": jax.devices()[0].device_kind,
    "models": {},
    "ratios": [],
  }
  models = {}
  with jax.set_mesh(mesh):
    for who in ("teacher", "student"):
      spec = getattr(config, who)
      built = loading.build(spec, mesh, loading.keys(config.seed)[who])
      models[who] = built, unroll(built.model, built.compute)
      size = sum(x.nbytes for x in jax.tree.leaves(models[who][1]))
      out["models"][who] = {"dtype": spec.dtype, "weight_bytes": size, "batches": []}
    total = len(c.batch_sizes) * (c.rounds + 1)
    with Progress("efficiency", total, "rounds") as progress:
      for rows in c.batch_sizes:
        them = {who: BenchmarkedModel(*m, mesh, config, rows) for who, m in models.items()}
        rounds = _rounds(them, c.rounds, progress)
        for who, it in them.items():
          row = {"batch_size": rows, "cache_bytes": it.cache_bytes}
          row |= {f"{k}_tokens_per_second": _spread([r[who][k] for r in rounds]) for k in PHASES}
          out["models"][who]["batches"].append(row)
        ratio = lambda r, k: r["student"][k] / r["teacher"][k]
        speedup = {k: _spread([ratio(r, k) for r in rounds]) for k in PHASES}
        out["ratios"].append({"batch_size": rows} | speedup)
  return out


PHASES = ("prefill", "decode")


def _rounds(
  them: dict[str, BenchmarkedModel], rounds: int, progress: Progress
) -> list[dict[str, Any]]:
  """What was measured in each round but the first, in which everything compiles."""
  said = []
  for i in range(rounds + 1):
    order = sorted(them, reverse=i % 2 == 0)
    said.append({who: them[who].run() for who in order})
    progress.add(1)
  return said[1:]


def _spread(values: Sequence[float]) -> dict[str, float]:
  return {"median": statistics.median(values), "least": min(values), "most": max(values)}
