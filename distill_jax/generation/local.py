"""`generate`: the teacher goes on from prompts, many at once."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.generation import outputs, to_records
from distill_jax.generation import prompts as reading
from distill_jax.generation.engine import Device, Spec
from distill_jax.generation.journal import SampleJournal
from distill_jax.generation.sampling import Sampling
from distill_jax.generation.scheduler import Batch, Sample, SampleKey
from distill_jax.generation.stops import Stops
from distill_jax.generation.unrolled import Unrolled, unroll
from distill_jax.models import loading
from distill_jax.nn import kv_cache, sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.runtime import distributed
from distill_jax.runtime.progress import Progress

Load = Callable[[], tuple[Unrolled, ComputeConfig]]

SAMPLES, REJECTED = outputs.SAMPLES, outputs.REJECTED


def generate(config: Config, folder: Path, load: Load | None = None) -> dict[str, Any]:
  """Writes samples.jsonl into `folder`, an object a sample, by prompt and sample.

  A sample has `id` and `sample`, its numbers; `prompt`, text or messages as they were given,
  and `about`, the other fields of that line; `text`, without what ended it; `tokens`, with it;
  `reason`, one of stop, eos, length, repetition; `logprob` and `logprob_mean`, in nats, of its
  tokens under the model as it is. Prompts that cannot be used are in samples.rejected.jsonl.
  With generate.records_dir, a store of the same texts is made.

  Which text comes is a function of (seed, prompt, sample), but for ties that floating point
  breaks otherwise in a batch of another size or on other devices. The same command goes on
  where it was stopped, and gives what it would have given.

  `load` gives the teacher where there is more to do; without it, it is made from the config.

  Returns: prompts, rejected, samples, tokens, how many of each reason, and tokens_per_second
    of this process's part; sequences, entries and bytes of the store.

  Raises:
    InputError: config, prompts and model do not fit together, before anything is compiled.
    Preempted: SIGTERM came; finished samples are kept.
  """
  mesh = sharding.make_mesh(**vars(config.mesh))
  tokenizer = corpus.tokenizer_of(config.data, loading.pretrained(config.teacher))
  stops = _check(config, tokenizer, mesh)
  prompts = reading.read(config, tokenizer)
  about = {
    "prompts": _digest(prompts.ids),
    "teacher": loading.identity(config.teacher, config.seed),
  }
  before: list[dict[str, Any]] = []
  distributed.run_on_process_0(lambda: before.extend(outputs.before(folder, about)))
  if distributed.max_over_processes(len(before)):
    return before[0] if before else {}
  record = to_records.token_record(config.records) if _keeps_records(config) else None
  wanted = [(p, s) for p in prompts.ids for s in range(config.generate.samples)]
  finished: list[SampleJournal] = []
  distributed.run_on_process_0(lambda: finished.append(SampleJournal(folder, about, record)))
  try:
    load = load or (lambda: _load(config, mesh))
    rate = _decode(config, mesh, tokenizer, stops, prompts.ids, wanted, finished, load)
    result: dict[str, Any] = {"prompts": len(prompts.ids), "rejected": len(prompts.rejected)}
    publish = lambda: _publish(config, folder, tokenizer, prompts, finished[0])
    distributed.run_on_process_0(lambda: result.update(publish()))
  finally:
    for f in finished:
      f.close()
  distributed.run_on_process_0(lambda: outputs.finish(folder, about, result, finished[0]))
  return result | rate


def _check(config: Config, tokenizer: Tokenizer, mesh: Any) -> Stops:
  c, (_, shape) = config.generate, loading.family_and_config(config.teacher)
  for name in ("samples", "max_new_tokens", "prefill_chunk", "steps"):
    if getattr(c, name) < 1:
      raise InputError(f"generate.{name} is {getattr(c, name)}; it is at least 1")
  if c.cache_dtype not in kv_cache.DTYPES:
    raise InputError(
      f"generate.cache_dtype is {c.cache_dtype!r}; expected one of {kv_cache.DTYPES}, "
      "where '' means teacher.dtype"
    )
  if not 2 <= c.cache_len <= shape.max_position_embeddings:
    raise InputError(
      f"generate.cache_len is {c.cache_len}; it is at least 2, and this model reads at most "
      f"{shape.max_position_embeddings} tokens"
    )
  if tokenizer.vocab_size > shape.vocab_size:
    raise InputError(
      f"{tokenizer.where} has {tokenizer.vocab_size} tokens and the model's embedding "
      f"{shape.vocab_size} rows; take the tokenizer that belongs to these weights"
    )
  sharding.check_batch("generate.batch_size", c.batch_size, mesh)
  sharding.check_batch("generate.prefill_rows", c.prefill_rows, mesh)
  sharding.shardings(
    loading.abstract(config.teacher), mesh, loading.compute_config(config.teacher).rules
  )
  if c.records_dir:
    to_records.check(config)
  Sampling.of(c)
  return Stops(tokenizer, c.stop, c.repetition)


def _keeps_records(config: Config) -> bool:
  return bool(config.generate.records_dir) and config.records.kind != "text"


def _eos(config: Config, tokenizer: Tokenizer) -> tuple[int, ...]:
  """What ends a text: the ends that came with the model, and of a document."""
  if config.generate.ignore_eos:
    return ()
  pretrained = loading.pretrained(config.teacher)
  named = pretrained.generation.get("eos_token_id") if pretrained else None
  ids = named if isinstance(named, list) else [named]
  return tuple(sorted({i for i in (*ids, tokenizer.eos_id) if i is not None}))


def _decode(
  config: Config,
  mesh: Any,
  tokenizer: Tokenizer,
  stops: Stops,
  prompts: dict[int, list[int]],
  wanted: list[SampleKey],
  finished: list[SampleJournal],
  load: Load,
) -> dict[str, float]:
  """Makes the samples that are not there yet. Returns how fast.

  All processes decode all rows; the first one writes.
  """
  have = {outputs.number(row) for f in finished for row in f.rows}
  lacks = distributed.broadcast_from_process_0(np.array([w not in have for w in wanted]))
  todo = [w for w, lacking in zip(wanted, lacks, strict=True) if lacking]
  if not todo:
    return {"tokens_per_second": 0.0}
  tokens = 0
  with (
    jax.set_mesh(mesh),
    distributed.Preemption() as preemption,
    Progress("generate", len(wanted), "samples", start=len(wanted) - len(todo)) as progress,
  ):
    batch = batch_of(config, mesh, tokenizer, stops, prompts, *load())
    start = time.perf_counter()
    for n, (done, made) in enumerate(batch.run(todo)):
      tokens += made
      for f in finished:
        f.add([_row(s, stops) for s in done], [s.records for s in done])
      progress.add(len(done), tokens_per_second=tokens / (time.perf_counter() - start))
      if preemption.reached(n):
        raise distributed.Preemption.stop("generate", "finished samples are kept")
  return {"tokens_per_second": tokens / (time.perf_counter() - start)}


def _load(config: Config, mesh: Any) -> tuple[Unrolled, ComputeConfig]:
  teacher = loading.build(config.teacher, mesh, loading.keys(config.seed)["teacher"])
  return unroll(teacher.model, teacher.compute), teacher.compute


def batch_of(
  config: Config,
  mesh: Any,
  tokenizer: Tokenizer,
  stops: Stops,
  prompts: dict[int, list[int]],
  teacher: Unrolled,
  compute: ComputeConfig,
) -> Batch:
  """The decoder of a config, for prompts by number."""
  c, keys = config.generate, loading.keys(config.seed)
  spec = Spec(
    compute,
    Sampling.of(c),
    c.steps,
    _eos(config, tokenizer),
    tokenizer.vocab_size,
    config.records if _keeps_records(config) else None,
    c.cache_dtype,
  )
  device = Device(
    teacher,
    mesh,
    spec,
    c.batch_size,
    c.prefill_rows,
    c.cache_len,
    {name: keys[name] for name in ("generate", "records")},
  )
  return Batch(
    device,
    prompts,
    stops,
    spec.eos,
    rows=c.batch_size,
    fill=c.prefill_rows,
    chunk=c.prefill_chunk,
    size=c.cache_len,
    longest=c.max_new_tokens,
  )


def _row(s: Sample, stops: Stops) -> dict[str, Any]:
  """What is kept of a sample until all are there."""
  said = s.tokens[:-1] if s.reason == "eos" else s.tokens
  return {
    "prompt": s.prompt,
    "sample": s.sample,
    "text": stops.text(said),
    "tokens": s.tokens,
    "reason": s.reason,
    "logprob": sum(s.logps),
    "logprob_mean": sum(s.logps) / len(s.logps),
  }


def _publish(
  config: Config,
  folder: Path,
  tokenizer: Tokenizer,
  prompts: reading.Prompts,
  finished: SampleJournal,
) -> dict[str, Any]:
  """The files, whole and in order, from what was written on the way."""
  order = sorted(range(len(finished.rows)), key=lambda i: outputs.number(finished.rows[i]))
  rows = [finished.rows[i] for i in order]
  outputs.write_rejected(folder, prompts)
  made: dict[str, Any] = {}
  if config.generate.records_dir:
    records = lambda i: finished.records(order[i])
    made = to_records.write(config, tokenizer, prompts.ids, rows, records)
    made["record_tokens"] = made.pop("tokens")
  outputs.write(folder, rows, prompts)
  tokens = sum(len(row["tokens"]) for row in rows)
  return {"samples": len(rows), "tokens": tokens, **outputs.reasons(rows), **made}


def _digest(prompts: dict[int, list[int]]) -> str:
  return hashlib.sha256(json.dumps(list(prompts.items())).encode()).hexdigest()
