"""Sampling from a model on local devices, many prompts at once."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from distill_jax.data import corpus
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import bad_value
from distill_jax.generation import outputs, placement
from distill_jax.generation.engine import Engine, EngineSpec
from distill_jax.generation.finished import ALL, Done
from distill_jax.generation.job import GenerationJob
from distill_jax.generation.local_writer import LocalWriter
from distill_jax.generation.prompts import Prompt, Prompts, Summary, missing_samples
from distill_jax.generation.scheduler import Scheduler, Task
from distill_jax.generation.stops import Stops
from distill_jax.generation.to_records import GeneratedStore
from distill_jax.generation.unrolled import Unrolled
from distill_jax.hub.tokenizer import check_vocabulary
from distill_jax.models.runs import keys
from distill_jax.nn import kv_cache, sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.records.options import RecordsOptions
from distill_jax.runtime import distributed
from distill_jax.runtime.progress import Progress
from distill_jax.types import JsonObject

LoadModel = Callable[[], tuple[Unrolled, ComputeConfig]]


def generate(
  job: GenerationJob,
  folder: Path,
  load_model: LoadModel | None = None,
  store: GeneratedStore | None = None,
) -> JsonObject:
  """Samples texts and writes them to `folder`, ordered by prompt and sample; see outputs.py.

  A line of the samples has these fields:
    id, sample: The indices of the prompt and of the sample.
    prompt: The prompt, as text or messages.
    about: The other fields of the prompt's line, and its prompt if there is a template.
    text: The text, without the stop string or token that ended it.
    token_count: The number of tokens, including the one that ended the text.
    reason: Why the text ended: "stop", "eos", "length" or "repetition".
    logprob, logprob_mean: The sum and the mean of the tokens' log-probabilities in nats, under the
      model without temperature and truncation.

  A text depends only on (seed, prompt, sample), except for floating-point ties, which may be broken
  differently with other batch sizes or devices. An interrupted run is resumed, with the same
  result. All processes decode all rows; the first one writes.

  Args:
    job: The job.
    folder: The workdir.
    load_model: Returns the model, if samples are missing. None: job.model is loaded.
    store: A store that receives the texts too. None: no store.

  Returns:
    A dict with prompts, rejected, samples, tokens (their numbers), the number of samples for each
    reason, and tokens_per_second of this process's part; with a store, also its sequences,
    record_tokens, entries and bytes.

  Raises:
    InputError: If the job and the model are inconsistent; raised before compilation.
    Preempted: If SIGTERM was received. Finished samples are kept.
  """
  mesh = job.mesh.whole_rows().make()
  tokenizer = corpus.tokenizer_of(job.data, job.source.pretrained)
  stops = check_settings(job, tokenizer, mesh, store)
  prompts = Prompts(job, tokenizer)
  summary = prompts.summary()
  origin = {"prompts": summary.digest, "teacher": job.source.identity}
  result: JsonObject = {}
  distributed.run_on_process_0(lambda: result.update(outputs.finished_result(folder, origin) or {}))
  if distributed.max_over_processes(len(result)):
    return result
  writers: list[LocalWriter] = []  # one on the first process, none on others
  distributed.run_on_process_0(
    lambda: writers.append(LocalWriter(job, folder, origin, tokenizer, stops, store))
  )
  try:
    load_model = load_model or (lambda: _load(job, mesh))
    rate = _decode(job, mesh, tokenizer, stops, prompts, summary, writers, load_model, store)
    result = {"prompts": summary.prompts}
    distributed.run_on_process_0(lambda: result.update(writers[0].finish(result)))
  finally:
    for writer in writers:
      writer.close()
  return result | {"tokens_per_second": rate}


def check(job: GenerationJob) -> None:
  """Checks a job and its prompts without reading weights.

  Raises:
    InputError: If `generate` would raise it.
  """
  tokenizer = corpus.tokenizer_of(job.data, job.source.pretrained)
  check_settings(job, tokenizer, job.mesh.whole_rows().make())
  Prompts(job, tokenizer).summary()


def check_settings(
  job: GenerationJob, tokenizer: Tokenizer, mesh: Mesh, store: GeneratedStore | None = None
) -> Stops:
  """Checks a job, except for its prompts, and returns its end conditions. No weights are read."""
  c, shape = job.decoding, job.source.text_config
  job.check()
  for key, value in (
    ("generate.batch_size", c.batch_size),
    ("generate.prefill_rows", c.prefill_rows),
    ("generate.prefill_chunk", c.prefill_chunk),
    ("generate.steps", c.steps),
  ):
    if value < 1:
      raise bad_value(key, value, "a positive integer", "Increase it")
  placement.check(c)
  if c.cache_dtype not in kv_cache.DTYPES:
    raise bad_value(
      "generate.cache_dtype",
      c.cache_dtype,
      f"one of {kv_cache.DTYPES}, where '' means the compute dtype",
      "Choose one of them",
    )
  if not 2 <= c.cache_len <= shape.max_position_embeddings:
    raise bad_value(
      "generate.cache_len",
      c.cache_len,
      f"2 to {shape.max_position_embeddings}, the model's limit",
      "Correct it",
    )
  check_vocabulary(tokenizer.vocab_size, shape.vocab_size, tokenizer.where)
  sharding.shardings(job.source.abstract, mesh, job.source.compute.rules)  # raises if invalid
  if store is not None:
    store.check()
  return Stops(tokenizer, job.stop, job.repetition)


def end_tokens(job: GenerationJob, tokenizer: Tokenizer) -> tuple[int, ...]:
  """Returns the tokens that end a text: those of the generation config, and the document's end."""
  if job.ignore_eos:
    return ()
  named = job.source.generation.get("eos_token_id")
  ids = named if isinstance(named, list) else [named]
  return tuple(sorted({i for i in (*ids, tokenizer.eos_id) if i is not None}))


def _decode(
  job: GenerationJob,
  mesh: Mesh,
  tokenizer: Tokenizer,
  stops: Stops,
  prompts: Prompts,
  summary: Summary,
  writers: Sequence[LocalWriter],
  load_model: LoadModel,
  store: GeneratedStore | None,
) -> float:
  """Generates the missing samples and returns the tokens per second."""
  done = _done(writers)
  total = summary.prompts * job.samples
  start = sum(writer.journal.counts.samples for writer in writers)
  missing = missing_samples(prompts.read(done.first), job.samples, done)
  tasks = _tasks(missing, writers)
  if (first := next(tasks, None)) is None:
    for writer in writers:
      writer.flush()
    return 0.0
  tokens = 0
  with (
    jax.set_mesh(mesh),
    distributed.Preemption() as preemption,
    Progress("generate", total, "samples", start=start) as progress,
  ):
    model, compute = load_model()
    scheduler = make_scheduler(
      job, mesh, tokenizer, stops, model, compute, store.records if store else None
    )
    began = time.perf_counter()
    try:
      for finished, new_tokens in scheduler.run(itertools.chain([first], tasks)):
        tokens += new_tokens
        for writer in writers:
          writer.add(finished)
        progress.add(len(finished), tokens_per_second=tokens / (time.perf_counter() - began))
        if preemption.reached():
          raise distributed.Preemption.stop("generate", "finished samples are kept")
    finally:
      for writer in writers:
        writer.flush()
  return tokens / (time.perf_counter() - began)


def _tasks(missing: Iterable[tuple[Prompt, int]], writers: Sequence[LocalWriter]) -> Iterator[Task]:
  """Yields the samples to generate, and passes prompts that cannot be used to the writer."""
  for prompt, sample in missing:
    if sample != ALL:
      yield Task(prompt.number, sample, prompt.ids, prompt)
    else:
      for writer in writers:
        writer.reject(prompt)


def _done(writers: Sequence[LocalWriter]) -> Done:
  """Returns the finished samples, which the first process knows, on all processes."""
  own = writers[0].journal.done() if writers else Done(0, frozenset())
  first, count = distributed.broadcast_from_process_0(np.array([own.first, len(own.keys)]))
  keys = np.zeros((count, 2), np.int64)
  keys[: len(own.keys)] = sorted(own.keys) if own.keys else 0
  pairs = distributed.broadcast_from_process_0(keys).tolist()
  return Done(int(first), frozenset((p, s) for p, s in pairs))


def _load(job: GenerationJob, mesh: Mesh) -> tuple[Unrolled, ComputeConfig]:
  loaded = job.source.load(mesh, keys(job.seed)["teacher"])
  return placement.place(loaded.model, loaded.compute, mesh, job.decoding), loaded.compute


def make_scheduler(
  job: GenerationJob,
  mesh: Mesh,
  tokenizer: Tokenizer,
  stops: Stops,
  model: Unrolled,
  compute: ComputeConfig,
  records: RecordsOptions | None = None,
  fold: int | None = None,
) -> Scheduler:
  """Returns the scheduler that decodes a job.

  Args:
    job: The job.
    mesh: The devices.
    tokenizer: The tokenizer.
    stops: The end conditions of texts.
    model: The model with unrolled layers.
    compute: The compute settings.
    records: Settings for recording the distribution of each token. None: nothing is recorded.
    fold: A number on which the sampled tokens depend too, e.g. that of a round. None: none.
  """
  c, run_keys = placement.divisible(job.decoding, mesh), keys(job.seed)
  spec = EngineSpec(
    compute,
    job.sampling,
    c.steps,
    end_tokens(job, tokenizer),
    tokenizer.vocab_size,
    records,
    c.cache_dtype,
  )
  use = {name: run_keys[name] for name in ("generate", "records")}
  if fold is not None:
    use["generate"] = jax.random.fold_in(use["generate"], fold)
  engine = Engine(model, mesh, spec, c.batch_size, c.prefill_rows, c.cache_len, use)
  return Scheduler(engine, stops, spec.eos, c, job.max_new_tokens)
