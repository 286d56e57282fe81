"""`record`: the teacher reads the corpus once, and what it says is stored."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill_jax import build, sharding
from distill_jax.config import Config
from distill_jax.data import corpus, loader
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.layers import Compute
from distill_jax.progress import Progress
from distill_jax.records import sampler
from distill_jax.records.manifest import Manifest
from distill_jax.records.writer import Writer
from distill_jax.types import Batch, Output

Rows = list[dict[str, np.ndarray]]


def record(config: Config, folder: Path) -> dict[str, Any]:
  """Writes the store of a corpus into `folder`; what is already there is not done again.

  Returns: sequences, tokens, entries and bytes of the whole store.
  """
  mesh = sharding.make_mesh(**vars(config.mesh))
  pretrained = build.pretrained(config.teacher)
  tokenizer = corpus.tokenizer_of(config.data, pretrained)
  _, shape = build.shape(config.teacher)
  corpus.check(config.data, tokenizer, shape.vocab_size, shape.max_position_embeddings)
  if config.records.batch_size % jax.process_count():
    raise InputError(
      f"records.batch_size is {config.records.batch_size} and there are {jax.process_count()} "
      f"processes; each reads an equal share"
    )
  rows = list(corpus.sequences(config.data, tokenizer))
  manifest = _manifest(config, pretrained, tokenizer, rows)
  with Writer(folder, manifest, jax.process_index(), jax.process_count()) as writer:
    if todo := writer.missing():
      with jax.set_mesh(mesh):
        _pass(config, mesh, rows, todo, writer)
    done = writer.complete()
  if done is None:  # other processes are still writing; the last one completes the manifest
    return {"sequences": 0}
  sums = {k: sum(getattr(s, k) for s in done.shards) for k in ("tokens", "entries", "bytes")}
  return {"sequences": done.total, "recorded_now": sum(map(len, todo)), **sums}


def _pass(config: Config, mesh: Any, rows: Rows, todo: list[range], writer: Writer) -> None:
  """The teacher's pass over the shards still missing: one batch and one shard in flight."""
  summarise = None
  if config.records.kind != "text":
    keys = build.keys(config.seed)
    teacher = build.build(config.teacher, mesh, keys["teacher"])
    one_batch = jax.jit(functools.partial(_summarise, how=teacher.how, config=config))
    summarise = functools.partial(one_batch, teacher.model, keys["records"])
  T = config.data.seq_len
  with (
    ThreadPoolExecutor(1) as background,
    Progress("record", sum(map(len, todo)) * T, "tokens") as progress,
  ):
    writing: Future | None = None
    for shard in todo:
      sequences: Rows = []
      for some in _recorded(config, mesh, rows, shard, summarise):
        sequences += some
        progress.add(len(some) * T)
      if writing is not None:
        writing.result()  # a failed write fails the run
      writing = background.submit(writer.write_shard, shard, sequences)
    if writing is not None:
      writing.result()


def _recorded(
  config: Config, mesh: Any, rows: Rows, shard: range, summarise: Any
) -> Iterator[Rows]:
  """Batches of a shard's records; each is read once the next one is dispatched."""
  size = config.records.batch_size // jax.process_count()
  pending: tuple[Rows, Any] | None = None
  for first in range(shard.start, shard.stop, size):
    some = rows[first : min(first + size, shard.stop)]
    if summarise is None:
      yield some
      continue
    fill = [dict.fromkeys(some[0], 0 * some[0]["tokens_T"])] * (size - len(some))
    batch = loader.to_device(loader.collate(some + fill), sharding.batch_sharding(mesh))
    index_B = np.arange(first, first + size, dtype=np.int32)
    said = summarise(batch, loader.to_device(index_B, sharding.batch_sharding(mesh)))
    if pending is not None:
      yield _rows(*pending)
    pending = some, said
  if pending is not None:
    yield _rows(*pending)


def _rows(some: Rows, said: dict[str, jax.Array]) -> Rows:
  """This process's rows of what the device said, beside their tokens."""
  local = {name.replace("_B", "_"): _local(x) for name, x in said.items()}
  return [row | {name: x[i] for name, x in local.items()} for i, row in enumerate(some)]


def _local(x: jax.Array) -> np.ndarray:
  parts = sorted(
    {s.index[0].start or 0: s for s in x.addressable_shards}.items()
  )  # replicas start alike and count once
  return np.concatenate([np.asarray(s.data) for _, s in parts])


def _summarise(
  model: Any, key: jax.Array, batch: Batch, index_B: jax.Array, *, how: Compute, config: Config
) -> dict[str, jax.Array]:
  """What is stored of a batch. The offsets depend on the sequence's number alone."""
  T = batch.labels_BT.shape[1]
  u_BT = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (T,)))(index_B)
  out: Output = model(batch.inputs, how)
  c = config.records
  said = sampler.summarise(
    out.hidden_BTD, out.head_VD, batch.labels_BT, u_BT,
    n=c.n, chunk=c.chunk, kind=c.kind, temperature=c.temperature,
  )  # fmt: skip
  names = {"ids": "ids_BTN", "logp": "logp_BTN"}
  return {names.get(name, f"{name}_BT"): x for name, x in said.items()}


def _manifest(config: Config, pretrained: Any, tokenizer: Tokenizer, rows: Rows) -> Manifest:
  c, text = config.records, config.records.kind == "text"
  teacher = {}
  if not text:
    digest = pretrained.digest if pretrained else f"random seed {config.seed}"
    teacher = {"name": config.teacher.source or config.teacher.shape, "digest": digest}
  return Manifest(
    kind=c.kind, n=0 if text else c.n, vocab_size=tokenizer.vocab_size,
    seq_len=config.data.seq_len, teacher=teacher, tokenizer=tokenizer.digest,
    corpus=_digest(rows), sequences_per_shard=c.sequences_per_shard, extents=(len(rows),),
    missing_mass="tail_bucket" if c.kind == "topk" else "none", temperature=c.temperature,
  )  # fmt: skip


def _digest(rows: Rows) -> str:
  """Of the packed sequences themselves: what the teacher saw is what the student sees."""
  total = hashlib.sha256()
  for row in rows:
    for name in sorted(row):
      total.update(row[name].tobytes())
  return total.hexdigest()


