"""`record`: the teacher reads the corpus once, and what it says is stored."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.losses.features import FeatureSpec, flat_qkv
from distill_jax.models import loading
from distill_jax.nn import sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.records import collate, import_logprobs, sampler, taps
from distill_jax.records.multi_teacher import TEXT
from distill_jax.records.options import RecordsOptions
from distill_jax.records.store import Manifest, Store, Taps, Writer
from distill_jax.runtime import distributed, storage
from distill_jax.runtime.progress import Progress
from distill_jax.tasks import dataset
from distill_jax.types import IN_BATCH_CLASSES, Batch, Output

TAPS_SEED = 0  # of the fixed projection; the manifest names it
STORED = (*TEXT, "smoothing_T")  # what a record keeps of a row beside what the teacher said
Rows = Sequence[dict[str, np.ndarray]]
# (records without targets) -> what the device will have said about them
Summarise = Callable[[Rows, int], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Corpus:
  """What is recorded, packed text or the rows of a task.

  Attributes:
    rows: records without targets; of a task, with what a model reads beside them.
    positions: of a row, T.
    classes: outcomes at a position: tokens, or a task's classes.
    vocabulary: the tokenizer's digest; "" of a task, whose digest says it.
    digest: of the beginning of the text, or of the task.
    first: where the classes begin in the teacher's head; of one of several tasks, not 0.
  """

  rows: Rows
  positions: int
  classes: int
  vocabulary: str
  digest: str
  first: int = 0

  @classmethod
  def of_text(cls, rows: Rows, tokenizer: Tokenizer, positions: int) -> Corpus:
    return cls(rows, positions, tokenizer.vocab_size, tokenizer.digest, _digest(rows))


def corpus_of(config: Config) -> Corpus:
  """The text or the task of a config.

  Raises:
    InputError: it is not there, or the teacher cannot read it.
  """
  pretrained = loading.pretrained(config.teacher)
  if config.tasks:
    (name,) = dataset.chosen(config).tasks
    every = {n: dataset.open_rows(config, n, "train", pretrained) for n in config.tasks}
    rows, part = every[name], dataset.parts(every)[name]
    if rows.source.classes == IN_BATCH_CLASSES:
      raise InputError(
        f"the task {name} chooses among the pairs of a batch, which no record knows; train with "
        "train.online=True"
      )
    if config.records.kind != "text":
      dataset.check(every, loading.family_and_config(config.teacher)[1])
    first = part.start if part else 0
    return Corpus(rows, rows.source.positions, rows.source.classes, "", rows.digest, first)
  tokenizer = corpus.tokenizer_of(config.data, pretrained)
  if config.records.logprobs:
    text = list(_dump(config, tokenizer))
  else:
    _, shape = loading.family_and_config(config.teacher)
    corpus.check(config.data, tokenizer, shape.vocab_size, shape.max_position_embeddings)
    text = list(corpus.sequences(config.data, tokenizer, pretrained))
  return Corpus.of_text(text, tokenizer, config.data.seq_len)


def run(config: Config, folder: Path) -> dict[str, Any]:
  """Writes the store of a corpus into `folder`; what is already there is not done again.

  Returns: sequences in all and recorded now; tokens, entries and bytes of the whole store.

  Raises:
    InputError: the teacher, tokenizer and corpus do not fit together, or the folder holds
      other records; before anything is compiled.
  """
  mesh = sharding.make_mesh(**vars(config.mesh))
  if config.records.kind != "text" and not config.records.logprobs:
    compute = loading.compute_config(config.teacher)
    sharding.shardings(loading.abstract(config.teacher), mesh, compute.rules)  # does it divide?
  about = corpus_of(config)
  if config.tasks:
    config = dataset.chosen(config)
  config = dataclasses.replace(config, records=dense(config.records, about.classes))
  _check(config)
  sharding.check_batch("records.batch_size", config.records.batch_size, mesh)
  manifest = manifest_of(config, about)
  if jax.process_count() > len(manifest.ranges):
    raise InputError(
      f"{jax.process_count()} processes record {len(manifest.ranges)} shards, and each writes "
      "shards of its own; start fewer or lower records.sequences_per_shard"
    )
  with Writer(folder, manifest, jax.process_index(), jax.process_count()) as writer:
    _check_same_corpus(writer, about.rows)
    todo = writer.missing()
    if distributed.max_over_processes(
      len(todo)
    ):  # those who have nothing left to write compute with the others
      with jax.set_mesh(mesh):
        _pass(config, mesh, about, todo, writer)
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


def _pass(config: Config, mesh: Any, about: Corpus, todo: list[range], writer: Writer) -> None:
  """The teacher's pass over the shards still missing, writing behind it."""
  summarise = None
  if config.records.kind != "text" and not config.records.logprobs:
    summarise = _summariser(config, mesh, about)
  T, rows = about.positions, about.rows
  with (
    ThreadPoolExecutor(1) as background,
    Progress("record", sum(map(len, todo)) * T, "tokens") as progress,
    distributed.Preemption() as preemption,
  ):
    writing: Future | None = None
    shards, sequences = iter(todo), list[dict[str, np.ndarray]]()
    shard = next(shards, range(0))
    for n, some in enumerate(_recorded(config, rows, todo, summarise)):
      sequences += some
      progress.add(len(some) * T)
      if some and len(sequences) == len(shard):
        if writing is not None:
          writing.result()  # a failed write fails the run
        writing = background.submit(writer.write_shard, shard, sequences)
        shard, sequences = next(shards, range(0)), []
      if preemption.reached(n):
        break
    if writing is not None:
      writing.result()
  if distributed.max_over_processes(len(shard)):
    raise distributed.Preemption.stop("record", "finished shards are kept")


def _summariser(config: Config, mesh: Any, about: Corpus) -> Summarise:
  keys = loading.keys(config.seed)
  teacher = loading.build(config.teacher, mesh, keys["teacher"])
  where = sharding.batch_sharding(mesh)
  one_batch = jitted(config, teacher.compute, about.classes, about.first)
  read = dataset.reader(config)

  def summarise(some: Rows, first: int) -> dict[str, jax.Array]:
    batch = collate.to_device(collate.collate(some, read=read), where)
    index_B = collate.to_device(np.arange(first, first + len(some), dtype=np.int32), where)
    return one_batch(teacher.model, keys["records"], batch, index_B)

  return summarise


def jitted(config: Config, compute: ComputeConfig, vocab_size: int, first: int = 0) -> Any:
  """The pass as it is compiled: (teacher, key, batch, index_B) -> what is stored of the batch."""
  project = _projection(config, _width(config))
  rows = range(first, first + vocab_size)
  fixed = functools.partial(_summarise, compute=compute, config=config, rows=rows)
  return jax.jit(functools.partial(fixed, project=project))


def _recorded(
  config: Config, rows: Rows, todo: list[range], summarise: Summarise | None
) -> Iterator[Rows]:
  """Batches of the shards' records; each is read once the next one is dispatched."""
  size = config.records.batch_size // jax.process_count()
  parts = [
    range(first, min(first + size, shard.stop))
    for shard in todo
    for first in range(shard.start, shard.stop, size)
  ]
  if summarise is None:
    yield from (rows[part.start : part.stop] for part in parts)
    return
  padding = {name: np.zeros_like(x) for name, x in rows[0].items()}
  # All processes compute together, so those with less to write go on with padding alone.
  parts += [range(0)] * (distributed.max_over_processes(len(parts)) - len(parts))
  pending: tuple[Rows, Any] | None = None
  for part in parts:
    some = rows[part.start : part.stop]
    said = summarise([*some, *[padding] * (size - len(some))], part.start)
    if pending is not None:
      yield _rows(*pending)
    pending = some, said
  if pending is not None:
    yield _rows(*pending)


def _rows(some: Rows, said: dict[str, jax.Array]) -> Rows:
  """This process's rows of what the device said, beside their tokens."""
  local = {name.replace("_B", "_"): _local(x) for name, x in said.items()}
  text = lambda row: {name: row[name] for name in STORED if name in row}
  return [text(row) | {name: x[i] for name, x in local.items()} for i, row in enumerate(some)]


def _local(x_B: jax.Array) -> np.ndarray:
  parts = {s.index[0].start or 0: s for s in x_B.addressable_shards}  # replicas count once
  return np.concatenate([np.asarray(parts[start].data) for start in sorted(parts)])


def _summarise(
  model: Any,
  key: jax.Array,
  batch: Batch,
  index_B: jax.Array,
  *,
  compute: ComputeConfig,
  config: Config,
  rows: range,
  project: np.ndarray | None,
) -> dict[str, jax.Array]:
  """What is stored of a batch. The offsets depend on the sequence's number alone."""
  c, T = config.records, batch.labels_BT.shape[1]
  u_BT = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (T,)))(index_B)
  needs = _needs(config)
  out: Output = model(batch.inputs, compute, needs.taps)
  # What is not of `rows` comes behind them, as padding does.
  head_VD = jnp.roll(out.head_VD, -rows.start, 0) if rows.start else out.head_VD
  said = sampler.summarise(
    out.hidden_BTD,
    head_VD,
    batch.labels_BT,
    u_BT,
    n=c.n,
    chunk=c.chunk,
    vocab_size=len(rows),
    kind=c.kind,
    logp=c.logp,
    temperature=c.temperature,
    nucleus=c.nucleus,
    soft_cap=out.soft_cap,
  )
  names = {"ids": "ids_BTN", "logp": "logp_BTN"}
  said = {names.get(name, f"{name}_BT"): x for name, x in said.items()}
  if c.taps:
    kept = needs.of(model, out, batch.inputs, compute)
    flat = [kept.hidden[i] if i in kept.hidden else flat_qkv(kept.qkv[i]) for i in c.taps]
    q_PBTD, scale_PBT = taps.quantise(jnp.stack(flat), project)
    said |= {
      "taps_BPTD": jnp.moveaxis(q_PBTD, 0, 1),
      "taps_scale_BPT": jnp.moveaxis(scale_PBT, 0, 1),
    }
  return said


def _dump(config: Config, tokenizer: Tokenizer) -> Iterator[dict[str, np.ndarray]]:
  """A served teacher's own responses: what it read and what it said."""
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


def dense(c: RecordsOptions, classes: int) -> RecordsOptions:
  """Records of all classes are top-k ones from which nothing is missing."""
  if c.kind != "dense":
    return c
  return dataclasses.replace(c, kind="topk", n=classes, missing_mass="renormalise", nucleus=1.0)


def manifest_of(config: Config, about: Corpus) -> Manifest:
  """What a store of this config and these sequences says of itself."""
  c = config.records
  if c.kind == "text":
    teacher = {}
  elif c.logprobs:
    teacher = {"name": c.logprobs_format, "digest": "unknown: behind a server"}
  else:
    teacher = loading.identity(config.teacher, config.seed)
  said = describe(config, about.classes, len(about.rows), about.positions)
  return dataclasses.replace(
    said,
    teacher=teacher,
    tokenizer=about.vocabulary,
    corpus=about.digest,
    smoothing="smoothing_T" in about.rows[0],
  )


def describe(config: Config, vocab_size: int, sequences: int, positions: int) -> Manifest:
  """What a store of this config says of itself, but for whose words and text they are."""
  c, kept = config.records, None
  if c.taps:
    width = c.taps_width or _width(config)
    kept = Taps(c.taps, width, TAPS_SEED if c.taps_width else None, c.taps_of)
  return Manifest(
    kind=c.kind,
    n=0 if c.kind == "text" else c.n,
    logp=c.logp,
    nucleus=c.nucleus,
    vocab_size=vocab_size,
    seq_len=positions,
    teacher={},
    tokenizer="",
    corpus="",
    entropy=not c.logprobs,
    sequences_per_shard=c.sequences_per_shard,
    extents=(sequences,),
    taps=kept,
    missing_mass=c.missing_mass if c.kind == "topk" else "none",
    temperature=c.temperature,
  )


def _needs(config: Config) -> FeatureSpec:
  c = config.records
  return FeatureSpec(hidden=c.taps) if c.taps_of == "hidden" else FeatureSpec(qkv=c.taps)


def _width(config: Config) -> int:
  """Numbers a tapped vector has."""
  _, c = loading.family_and_config(config.teacher)
  if config.records.taps_of == "hidden":
    return c.hidden_size
  values = getattr(c, "v_head_dim", c.head_dim)  # DeepSeek's are narrower than its keys
  return (c.num_attention_heads + c.num_key_value_heads) * c.head_dim + (
    c.num_key_value_heads * values
  )


def _projection(config: Config, width: int) -> np.ndarray | None:
  c = config.records
  return taps.projection(TAPS_SEED, width, c.taps_width) if c.taps_width else None


def _digest(rows: Rows) -> str:
  """Of the corpus' beginning, so that a corpus that has grown is still the same one.

  What follows is checked against the finished shards, in `_check_same_corpus`.
  """
  total = hashlib.sha256()
  for name in ("tokens_T", "segments_T", "mask_T"):
    total.update(np.ascontiguousarray(rows[0][name]).tobytes())
  return total.hexdigest()


def _check(config: Config) -> None:
  c = config.records
  if config.tasks and c.taps:
    raise InputError(
      f"records.taps is {c.taps}, and of tasks no features are recorded; leave it empty and set "
      "train.online=True for losses that compare them"
    )
  if c.batch_size % jax.process_count():
    raise InputError(
      f"records.batch_size is {c.batch_size} and there are {jax.process_count()} processes; each "
      "reads an equal share"
    )
  if c.taps_of not in ("hidden", "qkv") or (c.taps_of == "qkv" and (c.taps_width or 0 in c.taps)):
    raise InputError(
      f"records.taps_of is {c.taps_of!r} with taps {c.taps} and taps_width {c.taps_width}; it is "
      "'hidden', or 'qkv' of layers from 1 on without a projection"
    )
  if c.taps_width and not c.taps:
    raise InputError(f"records.taps_width is {c.taps_width} and records.taps is empty; name layers")


def _check_same_corpus(writer: Writer, rows: Rows) -> None:
  """Refuses to go on with a store whose text is not the one at hand, before the end of it."""
  finished = writer.finished()
  shards = [finished[first] for first in sorted(finished)]
  store = Store(writer.folder, dataclasses.replace(writer.manifest, shards=tuple(shards)))
  for shard in shards:
    last = shard.first + shard.count - 1
    if not np.array_equal(store[last]["tokens_T"], rows[last]["tokens_T"]):
      raise InputError(
        f"{writer.folder} holds another text in sequence {last}; the corpus has changed since "
        "it was recorded, so choose another folder"
      )
