"""`record`: runs the teacher over the corpus once and stores its targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from distill_jax.config import Config
from distill_jax.data import corpus as text_corpus
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.models import loading, runs
from distill_jax.models.loading import ModelSource
from distill_jax.nn import sharding
from distill_jax.records import collate, import_logprobs, recorder, taps
from distill_jax.records.options import RecordsOptions
from distill_jax.records.recorder import Corpus, Record, Recorder
from distill_jax.records.shard_buffer import ShardBuffer
from distill_jax.records.store import Store, Writer
from distill_jax.runtime import distributed, storage
from distill_jax.runtime.progress import Progress
from distill_jax.tasks import dataset
from distill_jax.types import JsonObject


def run(config: Config, folder: Path) -> JsonObject:
  """Writes the store of a corpus into `folder`; what is already there is not done again.

  Returns:
    sequences in all and recorded_now; tokens, entries and bytes of the whole store.

  Raises:
    InputError: the teacher, tokenizer and corpus do not fit together, or the folder holds
      other records; before anything is compiled.
  """
  mesh = sharding.make_mesh(**vars(config.mesh))
  teacher = loading.open_source(config.teacher, config.seed)
  if runs_teacher(config.records):
    sharding.shardings(teacher.abstract, mesh, teacher.compute.rules)  # does it divide?
  options = config.records
  _check(options, of_task=bool(config.tasks))
  sharding.check_batch("records.batch_size", options.batch_size, mesh)
  teacher.check_digest()
  corpus = open_corpus(config, teacher)
  width = feature_width(options, teacher)
  manifest = recorder.manifest_of(options, corpus, _identity(options, teacher), width)
  if jax.process_count() > len(manifest.ranges):
    raise InputError(
      f"{jax.process_count()} processes record {len(manifest.ranges)} shards, and each writes "
      "shards of its own; start fewer or lower records.sequences_per_shard"
    )
  with Writer(folder, manifest, jax.process_index(), jax.process_count()) as writer:
    _check_same_corpus(writer, corpus.rows)
    todo = writer.missing()
    # Processes that have nothing left to write compute with the others.
    if distributed.max_over_processes(len(todo)):
      with jax.set_mesh(mesh):
        batches = _batches(config, teacher, corpus, todo, mesh)
        _write(batches, corpus.positions, todo, writer)
    distributed.barrier("recorded")
    if jax.process_count() > 1 and (url := storage.remote_of(folder)):  # they may share no disk
      storage.publish(folder)
      distributed.barrier("published")
      storage.fetch(url)
    done = writer.complete()
  if done is None:
    raise InputError(f"{folder} still lacks shards of a process that is not here; run it again")
  sums = {k: sum(getattr(s, k) for s in done.shards) for k in ("tokens", "entries", "bytes")}
  return {"sequences": done.total, "recorded_now": sum(map(len, todo)), **sums}


def runs_teacher(options: RecordsOptions) -> bool:
  """Returns whether recording runs a model: text has no teacher, a dump was made elsewhere."""
  return options.kind != "text" and not options.logprobs


def open_corpus(config: Config, teacher: ModelSource) -> Corpus:
  """Opens the text or the task of a config.

  Raises:
    InputError: it is not there, or the teacher cannot read it.
  """
  pretrained = teacher.pretrained
  if config.tasks:
    recorded = config.records.kind != "text"
    return dataset.open_corpus(config, pretrained, teacher.config if recorded else None)
  tokenizer = text_corpus.tokenizer_of(config.data, pretrained)
  if config.records.logprobs:
    text = list(_dump(config, tokenizer))
  else:
    shape = teacher.text_config
    text_corpus.check(config.data, tokenizer, shape.vocab_size, shape.max_position_embeddings)
    text = list(text_corpus.sequences(config.data, tokenizer, pretrained))
  return Corpus.of_text(text, tokenizer, config.data.seq_len)


def feature_width(options: RecordsOptions, teacher: ModelSource) -> int:
  """Returns the size of a tapped vector of the teacher; 0 without taps."""
  return taps.feature_width(teacher.config, options.tap_kind) if options.taps else 0


def _batches(
  config: Config,
  teacher: ModelSource,
  corpus: Corpus,
  shards: Sequence[range],
  mesh: Mesh,
) -> Iterator[Sequence[Record]]:
  """Returns the records of these shards, in order, at most a batch of one shard at a time.

  The teacher computes one batch ahead of the one that is read.
  """
  size = config.records.batch_size // jax.process_count()
  parts = recorder.split(shards, size)
  if not runs_teacher(config.records):
    return (corpus.rows[part.start : part.stop] for part in parts)
  dispatch = dispatcher(config, teacher, corpus, size, mesh)
  # All processes compute together, so those with less to write continue with padding alone.
  parts += [range(0)] * (distributed.max_over_processes(len(parts)) - len(parts))
  return recorder.recorded(dispatch, corpus.rows, parts)


def dispatcher(
  config: Config,
  teacher: ModelSource,
  corpus: Corpus,
  size: int,
  mesh: Mesh,
) -> Callable[[range], dict[str, jax.Array]]:
  """Loads the teacher; returns what starts its computation of at most `size` rows."""
  keys, options = runs.keys(config.seed), config.records
  loaded = teacher.load(mesh, keys["teacher"])
  width = feature_width(options, teacher)
  run = Recorder(options, loaded.compute, corpus.classes, corpus.first_class, width).jitted
  where = sharding.batch_sharding(mesh)
  read = _reader(config)
  padding = {name: np.zeros_like(x) for name, x in corpus.rows[0].items()}

  def dispatch(part: range) -> dict[str, jax.Array]:
    rows = corpus.rows[part.start : part.stop]
    padded = [*rows, *[padding] * (size - len(rows))]
    index = np.arange(part.start, part.start + size, dtype=np.int32)
    batch, index_B = collate.to_device((collate.collate(padded, read=read), index), where)
    return run(loaded.model, keys["records"], batch, index_B)

  return dispatch


def _reader(config: Config) -> collate.Read | None:
  """Returns what makes batches of the task that is recorded; None for text."""
  if not config.tasks:
    return None
  name = dataset.recorded_task(config)
  return dataset.reader({name: config.tasks[name]})


def _write(
  batches: Iterator[Sequence[Record]], positions: int, shards: list[range], writer: Writer
) -> None:
  """Writes the records of the missing shards behind the pass that makes them."""
  with (
    ShardBuffer(writer, shards) as buffer,
    Progress("record", sum(map(len, shards)) * positions, "tokens") as progress,
    distributed.Preemption() as preemption,
  ):
    for n, records in enumerate(batches):
      buffer.add(records)
      progress.add(len(records) * positions)
      if preemption.reached(n):
        break
  if distributed.max_over_processes(buffer.unfinished):
    raise distributed.Preemption.stop("record", "finished shards are kept")


def _identity(options: RecordsOptions, teacher: ModelSource) -> JsonObject:
  """Returns the teacher's name and digest, for the manifest."""
  if options.kind == "text":
    return {}
  if options.logprobs:
    return {"name": options.logprobs_format, "digest": "unknown: behind a server"}
  return teacher.identity


def _dump(config: Config, tokenizer: Tokenizer) -> Iterator[Record]:
  """Reads a served teacher's own responses with their log-probabilities."""
  c = config.records
  path = Path(c.logprobs)
  if not path.is_file():
    raise InputError(f"records.logprobs is {c.logprobs}, which is not there; name a JSONL file")
  if c.kind != "topk":
    raise InputError(f"records.kind is {c.kind!r}; a server's top log-probabilities are 'topk'")

  def token_id(token: str) -> int | None:
    ids = tokenizer.encode(token)
    return ids[0] if len(ids) == 1 else tokenizer.token_id(token)

  return import_logprobs.sequences(
    path,
    c.logprobs_format,
    n=c.n,
    seq_len=config.data.seq_len,
    token_id=token_id,
    vocab_size=tokenizer.vocab_size,
    missing_mass=c.missing_mass,
  )


def _check(c: RecordsOptions, of_task: bool) -> None:
  """Refuses what these records cannot hold."""
  if of_task and c.taps:
    raise InputError(
      f"records.taps is {c.taps}; expected () for a task. Leave it empty and set "
      "train.online=True for losses that compare features"
    )
  if c.batch_size % jax.process_count():
    raise InputError(
      f"records.batch_size is {c.batch_size} and there are {jax.process_count()} processes; each "
      "reads an equal share"
    )
  if c.tap_kind not in ("hidden", "qkv") or (c.tap_kind == "qkv" and (c.taps_width or 0 in c.taps)):
    raise InputError(
      f"records.tap_kind is {c.tap_kind!r} with taps {c.taps} and taps_width {c.taps_width}; it is "
      "'hidden', or 'qkv' of layers from 1 on without a projection"
    )
  if c.taps_width and not c.taps:
    raise InputError(f"records.taps_width is {c.taps_width} and records.taps is empty; name layers")


def _check_same_corpus(writer: Writer, rows: Sequence[Record]) -> None:
  """Refuses to go on with a store whose text is not the one at hand, before the end of it."""
  finished = writer.finished()
  shards = [finished[first] for first in sorted(finished)]
  store = Store(writer.folder, dataclasses.replace(writer.manifest, shards=tuple(shards)))
  for shard in shards:
    last = shard.first + shard.count - 1
    name = store.manifest.ids_name
    if not np.array_equal(store[last][name], rows[last][name]):
      raise InputError(
        f"{writer.folder} holds another text in sequence {last}; the corpus has changed since "
        "it was recorded, so choose another folder"
      )
