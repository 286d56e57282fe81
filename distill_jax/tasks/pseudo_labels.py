"""What an encoder-decoder says of a task's examples, as text; and `generate` over a task."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill_jax.config import Config
from distill_jax.errors import InputError
from distill_jax.generation.beam_search import search
from distill_jax.models import loading
from distill_jax.nn import sharding
from distill_jax.records import collate
from distill_jax.runtime import distributed
from distill_jax.runtime.atomic_io import atomic_write
from distill_jax.runtime.progress import Progress

PAIRS = "pairs.jsonl"


def texts(
  model: loading.LoadedModel, task: Any, source: Any, mesh: Any, most: int = 0
) -> list[str]:
  """What a model says of each example of a source, in its order; of the first `most`, 0: of all.

  All batches have one shape, and a row's text does not depend on its company.
  """
  n, size = min(len(source), most or len(source)), task.batch_size
  sharding.check_batch("the task's batch_size", size, mesh)
  generation = model.pretrained.generation if model.pretrained else {}
  spec = task.search(model.config, source, generation)
  where, run = sharding.batch_sharding(mesh), _jitted(sharding.replicated(mesh))
  out: list[str] = []
  with Progress("decode", n, "texts") as progress:
    for first in range(0, n, size):
      # The last batch is filled up with its own first example.
      rows = [source[i if i < n else first] for i in range(first, first + size)]
      each = size // jax.process_count()
      mine = rows[jax.process_index() * each :][:each]  # in this order on the devices
      given = collate.to_device(task.inputs(functools.partial(_stack, mine)).source, where)
      tokens_BN, _ = jax.device_get(run(model.model, given, compute=model.compute, spec=spec))
      real = tokens_BN[: min(size, n - first)]
      out += [_text(ids, spec.eos, source.tokenizer) for ids in real.tolist()]
      progress.add(len(real))
  return out


def _stack(rows: list[dict[str, np.ndarray]], name: str) -> np.ndarray:
  return np.stack([row[name] for row in rows])


@functools.lru_cache(1)
def _jitted(said: Any) -> Any:
  """Models of one shape share what is compiled."""
  return jax.jit(search, static_argnames=("compute", "spec"), out_shardings=said)


def _text(ids: list[int], eos: int, tokenizer: Any) -> str:
  ids = ids[: ids.index(eos)] if eos in ids else ids
  special = {tokenizer.token_id(t) for t in tokenizer.special_tokens}
  return tokenizer.decode([i for i in ids if i not in special and i < tokenizer.vocab_size]).strip()


def write(config: Config, workdir: Path) -> dict[str, Any]:
  """`generate` over a task: what the teacher says of its training examples, as a file that the
  same task reads: sequence-level distillation (arXiv:1606.07947), pseudo-labels of speech. The
  file is there whole or not at all.

  Raises: InputError: the task is none of texts, there are several, or nothing is left.
  """
  from distill_jax.tasks import dataset

  ((name, task),) = dataset.chosen(config).tasks.items()
  if not hasattr(task, "labelled"):
    raise InputError(f"tasks.{name} is of {type(task).__module__}, which says no texts; leave it")
  mesh = sharding.make_mesh(**vars(config.mesh))
  sharding.check_batch(f"tasks.{name}.batch_size", task.batch_size, mesh)
  pretrained = loading.pretrained(config.teacher)
  task.check(loading.family_and_config(config.teacher)[1])
  source = task.open("train", pretrained)
  with jax.set_mesh(mesh):
    teacher = loading.build(config.teacher, mesh, loading.keys(config.seed)["teacher"])
    said = texts(teacher, task, source, mesh)
  lines, left_out = task.labelled(said, source)
  if not lines:
    raise InputError(f"all {len(said)} texts of tasks.{name} are left out; raise its limit")
  made = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
  distributed.run_on_process_0(lambda: atomic_write(workdir / PAIRS, made))
  return {
    "pairs": str(workdir / PAIRS),
    "kept": len(lines),
    "left_out": left_out,
    **task.scores(said, source),
  }
