"""Prunes the teacher into a smaller student, or searches for the best shape near a target.

Set the sizes of the student (shrink.layers, shrink.hidden, …), or one target: shrink.target_params,
shrink.target_bytes or shrink.target_decode_rate. For a target, several shapes near it are made and
distilled for shrink.steps, and the one with the lowest held-out loss is recommended.

Reads: the teacher (`teacher`), and the corpus in `data` to measure the importance of its parts. For
a target, also the stores in train.records, if any.

Writes: the student as a Hugging Face folder, shrink.dir or "model" in the workdir; shrink.json with
the sizes and the losses. For a target: each candidate in candidates/ of the workdir. Finished parts
are skipped when the command is run again.

Config: seed, mesh, teacher, student, data, shrink, records, losses, optim, train.

Example:
  distill-jax shrink --config=configs/demo.py --workdir=runs/shrink --config.shrink.layers=20
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from distill_jax.commands import record
from distill_jax.config import Config
from distill_jax.errors import InputError, bad_value
from distill_jax.hub.export_folder import result_of
from distill_jax.models import loading
from distill_jax.pruning import search, shapes
from distill_jax.pruning.measured_teacher import MeasuredTeacher
from distill_jax.pruning.table import text  # noqa: F401
from distill_jax.runtime import json_io, storage
from distill_jax.types import JsonObject

RESULT = "shrink.json"


def run(config: Config, workdir: Path) -> JsonObject:
  """Prunes config.teacher according to config.shrink and writes shrink.json into `workdir`.

  Finished parts are not computed again.

  Returns:
    The content of shrink.json: `dir`; `kept`, by axis; `factorised`, by matrix; and `models`
    (teacher, student, and random: the student's shape with random weights), each with parameters,
    bytes in shrink.dtype, and ce, the held-out cross-entropy in nats per token. For a target:
    target, wanted, steps; teacher (ce); candidates by name (kept, dir, run, parameters, bytes,
    ce_before, ce, and decode_rate if that is the target); recommended, the candidate with the
    lowest held-out ce.

  Raises:
    InputError: The family does not support the shape, no shape meets the target, or the data does
      not fit. It is raised before anything is measured.
  """
  options = config.shrink
  sizes = [k for k in ("layers", *shapes.SIZES, "factorise", "window") if getattr(options, k)]
  targets = [k for k in search.TARGETS if getattr(options, k)]
  one_target = ", ".join(f"shrink.{k}" for k in search.TARGETS)
  if not targets and not sizes:
    raise InputError(
      f"The config does not set a size of the student. Set sizes, e.g. shrink.layers, or one of "
      f"{one_target}."
    )
  if len(targets) > 1:
    raise bad_value(
      f"shrink.{targets[1]}",
      getattr(options, targets[1]),
      f"0, because shrink.{targets[0]} is set",
      f"Set only one of {one_target}",
    )
  if targets and sizes:
    raise bad_value(
      f"shrink.{sizes[0]}",
      getattr(options, sizes[0]),
      f"its default, because shrink.{targets[0]} is set",
      "Set either sizes or a target",
    )
  result = workdir / RESULT
  if targets:
    if not result.exists():
      json_io.write_json_once(result, _search(config, workdir, targets[0]))
    return json_io.read_object(result, "delete it and run shrink again")
  if (earlier := result_of(result, "shrink")) is not None:
    return earlier
  target = options.dir or storage.location(workdir / "model")
  return MeasuredTeacher(config).make(options, target, result)


def _search(config: Config, workdir: Path, key: str) -> JsonObject:
  """Proposes, makes, distils and evaluates candidates, each in a folder of `workdir`/candidates."""
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
  """Returns the config with records to distil from.

  Without train.records, these are a store of the text alone, and the teacher runs in the step.
  """
  if config.train.records:
    return config
  text_store = workdir / "text"
  options = dataclasses.replace(
    config.records, kind="text", logprobs="", taps=(), heldout_sequences=0
  )
  record.run(dataclasses.replace(config, records=options), text_store)
  train = dataclasses.replace(config.train, records=(storage.location(text_store),), online=True)
  return dataclasses.replace(config, train=train)
