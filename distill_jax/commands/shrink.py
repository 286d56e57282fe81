"""`shrink`: a smaller student out of a teacher, as a Hugging Face folder; or the search for one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from distill_jax.commands import record
from distill_jax.config import Config
from distill_jax.errors import InputError
from distill_jax.models import loading
from distill_jax.pruning import search, shapes
from distill_jax.pruning.measured_teacher import MeasuredTeacher
from distill_jax.pruning.table import text  # noqa: F401
from distill_jax.runtime import json_io
from distill_jax.types import JsonObject

RESULT = "shrink.json"


def run(config: Config, workdir: Path) -> JsonObject:
  """Makes config.teacher smaller as config.shrink says, and writes shrink.json into `workdir`.

  With a target, several shapes near it are made and distilled a little, and one recommended.
  What is finished is not done again.

  Returns: what shrink.json holds: `dir`; `kept`, by axis; `factorised`, by matrix; and of
    `models` (teacher, student, and random: the student's shape with random weights)
    parameters, bytes in shrink.dtype, and ce, the held-out cross-entropy in nats a token.
    With a target: target, wanted, steps; teacher (ce); candidates by name (kept, dir, run,
    parameters, bytes, ce_before, ce, and decode_rate where that is the target); recommended,
    the one with the lowest held-out ce.

  Raises:
    InputError: a shape that the family cannot have, a target that no shape meets, data that
      does not fit; before anything is measured.
  """
  options = config.shrink
  if (workdir / RESULT).exists():  # finished before
    return json_io.read_object(workdir / RESULT, "delete it and run shrink again")
  sizes = [k for k in ("layers", *shapes.SIZES, "factorise", "window") if getattr(options, k)]
  targets = [k for k in search.TARGETS if getattr(options, k)]
  if len(targets) > 1 or bool(targets) == bool(sizes):
    raise InputError(
      f"shrink sets {', '.join(targets + sizes) or 'nothing'}; set sizes, such as shrink.layers, "
      f"or one of {', '.join(search.TARGETS)}"
    )
  if targets:
    result = _search(config, workdir, targets[0])
  else:
    result = MeasuredTeacher(config).make(options, options.dir or str(workdir / "model"))
  json_io.write_json_once(workdir / RESULT, result)
  return result


def _search(config: Config, workdir: Path, key: str) -> JsonObject:
  """Proposes, makes, distils and scores candidates, each in a folder of `workdir`/candidates."""
  teacher = loading.open_source(config.teacher, config.seed)
  proposed = search.propose(config, teacher, workdir, key)
  folders = {name: workdir / "candidates" / name for name in proposed}
  search.make(config, teacher, proposed, folders)
  config = with_records(config, workdir)
  for folder in folders.values():
    if not (folder / search.SCORE).exists():
      search.distil(config, folder)
  search.score(config, teacher, folders, rates=key == "target_decode_rate")
  return search.summary(config, folders, key)


def with_records(config: Config, workdir: Path) -> Config:
  """The config with records to distil from: its own, or text with the teacher in the step."""
  if config.train.records:
    return config
  text_store = workdir / "text"
  options = dataclasses.replace(config.records, kind="text", logprobs="", taps=())
  record.run(dataclasses.replace(config, records=options), text_store)
  train = dataclasses.replace(config.train, records=(str(text_store),), online=True)
  return dataclasses.replace(config, train=train)
