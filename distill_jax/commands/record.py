"""Runs the teacher over the corpus once and stores its outputs for training.

Students are trained on this store, without the teacher. Each token takes a few dozen bytes: a
sample or the top-k of the teacher's distribution (records.kind). Finished shards are skipped when
the command is run again. With records.served, servers run the teacher: they get the tokens and give
the log-probabilities. records.logprobs imports the outputs of a served teacher instead.

With records.heldout_sequences, rows of the held-out split are recorded too, and with data.buckets
each length of sequences has a store; the teacher is loaded once for all of them. Text is read from
stores that `pack` made (data.packed), or is packed into WORKDIR/packed first. With
records.student_tokenizer, the store is in the tokens of a student with another tokenizer.

Reads: the teacher (`teacher`), and the corpus in `data` or the examples of `tasks`.

Writes: a store in the workdir: manifest.json and shards (*.array_record); with data.buckets, a
store in the folder of each length, e.g. WORKDIR/4096. Held-out rows are in WORKDIR/heldout.

Config: seed, mesh, teacher, data, pack, records, generate.server, retarget, tasks.

Example:
  distill-jax record --config=configs/demo.py --workdir=runs/demo/records
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jax.sharding import Mesh

from distill_jax.commands import pack
from distill_jax.config import Config
from distill_jax.errors import InputError, bad_value
from distill_jax.models import loading, long_context
from distill_jax.models.loading import ModelSource
from distill_jax.nn import sharding
from distill_jax.records import (
  collate,
  job,
  planned_stores,
  served_store,
  student_corpus,
  tap_features,
)
from distill_jax.records.job import Part
from distill_jax.records.loaded_teacher import LoadedTeacher
from distill_jax.records.manifest import Manifest
from distill_jax.records.recording import Corpus
from distill_jax.tasks import dataset
from distill_jax.types import JsonObject

if TYPE_CHECKING:
  from distill_jax.served.teacher import ServedTeacher

PACKED = "packed"  # the folder of the text in the workdir


def run(config: Config, folder: Path) -> JsonObject:
  """Writes the stores of a corpus into `folder`; finished shards are skipped.

  Returns:
    sequences, tokens, entries and bytes of the stores of all lengths together, and recorded_now,
    the number of sequences that this call recorded; tokens, entries and bytes on process 0 only.
    With data.buckets also LENGTH/sequences, the number of sequences of a length. Those of held-out
    rows begin with heldout/, e.g. heldout/sequences.

  Raises:
    InputError: Teacher, tokenizer and corpus do not fit together, or the folder contains other
      records. It is raised before anything is compiled.
  """
  teacher = loading.open_source(config.teacher, config.seed)
  student_corpus.check(config)
  planned = planned_stores.planned(config)
  if not (config.tasks or config.records.served or job.runs_teacher(config.records)):
    stored = {split: _store_text(c, teacher, folder / split) for split, c in planned.items()}
    return planned_stores.flat({split: _sizes(*of_split) for split, of_split in stored.items()})
  with contextlib.ExitStack() as stack:
    served = None
    if config.records.served:
      served = stack.enter_context(_served_teacher(config, teacher))
    mesh = config.mesh.make()
    if job.runs_teacher(config.records):
      # Raises InputError if the mesh does not divide the teacher.
      sharding.shardings(teacher.abstract, mesh, teacher.compute.rules)
    options = config.records
    tap_features.check(options, of_task=bool(config.tasks))
    sharding.check_batch("records.batch_size", options.batch_size, mesh)
    positions = long_context.positions(config.data)
    long_context.check(mesh, positions, [teacher], of_tasks=bool(config.tasks))
    teacher.check_digest()
    packed = folder / PACKED
    corpora = {split: open_corpora(c, teacher, packed / split) for split, c in planned.items()}
    _check_held_out(corpora)
    if config.records.student_tokenizer:
      corpora = student_corpus.corpora(config, teacher, corpora)
    parts: dict[str, dict[str, Part]] = {split: {} for split in planned}
    for split, by_length in corpora.items():
      for length, c in by_length.items():
        at, size = folder / split / length, _batch_size(config, c)
        identity = served.identity if served else None
        opened = job.open_part(options, teacher, c, at, mesh, size, identity)
        parts[split][length] = stack.enter_context(opened)
    together = [part for by_length in parts.values() for part in by_length.values()]
    job.check_shards(options, together)
    if served:
      served.check(together)
    runner = served or _runner(config, teacher, together[0].corpus, mesh)
    job.record("record", together, runner, mesh)
  sizes = {}
  for split, by_name in parts.items():
    now = sum(len(shard) for part in by_name.values() for shard in part.missing)
    sizes[split] = _sizes({name: part.writer.manifest for name, part in by_name.items()}, now)
  return planned_stores.flat(sizes)


def _batch_size(config: Config, corpus: Corpus) -> int:
  """Returns the number of rows of a batch, whose tokens are those of the longest sequences."""
  size = config.records.batch_size
  return size if corpus.is_task else size * config.data.seq_len // corpus.teacher_positions


def _served_teacher(config: Config, teacher: ModelSource) -> ServedTeacher:
  """Returns the teacher on servers, of which `teacher` has the tokenizer."""
  from distill_jax.served.teacher import ServedTeacher  # needs an extra

  if config.tasks:
    expected = "no tasks with records.served, because servers score text"
    raise bad_value("tasks", list(config.tasks), expected, "Remove one of the two keys")
  return ServedTeacher(config, teacher.pretrained, config.data.kind == "chat")


def _runner(
  config: Config, teacher: ModelSource, corpus: Corpus, mesh: Mesh
) -> LoadedTeacher | None:
  """Returns the teacher that computes the targets of all corpora; None if none runs."""
  if not job.runs_teacher(config.records):
    return None
  return LoadedTeacher(config, teacher, mesh, corpus, _reader(config))


def _sizes(stores: Mapping[str, Manifest], recorded_now: int) -> JsonObject:
  """Returns the sizes of the stores of a split, by length."""
  sizes = planned_stores.sizes(stores, ("tokens", "entries", "bytes"))
  return sizes | {"recorded_now": recorded_now}


def _store_text(
  config: Config, teacher: ModelSource, folder: Path
) -> tuple[dict[str, Manifest], int]:
  """Writes stores that need no model: of packed text, or of a served teacher's outputs.

  Returns:
    The manifests by length, "" without data.buckets, and the number of sequences that this process
    stored.
  """
  if config.records.logprobs:
    manifest, now = served_store.make(config, teacher, folder)
    return {"": manifest}, now
  if config.data.packed:
    expected = "'' with records.kind='text', because `train` reads that store"
    action = "Add it to train.records instead of recording"
    raise bad_value("data.packed", config.data.packed, expected, action)
  stores, now = pack.make(config, teacher, folder)
  return {config.data.folder_of_length[n]: s.manifest for n, s in stores.items()}, now


def open_corpora(config: Config, teacher: ModelSource, packed: Path) -> dict[str, Corpus]:
  """Opens the text or the task of a config.

  Args:
    config: The config.
    teacher: The teacher.
    packed: The folder in which text is packed.

  Returns:
    The corpora by length; the key of one without data.buckets, and of a task, is "".

  Raises:
    InputError: The data does not exist, or the teacher cannot read it.
  """
  pretrained, data = teacher.pretrained, config.data
  if config.tasks:
    recorded = config.records.kind != "text"
    return {"": dataset.open_corpus(config, pretrained, teacher.config if recorded else None)}
  rows_of, tokenizer = pack.open_rows(config, teacher, packed)
  return {
    data.folder_of_length[n]: Corpus.of_text(rows, tokenizer, n, data.fraction_of_split)
    for n, rows in rows_of.items()
  }


def _reader(config: Config) -> collate.Read | None:
  """Returns the function that reads batches of the recorded task; None for text."""
  if not config.tasks:
    return None
  name = dataset.recorded_task(config)
  return dataset.reader({name: config.tasks[name]})


def _check_held_out(corpora: Mapping[str, Mapping[str, Corpus]]) -> None:
  """Raises InputError if the held-out rows are rows to train on, given the corpora by split."""
  trained_on = {corpus.digest for corpus in corpora[""].values()}
  heldout = corpora.get(planned_stores.HELDOUT, {})
  if any(corpus.digest in trained_on for corpus in heldout.values()):
    raise InputError(
      "The held-out rows are the rows to train on. Name held-out data, or set "
      "records.heldout_sequences=0."
    )
