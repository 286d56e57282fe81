"""`evaluate`: models on held-out text, beside their teacher, and on the sets in `evals`."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.errors import InputError
from distill_jax.evals import generative, multiple_choice, next_token
from distill_jax.evals.likelihood import Scorer
from distill_jax.evals.model_slot import ModelSlot
from distill_jax.evals.questions import Questions, read_questions
from distill_jax.evals.retrieval import Retrieval
from distill_jax.evals.similarity import Similarity
from distill_jax.models import loading
from distill_jax.models.options import ModelOptions
from distill_jax.nn import params, sharding
from distill_jax.nn.quantise import QuantiseOptions
from distill_jax.records import collate
from distill_jax.report.benchmarks import text  # noqa: F401
from distill_jax.runtime import distributed, json_io
from distill_jax.runtime.progress import Progress
from distill_jax.tasks import TextTask, dataset, pseudo_labels
from distill_jax.tasks.dataset import Row
from distill_jax.training.step import online
from distill_jax.types import IN_BATCH_CLASSES, Batch, Mean

TIMED = 2  # passes over one batch that the throughput is taken from
ANSWERS = "evals"  # the folder of what models answered, by model and set


def run(config: Config, folder: Path) -> dict[str, Any]:
  """Measures models on held-out text, where evaluate.heldout, and on the sets in `evals`.

  Writes evaluation.json into the workdir and returns it (on the first process whole):

  models: by name ("teacher", "start", then those of evaluate.models), each with ce,
    perplexity, kl, agreement, accuracy, entropy, parameters, bytes and tokens_per_second
    (scoring, measured here), all on the same sequences, against the teacher's own pass.
  tokens, corpus: how many of them, of what. With `tasks`, these are of the first, and `tasks`
    holds models and tokens of each; a token is a label. Of pairs, ce, kl, agreement and accuracy
    are among those of a batch, and recall among all (evals/_retrieval.py).
    A task of texts adds how near to them the models' own come: bleu and chrf, or wer.
  evals: by the name of a set, then of a model: questions, left_out and numbers, each {value,
    low, high}: see evals/_words.py and evals/_choices.py, which keep what they did in
    evals/MODEL/SET of the workdir. A set needs no teacher, and each model has its own tokenizer.

  Raises:
    InputError: there is nothing to measure; config, models, data and sets do not fit together.
    Preempted: SIGTERM came while answers were sampled; finished ones are kept.
  """
  asked = check(config)
  mesh = sharding.make_mesh(**vars(config.mesh))
  sharding.check_batch("evaluate.batch_size", config.evaluate.batch_size, mesh)
  questions = {
    name: read_questions(name, benchmark, config.evaluate.on_bad)
    for name, benchmark in config.evals.items()
  }
  evaluation: dict[str, Any] = _heldout(config, mesh) if config.evaluate.heldout else {"models": {}}
  if config.evals:
    by_set: dict[str, dict[str, Any]] = {name: {} for name in config.evals}
    for model, spec in asked.items():
      for name, row in _on_sets(config, spec, questions, mesh, folder / ANSWERS / model).items():
        by_set[name][model] = row
    evaluation["evals"] = by_set
  distributed.run_on_process_0(lambda: json_io.write_json(folder / "evaluation.json", evaluation))
  return evaluation


def check(config: Config) -> dict[str, ModelOptions]:
  """The models that are asked the sets; refuses what cannot be measured, with nothing read."""
  if not config.evaluate.heldout and not config.evals:
    raise InputError(
      "evaluate.heldout is False and evals is empty: there is nothing to measure; add a set as "
      "evals.gsm8k = config.benchmark('gsm8k')"
    )
  asked = _asked(config) if config.evals else {}
  _check_served(config, asked)
  return asked


def _specs(config: Config) -> dict[str, ModelOptions]:
  """All models but the teacher."""
  plain = dataclasses.replace(
    config.student.as_trained(""), train="whole", quantise=QuantiseOptions()
  )
  sources = config.evaluate.models
  trained = {name: dataclasses.replace(plain, source=source) for name, source in sources.items()}
  return {"start": config.student, **trained}


def _asked(config: Config) -> dict[str, ModelOptions]:
  """The models that are asked the sets."""
  known = {"teacher": config.teacher, **_specs(config)}
  names = config.evaluate.on or tuple(config.evaluate.models) or ("teacher",)
  if strange := [name for name in names if name not in known]:
    raise InputError(
      f"evaluate.on names {strange[0]!r}, which is no model here; they are {', '.join(known)}"
    )
  return {name: known[name] for name in names}


def _check_served(config: Config, asked: dict[str, ModelOptions]) -> None:
  """Refuses what needs a model's likelihoods of a server."""
  all_of = {"teacher": config.teacher, **_specs(config)}
  served = [n for n, spec in all_of.items() if generative.is_served(spec)]
  if served and config.evaluate.heldout:
    raise InputError(
      f"model {served[0]!r} is a server, which does not say how likely it finds a text; "
      "set evaluate.heldout=False, or measure it by itself"
    )
  if config.generate.server.url and "teacher" in asked:
    served.append("teacher")
  for name, of in config.evals.items():
    if of.judge() is None and (whom := [n for n in served if n in asked]):
      raise InputError(
        f"evals.{name} goes by the likelihood of its choices, which {whom[0]!r}, a server, does "
        "not say; leave one of the two out, by evaluate.on"
      )


def _on_sets(
  config: Config, spec: ModelOptions, questions: dict[str, Questions], mesh: Any, folder: Path
) -> dict[str, dict[str, Any]]:
  """One model on all sets: first those of choices, then those of words, which take it apart."""
  key = "teacher" if spec is config.teacher else "student"
  model = ModelSlot(spec, mesh, loading.keys(config.seed)[key])
  rows: dict[str, dict[str, Any]] = {}
  choices = {name: q for name, q in questions.items() if config.evals[name].judge() is None}
  if choices:
    tokenizer = corpus.tokenizer_of(config.data, loading.pretrained(spec))
    size, chunk = config.evaluate.batch_size, config.evaluate.chunk
    scorer = Scorer(model.stacked(), mesh, tokenizer, size, chunk)
    for name, q in choices.items():
      rows[name] = multiple_choice.measure(scorer, tokenizer, q, folder / name)
    del scorer  # it holds the model whole
  for name, q in questions.items():
    if name not in choices:
      of = config.evals[name]
      rows[name] = generative.measure(config, spec, of, q, folder / name, model.unrolled)
  return {name: rows[name] for name in questions}


def _heldout(config: Config, mesh: Any) -> dict[str, Any]:
  """Every model on the same held-out sequences."""
  with jax.set_mesh(mesh):
    keys = loading.keys(config.seed)
    teacher = loading.build(config.teacher, mesh, keys["teacher"])
    parts = _tasks(config, teacher) if config.tasks else {"": _text(config, teacher)}
    models = {"teacher": teacher} | {
      n: loading.build(s, mesh, keys["student"]) for n, s in _specs(config).items()
    }
    by_part = {
      name: _measure_all(config, models, rows, classes, mesh)
      for name, (rows, classes) in parts.items()
    }
    for name, task in config.tasks.items():
      if isinstance(task, TextTask):
        rows: Any = parts[name][0]
        source, most = rows.examples.source, config.evaluate.sequences
        for n, m in models.items():
          outputs = pseudo_labels.decode_texts(m, task, source, mesh, most)
          by_part[name][n] |= task.scores(outputs, source)
  first = next(iter(by_part.values()))
  tokens = {name: results["teacher"].pop("tokens") for name, results in by_part.items()}
  for results in by_part.values():
    for row in results.values():
      row.pop("tokens", None)
  if not config.tasks:
    where = f"{config.data.kind} {config.data.path} heldout"
    return {"models": first, "tokens": sum(tokens.values()), "corpus": where}
  of = {name: {"models": by_part[name], "tokens": tokens[name]} for name in by_part}
  where = f"{', '.join(by_part)} heldout"
  return {"models": first, "tokens": next(iter(tokens.values())), "corpus": where, "tasks": of}


def _text(config: Config, teacher: loading.LoadedModel) -> tuple[Sequence[Row], int]:
  """Packed held-out sequences, and how many tokens there are."""
  data = dataclasses.replace(config.data, split="heldout", sequences=config.evaluate.sequences)
  tokenizer = corpus.tokenizer_of(data, teacher.pretrained)
  corpus.check(data, tokenizer, teacher.config.vocab_size, teacher.config.max_position_embeddings)
  return list(corpus.sequences(data, tokenizer, teacher.pretrained)), tokenizer.vocab_size


def _tasks(config: Config, teacher: loading.LoadedModel) -> dict[str, tuple[Sequence[Row], int]]:
  """By task: its held-out rows, and how many rows of the heads are classes."""
  pretrained, most = teacher.pretrained, config.evaluate.sequences
  rows = {n: dataset.open_examples(config, n, "heldout", pretrained, most) for n in config.tasks}
  dataset.check_model(rows, teacher.config)
  classes = sum(of.source.classes for of in rows.values())
  ranges = dataset.class_ranges(rows)
  return {
    name: (dataset.RecordedTask(of, class_range=ranges[name]), classes) for name, of in rows.items()
  }


def _measure_all(
  config: Config,
  models: dict[str, loading.LoadedModel],
  rows: Sequence[Row],
  vocab_size: int,
  mesh: Any,
) -> dict[str, dict[str, float]]:
  """Every model on every batch; the teacher runs once a batch for all of them."""
  chunk, size = config.evaluate.chunk, config.evaluate.batch_size
  where = sharding.batch_sharding(mesh)
  forward = {n: jax.jit(functools.partial(online, compute=m.compute)) for n, m in models.items()}
  compare = jax.jit(
    functools.partial(next_token.compare, chunk=chunk, vocab_size=vocab_size),
    out_shardings=sharding.replicated(mesh),
  )
  totals: Any = None
  found = _gatherer(vocab_size)
  read, n = dataset.reader(config.tasks), -(-len(rows) // size)
  with Progress("evaluate", n * size * len(rows[0]["mask_T"]), "tokens") as progress:
    for batch in _batches(rows, size, read):
      batch = collate.to_device(batch, where)
      outputs = {n: forward[n](m.model, batch.inputs)[0] for n, m in models.items()}
      means = jax.device_get(compare(outputs, batch))
      if found is not None:
        found.add(outputs, batch)
      totals = means if totals is None else jax.tree.map(np.add, totals, means)
      progress.add(batch.mask_BT.size)
  of = lambda n, m: _row(totals[n]) | _size(m) | _speed(m, batch, chunk)
  more = lambda n: {} if found is None else found.row(n)
  return {n: of(n, m) | more(n) for n, m in models.items()}


def _gatherer(classes: int) -> Retrieval | Similarity | None:
  """What is measured of embeddings; a head of one row says nothing else of them."""
  if classes == IN_BATCH_CLASSES:
    return Retrieval()
  return Similarity() if classes == 1 else None


def _row(means: dict[str, Mean]) -> dict[str, float]:
  row = {name: float(mean.value()) for name, mean in means.items()}
  return row | {"perplexity": math.exp(min(row["ce"], 700)), "tokens": float(means["ce"].count)}


def _size(m: loading.LoadedModel) -> dict[str, int]:
  weights = jax.tree.leaves(m.model)
  return {"parameters": params.count(m.model), "bytes": sum(w.nbytes for w in weights)}


def _speed(m: loading.LoadedModel, batch: Batch, chunk: int) -> dict[str, float]:
  score = jax.jit(functools.partial(next_token.score, compute=m.compute, chunk=chunk))
  jax.block_until_ready(score(m.model, batch))  # compile
  start = time.perf_counter()
  for _ in range(TIMED):
    jax.block_until_ready(score(m.model, batch))
  return {"tokens_per_second": TIMED * batch.mask_BT.size / (time.perf_counter() - start)}


def _batches(rows: Sequence[Row], size: int, read: Any = None) -> Iterator[Batch]:
  """This process's rows of batches of one size; the last is filled up with padding alone."""
  empty = {name: np.zeros_like(x) for name, x in rows[0].items()}
  for i in range(0, len(rows), size):
    some = rows[i : i + size]
    whole = [*some, *[empty] * (size - len(some))]
    yield collate.collate(whole[jax.process_index() :: jax.process_count()], read=read)
