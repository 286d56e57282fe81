"""Decoding of encoder-decoders, and `generate` over a task: sequence-level pseudo-labels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from distill_jax.config import Config
from distill_jax.data import jsonl
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError, bad_value
from distill_jax.generation.beam_search import search
from distill_jax.models import loading
from distill_jax.models.runs import keys
from distill_jax.nn import sharding
from distill_jax.records import collate
from distill_jax.runtime import distributed
from distill_jax.runtime.progress import Progress
from distill_jax.tasks import dataset
from distill_jax.tasks._base import Example, TextTask
from distill_jax.tasks._model_configs import Seq2SeqConfig
from distill_jax.types import JsonObject

PAIRS = "pairs.jsonl"


def decode_texts(
  model: loading.LoadedModel,
  task: TextTask,
  source: Any,
  mesh: jax.sharding.Mesh,
  max_examples: int = 0,
) -> list[str]:
  """Returns a model's output text for each example of a source, in its order.

  All batches have the same shape, and a text does not depend on the other rows of its batch.

  Args:
    model: An encoder-decoder.
    task: The task, which sets the decoding options.
    source: The examples of the task, from `task.open`.
    mesh: The mesh of the model.
    max_examples: Number of examples to decode; 0 for all.

  Raises:
    InputError: The task's `batch_size` is not divisible by the number of batch shards.
  """
  n, size = min(len(source), max_examples or len(source)), task.batch_size
  sharding.check_batch(f"{task.kind}.batch_size", size, mesh)
  generation = model.pretrained.generation if model.pretrained else {}
  spec = task.search(cast(Seq2SeqConfig, model.config), source, generation)
  rows = sharding.rows(mesh, size)
  jitted_search = _jitted_search(sharding.replicated(mesh))
  texts: list[str] = []
  with Progress("decode", n, "texts") as progress:
    for first in range(0, n, size):
      # The last batch is padded with its own first example.
      held = (first + rows.held).tolist()
      own = [source[i if i < n else first] for i in held]
      inputs = task.inputs(functools.partial(_stack, own))
      source_inputs = collate.to_device(inputs.source, rows)
      outputs = jitted_search(model.model, source_inputs, compute=model.compute, spec=spec)
      tokens_BN, _ = jax.device_get(outputs)
      tokens_BN = tokens_BN[: min(size, n - first)]
      texts += [_to_text(ids, spec.eos, source.tokenizer) for ids in tokens_BN.tolist()]
      progress.add(len(tokens_BN))
  return texts


def _stack(rows: list[Example], name: str) -> np.ndarray:
  return np.stack([row[name] for row in rows])


@functools.lru_cache(1)
def _jitted_search(
  out_sharding: jax.sharding.Sharding,
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """Returns the compiled search, shared by all models of the same shape."""
  return jax.jit(search, static_argnames=("compute", "spec"), out_shardings=out_sharding)


def _to_text(ids: list[int], eos: int, tokenizer: Tokenizer) -> str:
  ids = ids[: ids.index(eos)] if eos in ids else ids
  special = {tokenizer.token_id(t) for t in tokenizer.special_tokens}
  return tokenizer.decode([i for i in ids if i not in special and i < tokenizer.vocab_size]).strip()


def write_pseudo_labels(config: Config, workdir: Path) -> JsonObject:
  """Writes the teacher's outputs for a task's training examples to WORKDIR/pairs.jsonl.

  The file is in the task's format, for sequence-level distillation (arXiv:1606.07947) or
  pseudo-labelled speech. It is written atomically.

  Returns:
    The path of the file, the number of outputs kept and rejected, and the scores of the outputs.

  Raises:
    InputError: The task's models do not generate texts, the task is ambiguous, or every output is
      rejected.
  """
  name = dataset.recorded_task(config)
  task = config.tasks[name]
  if not isinstance(task, TextTask):
    raise bad_value(
      f"tasks.{name}.task",
      task.kind,
      "a task whose models generate texts, e.g. translation",
      "Choose another task; `generate` cannot run on this one",
    )
  mesh = config.mesh.whole_rows().make()
  sharding.check_batch(f"tasks.{name}.batch_size", task.batch_size, mesh)
  teacher = loading.open_source(config.teacher, config.seed)
  task.check(teacher.config)
  source = task.open("train", teacher.pretrained)
  with jax.set_mesh(mesh):
    loaded = teacher.load(mesh, keys(config.seed)["teacher"])
    outputs = decode_texts(loaded, task, source, mesh)
  lines, left_out = task.pseudo_labels(outputs, source)
  if not lines:
    raise InputError(
      f"All {len(outputs)} outputs for the task {name!r} are rejected. Raise max_wer if it is a "
      "speech task."
    )
  distributed.run_on_process_0(lambda: jsonl.write(workdir / PAIRS, lines))
  return {
    "pairs": str(workdir / PAIRS),
    "kept": len(lines),
    "left_out": left_out,
    **task.scores(outputs, source),
  }
