"""Measures tokens per second of teacher and student on this machine, in alternation."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from distill_jax.config import Config
from distill_jax.efficiency.options import DecodeTimingOptions
from distill_jax.errors import bad_value
from distill_jax.generation import engine
from distill_jax.generation.sampling import Sampling
from distill_jax.generation.unrolled import Unrolled, empty_cache, unroll
from distill_jax.models import loading, runs
from distill_jax.models.loading import LoadedModel
from distill_jax.nn import sharding
from distill_jax.runtime.progress import Progress
from distill_jax.types import JsonObject

CALLS = 4  # number of timed decoding calls, of DecodeTimingOptions.steps tokens each
PHASES = ("prefill", "decode")


def check(config: Config, mesh: jax.sharding.Mesh) -> None:
  """Checks the options of a measurement, without reading weights.

  Raises:
    InputError: a model does not have a source, or a number is invalid.
  """
  options, decode = config.efficiency, config.efficiency.decode
  for name, spec in (("teacher", config.teacher), ("student", config.student)):
    if not spec.source:
      expected = "the weights to run because efficiency.measure is True"
      action = "Set it, or efficiency.measure=False"
      raise bad_value(f"{name}.source", spec.source, expected, action)
  for key in ("steps", "prefill_chunk"):
    if (n := getattr(decode, key)) < 1:
      raise bad_value(f"efficiency.decode.{key}", n, "a positive number", "Change it")
  if options.context < 2 * CALLS * decode.steps:
    expected = (
      f"at least {2 * CALLS * decode.steps}, i.e. {2 * CALLS} times efficiency.decode.steps"
    )
    raise bad_value("efficiency.context", options.context, expected, "Change one of them")
  for rows in options.batch_sizes:
    sharding.check_batch("efficiency.batch_sizes", rows, mesh)


class BenchmarkedModel:
  """A model with a cache of `rows` rows, run by the compiled programs of `generate`.

  The last CALLS * options.steps of the `context` positions are decoded; the others are the prompt.

  Args:
    loaded: the model.
    model: the same model, unrolled.
    mesh: the mesh.
    options: the settings of decoding.
    context: the number of positions of a row.
    rows: the number of rows.
    seed: the seed of the run.

  Attributes:
    cache_bytes: bytes of the cache on all devices.
  """

  def __init__(
    self,
    loaded: LoadedModel,
    model: Unrolled,
    mesh: jax.sharding.Mesh,
    options: DecodeTimingOptions,
    context: int,
    rows: int,
    seed: int,
  ):
    self._model, self._context, self._chunk = model, context, options.prefill_chunk
    self._new = CALLS * options.steps
    self._cache = empty_cache(model, rows, context, loaded.compute, mesh, options.cache_dtype)
    self.cache_bytes = sum(x.nbytes for x in jax.tree.leaves(self._cache))
    vocab_size = loaded.text_config.vocab_size
    spec = engine.EngineSpec(loaded.compute, Sampling(0.0), options.steps, (), vocab_size)
    cache_sharding = jax.tree.map(lambda x: x.sharding, self._cache)
    jit = functools.partial(jax.jit, donate_argnums=1)
    self._prefill = jit(
      functools.partial(engine.prefill, compute=loaded.compute), out_shardings=cache_sharding
    )
    self._steps = jit(
      functools.partial(engine.decode_steps, spec=spec),
      out_shardings=(cache_sharding, sharding.replicated(mesh)),
    )
    self._keys = {"generate": runs.keys(seed)["generate"]}
    rng = np.random.default_rng(0)
    self._tokens_BT = rng.integers(0, vocab_size, (rows, context), np.int32)

  def run(self) -> dict[str, float]:
    """Returns the tokens per second of reading the prompts ("prefill") and of decoding."""
    rows = len(self._tokens_BT)
    return {
      "prefill": rows * (self._context - self._new) / self._seconds(self._read_prompts),
      "decode": rows * self._new / self._seconds(self._decode),
    }

  def _seconds(self, work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    jax.block_until_ready(self._cache)
    return time.perf_counter() - start

  def _read_prompts(self) -> None:
    rows, prompt = len(self._tokens_BT), self._context - self._new
    for first in range(0, prompt, self._chunk):
      count = min(self._chunk, prompt - first)
      tokens_BC = np.zeros((rows, self._chunk), np.int32)
      tokens_BC[:, :count] = self._tokens_BT[:, first : first + count]
      first_B, count_B = np.full(rows, first, np.int32), np.full(rows, count, np.int32)
      self._cache = self._prefill(self._model, self._cache, tokens_BC, first_B, count_B)

  def _decode(self) -> None:
    """Decodes like generation/scheduler.py, which fetches new tokens after each call."""
    rows, position = len(self._tokens_BT), self._context - self._new
    token_B = self._tokens_BT[:, position]
    fill = functools.partial(np.full, rows, dtype=np.int32)
    for _ in range(CALLS):
      state = engine.RowState(
        token_B=token_B,
        position_B=fill(position),
        last_B=fill(self._context),
        alive_B=np.ones(rows, bool),
        prompt_B=np.arange(rows, dtype=np.int32),
        sample_B=fill(0),
      )
      self._cache, outputs = self._steps(self._model, self._cache, state, self._keys)
      new_SB = jax.device_get(outputs)["token"]
      token_B, position = new_SB[-1], position + len(new_SB)


def measure(config: Config, mesh: jax.sharding.Mesh) -> JsonObject:
  """Measures both models at every batch size, each in its configured compute dtype.

  A round runs both models, and rounds alternate which of them is first. Results are the median,
  minimum and maximum over rounds. Ratios are between models of the same round.

  Args:
    config: the config.
    mesh: the mesh.

  Returns:
    A dict with the keys `prompt` and `new` (tokens per row), `device`, `models` (for each the
    weight_bytes on all devices, the dtype, and a row for each batch size), and `ratios` (student to
    teacher).
  """
  options, decode = config.efficiency, config.efficiency.decode
  new = CALLS * decode.steps
  result: JsonObject = {
    "prompt": options.context - new,
    "new": new,
    "device": jax.devices()[0].device_kind,
    "models": {},
    "ratios": [],
  }
  models: dict[str, tuple[LoadedModel, Unrolled]] = {}
  with jax.set_mesh(mesh):
    for name, spec in (("teacher", config.teacher), ("student", config.student)):
      loaded = loading.open_source(spec, config.seed).load(mesh, runs.keys(config.seed)[name])
      models[name] = loaded, unroll(loaded.model, loaded.compute)
      size = sum(x.nbytes for x in jax.tree.leaves(models[name][1]))
      result["models"][name] = {"dtype": spec.dtype, "weight_bytes": size, "batches": []}
    total = len(options.batch_sizes) * (options.rounds + 1)
    with Progress("efficiency", total, "rounds") as progress:
      for rows in options.batch_sizes:
        benchmarked = {
          name: BenchmarkedModel(*model, mesh, decode, options.context, rows, config.seed)
          for name, model in models.items()
        }
        rounds = _rounds(benchmarked, options.rounds, progress)
        for name, benchmark in benchmarked.items():
          row = {"batch_size": rows, "cache_bytes": benchmark.cache_bytes}
          row |= {f"{p}_tokens_per_second": _spread([r[name][p] for r in rounds]) for p in PHASES}
          result["models"][name]["batches"].append(row)
        speedup = {p: _spread([r["student"][p] / r["teacher"][p] for r in rounds]) for p in PHASES}
        result["ratios"].append({"batch_size": rows} | speedup)
  return result


def _rounds(
  models: dict[str, BenchmarkedModel], rounds: int, progress: Progress
) -> list[dict[str, dict[str, float]]]:
  """Returns the measurements of each round by model, without a first round that compiles."""
  measured = []
  for i in range(rounds + 1):
    order = sorted(models, reverse=i % 2 == 0)
    measured.append({name: models[name].run() for name in order})
    progress.add(1)
  return measured[1:]


def _spread(values: Sequence[float]) -> dict[str, float]:
  return {"median": statistics.median(values), "least": min(values), "most": max(values)}
