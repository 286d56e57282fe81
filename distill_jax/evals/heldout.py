"""Evaluation of models and their teacher on the same held-out sequences or examples."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.errors import InputError, bad_value
from distill_jax.evals import next_token
from distill_jax.evals.retrieval import Retrieval
from distill_jax.evals.similarity import Similarity
from distill_jax.evals.token_view import TokenView
from distill_jax.hub.tokenizer import check_vocabulary
from distill_jax.models import long_context, runs
from distill_jax.models.loading import LoadedModel, ModelSource
from distill_jax.nn import params, sharding
from distill_jax.records import collate
from distill_jax.records.store import open_store
from distill_jax.report.examples import Examples, Generation
from distill_jax.runtime.progress import Progress
from distill_jax.tasks import TextTask, dataset, model_checks, pseudo_labels
from distill_jax.training.outputs import run_teacher
from distill_jax.types import IN_BATCH_CLASSES, Batch, JsonObject, Mean

TIMED_PASSES = 2  # number of passes over one batch to measure the throughput

ModelResults = dict[str, float]  # results of one model


class HeldOut(NamedTuple):
  """The held-out data of a task or of the corpus.

  Attributes:
    examples: Records without targets; for text, a stream of them.
    classes: The number of rows of the models' heads that are classes or tokens; others are padding.
  """

  examples: Sequence[dict[str, np.ndarray]] | Iterator[dict[str, np.ndarray]]
  classes: int


def measure(
  config: Config, models: Mapping[str, ModelSource], mesh: jax.sharding.Mesh
) -> tuple[JsonObject, Examples]:
  """Evaluates models on held-out data.

  Args:
    config: The config.
    models: Opened models by name, including "teacher".
    mesh: The devices.

  Returns:
    A dict with the keys models, tokens, corpus and (with config.tasks) tasks, see
    commands/evaluate.py; and examples of the models' outputs on the data.

  Raises:
    InputError: If config, models and data are inconsistent.
  """
  sources = list(models.values())
  long_context.check(mesh, {"data": config.data.seq_len}, sources, of_tasks=bool(config.tasks))
  with jax.set_mesh(mesh):
    teacher = _load(config, models, "teacher", mesh)
    data = _tasks(config, teacher) if config.tasks else {"": _corpus(config, teacher)}
    others = {n: _load(config, models, n, mesh) for n in models if n != "teacher"}
    loaded = {"teacher": teacher, **others}
    view = None if config.tasks else _token_view(config, teacher, loaded, mesh)
    results = {name: _measure(config, loaded, part, mesh, view) for name, part in data.items()}
    generations: list[Generation] = []
    for name, task in config.tasks.items():
      if isinstance(task, TextTask):
        held = data[name].examples
        assert isinstance(held, dataset.RecordedTask)
        source, sequences = held.examples.source, config.evaluate.sequences
        outputs = {}
        for model, m in loaded.items():
          texts = pseudo_labels.decode_texts(m, task, source, mesh, sequences)
          results[name][model] |= task.scores(texts, source)
          outputs[model] = texts
        count = min(config.evaluate.examples, len(outputs["teacher"]))
        for i, (prompt, reference) in enumerate(task.shown(source, count)):
          by_model = {model: texts[i] for model, texts in outputs.items()}
          generations.append(Generation(prompt, by_model, reference))
  tokens = {name: rows["teacher"]["tokens"] for name, rows in results.items()}
  for rows in results.values():
    for row in rows.values():
      del row["tokens"]
  first = next(iter(results))
  evaluation: JsonObject = {"models": results[first], "tokens": tokens[first]}
  examples = Examples(tuple(view.texts) if view else (), tuple(generations))
  if not config.tasks:
    return evaluation | {"corpus": f"{config.data.kind} {config.data.path} heldout"}, examples
  evaluation |= {
    "corpus": f"{', '.join(results)} heldout",
    "tasks": {name: {"models": rows, "tokens": tokens[name]} for name, rows in results.items()},
  }
  return evaluation, examples


def comparable(config: Config, models: Mapping[str, ModelSource]) -> dict[str, ModelSource]:
  """Returns the models that can be compared with the teacher token by token.

  These are the models with the teacher's tokenizer; all of them if data.tokenizer is set, or the
  data are tasks.

  Args:
    config: The config.
    models: Opened models by name, including "teacher".

  Raises:
    InputError: A model lacks tokens of data.tokenizer, or has another tokenizer than the teacher
      although evaluate.texts is 0.
  """
  if config.tasks:
    return dict(models)
  if config.data.tokenizer:
    tokenizer = corpus.tokenizer_of(config.data, None)
    for model in models.values():
      check_vocabulary(tokenizer.vocab_size, model.text_config.vocab_size, tokenizer.where)
    return dict(models)
  digests = {
    name: corpus.of_files(model.tokenizer, model.name).digest
    for name, model in models.items()
    if model.tokenizer is not None
  }
  others = [n for n, digest in digests.items() if digest != digests.get("teacher", digest)]
  if others and not config.evaluate.texts:
    raise bad_value(
      "evaluate.texts",
      0,
      f"a positive number, because the tokenizer of {others[0]!r} is not the teacher's, and losses "
      "per token cannot be compared",
      "Set it, e.g. to 100, to compare bits per byte",
    )
  return {name: model for name, model in models.items() if name not in others}


def _token_view(
  config: Config, teacher: LoadedModel, models: Iterable[str], mesh: jax.sharding.Mesh
) -> TokenView | None:
  if not config.evaluate.examples:
    return None
  tokenizer = corpus.tokenizer_of(config.data, teacher.pretrained)
  return TokenView(config.evaluate.examples, tokenizer, list(models), mesh)


def recorded(
  config: Config, models: Mapping[str, ModelSource], mesh: jax.sharding.Mesh
) -> Examples:
  """Returns predictions on the store in train.heldout, whose records take the teacher's place.

  Args:
    config: The config.
    models: Opened students by name. Those with the tokenizer of the store are shown.
    mesh: The devices.

  Raises:
    InputError: No student has the store's tokenizer, or no probabilities that can be compared.
  """
  path = config.train.heldout[0]
  store = open_store(path)
  m = store.manifest
  tokenizers = {name: corpus.tokenizer_of(config.data, s.pretrained) for name, s in models.items()}
  models = {name: s for name, s in models.items() if tokenizers[name].digest == m.tokenizer}
  if not models:
    first = next(iter(tokenizers.values()))
    raise InputError(
      f"The held-out store {path} was made with another tokenizer than {first.where}. Name a "
      "store of the students' tokenizer in train.heldout, or set evaluate.examples=0."
    )
  tokenizer = tokenizers[next(iter(models))]
  has_kl = m.kind == "topk" or (m.kind == "sampled" and (m.entropy or m.logp))
  if not has_kl or m.temperature != 1:
    raise InputError(
      f"The held-out store {path} has the kind {m.kind!r} and temperature {m.temperature:g}; "
      "expected 'topk', or 'sampled' with entropies, and temperature 1. Record such a store, or "
      "set evaluate.examples=0."
    )
  long_context.check(mesh, {path: m.seq_len}, list(models.values()), of_tasks=False)
  count, shards = min(config.evaluate.examples, len(store)), sharding.row_shards(mesh)
  rows = sharding.rows(mesh, shards * -(-count // shards))
  # All rows are read by every process, so that their entries are padded to one number.
  records = store.read_many([min(i, len(store) - 1) for i in range(rows.size)])
  whole = collate.collate(records, recorded=collate.recorded_of(m))
  view = TokenView(count, tokenizer, list(models), mesh)
  with jax.set_mesh(mesh):
    batch = collate.to_device(jax.tree.map(lambda x: x[rows.held], whole), rows)
    outputs = {}
    for name in view.students:
      model = _load(config, models, name, mesh)
      forward = jax.jit(functools.partial(run_teacher, compute=model.compute))
      outputs[name] = forward(model.model, batch.inputs)[0]
    view.add(outputs, batch)
  return Examples(tuple(view.texts), samples=m.n if m.kind == "sampled" else 0)


def _load(
  config: Config, models: Mapping[str, ModelSource], name: str, mesh: jax.sharding.Mesh
) -> LoadedModel:
  key = runs.keys(config.seed)["teacher" if name == "teacher" else "student"]
  return models[name].load(mesh, key)


def _corpus(config: Config, teacher: LoadedModel) -> HeldOut:
  """Returns the held-out part of the corpus as packed sequences, which are read when needed."""
  data = dataclasses.replace(config.data, split="heldout", sequences=config.evaluate.sequences)
  tokenizer = corpus.tokenizer_of(data, teacher.pretrained)
  shape = teacher.text_config
  corpus.check(data, tokenizer, shape.vocab_size, shape.max_position_embeddings)
  sequences = corpus.sequences(data, tokenizer, teacher.pretrained)
  first = next(sequences)  # raises before the models are compiled
  return HeldOut(itertools.chain([first], sequences), tokenizer.vocab_size)


def _tasks(config: Config, teacher: LoadedModel) -> dict[str, HeldOut]:
  """Returns the held-out examples of each task. The models' heads have the classes of all tasks."""
  examples = {
    name: dataset.open_examples(
      config, name, "heldout", teacher.pretrained, config.evaluate.sequences
    )
    for name in config.tasks
  }
  model_checks.check_model(examples, teacher.config)
  classes = sum(e.source.classes for e in examples.values())
  ranges = dataset.class_ranges(examples)
  return {
    name: HeldOut(dataset.RecordedTask(e, class_range=ranges[name]), classes)
    for name, e in examples.items()
  }


def _measure(
  config: Config,
  models: Mapping[str, LoadedModel],
  data: HeldOut,
  mesh: jax.sharding.Mesh,
  view: TokenView | None,
) -> dict[str, ModelResults]:
  """Evaluates all models on all batches, and returns their results by name.

  The teacher runs once per batch. `view` collects predictions of the first batches.
  """
  chunk, size = config.evaluate.chunk, config.evaluate.batch_size
  rows = sharding.rows(mesh, size)
  forward = {
    n: jax.jit(functools.partial(run_teacher, compute=m.compute)) for n, m in models.items()
  }
  compare = jax.jit(
    functools.partial(next_token.compare, chunk=chunk, vocab_size=data.classes),
    out_shardings=sharding.replicated(mesh),
  )
  totals: dict[str, dict[str, Mean]] = {}
  embeddings = _embedding_metrics(data.classes)
  if isinstance(data.examples, Sequence):
    positions = len(data.examples[0]["mask_T"])
    total: int | None = -(-len(data.examples) // size) * size * positions
    batches = collate.padded_batches(data.examples, rows, dataset.reader(config.tasks))
  else:
    total, batches = None, collate.streamed_batches(data.examples, rows)
  with Progress("evaluate", total, "tokens") as progress:
    progress.begin("compiles the models")
    for own in batches:
      batch = collate.to_device(own, rows)
      outputs = {n: forward[n](m.model, batch.inputs)[0] for n, m in models.items()}
      means = jax.device_get(compare(outputs, batch))
      if embeddings is not None:
        embeddings.add(outputs, batch)
      if view is not None:
        view.add(outputs, batch)
      totals = jax.tree.map(np.add, totals, means) if totals else means
      progress.add(batch.mask_BT.size)
  results = {n: _row(totals[n]) | _size(m) | _speed(m, batch, chunk) for n, m in models.items()}
  if embeddings is None:
    return results
  return {n: row | embeddings.row(n) for n, row in results.items()}


def _embedding_metrics(classes: int) -> Retrieval | Similarity | None:
  """Returns the metrics for models whose outputs are embeddings, or None for other models."""
  if classes == IN_BATCH_CLASSES:
    return Retrieval()
  return Similarity() if classes == 1 else None


def _row(means: Mapping[str, Mean]) -> ModelResults:
  row = {name: float(mean.value()) for name, mean in means.items()}
  return row | {"perplexity": math.exp(min(row["ce"], 700)), "tokens": float(means["ce"].count)}


def _size(m: LoadedModel) -> ModelResults:
  weights = jax.tree.leaves(m.model)
  return {"parameters": params.count(m.model), "bytes": sum(w.nbytes for w in weights)}


def _speed(m: LoadedModel, batch: Batch, chunk: int) -> ModelResults:
  """Measures the tokens per second of scoring one batch."""
  score = jax.jit(functools.partial(next_token.score, compute=m.compute, chunk=chunk))
  jax.block_until_ready(score(m.model, batch))  # compilation
  start = time.perf_counter()
  for _ in range(TIMED_PASSES):
    jax.block_until_ready(score(m.model, batch))
  seconds = time.perf_counter() - start
  return {"tokens_per_second": TIMED_PASSES * batch.mask_BT.size / seconds}
