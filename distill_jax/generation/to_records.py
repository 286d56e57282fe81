"""Generated texts as records: packed whole, with what the teacher said as it wrote them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distill_jax.config import Config
from distill_jax.data import packing
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.models import loading
from distill_jax.records import recorder
from distill_jax.records.options import RecordsOptions
from distill_jax.records.store import Writer
from distill_jax.runtime import storage

Row = dict[str, Any]  # of samples.jsonl


def token_record(c: RecordsOptions) -> np.dtype:
  """What is kept of each token, as sampler.of_logits says it."""
  logp = [("logp", "<f4", (c.n,))] if c.logp or c.kind == "topk" else []
  scalars = [("entropy", "<f4"), ("label_logp", "<f4"), ("argmax", "<i4")]
  return np.dtype([("ids", "<i4", (c.n,)), *logp, *scalars])


def check(config: Config) -> None:
  """Refuses a store that generated texts cannot fill."""
  if config.data.seq_len < config.generate.cache_len:
    raise InputError(
      f"data.seq_len is {config.data.seq_len} and texts have up to generate.cache_len "
      f"{config.generate.cache_len} tokens; records hold them whole, so raise the first or lower "
      "the other"
    )
  if config.records.taps:
    raise InputError(
      f"records.taps is {config.records.taps}, and texts are generated without taps; leave it "
      "empty, or record the text"
    )


def write(
  config: Config,
  tokenizer: Tokenizer,
  prompts: dict[int, list[int]],
  rows: Sequence[Row],
  records: Callable[[int], np.ndarray],
) -> dict[str, Any]:
  """Packs texts in order, each after its prompt, into a store; only the texts are learnt.

  Args:
    rows: texts by their `prompt` and `tokens`.
    records: of the number of one of these, what was kept of its tokens.
  """
  T, documents = config.data.seq_len, (_document(prompts[r["prompt"]], r["tokens"]) for r in rows)
  packed = list(packing.pack(documents, T, None, whole=True))
  light = [sequence.record() for sequence in packed]
  ends = np.cumsum([sequence.segments_T.max() for sequence in packed])  # of the texts in each
  some = lambda n: range(ends[n - 1] if n else 0, ends[n])
  corpus = recorder.Corpus.of_text(light, tokenizer, T)
  of_text = config.records.kind == "text"
  teacher = {} if of_text else loading.identity(config.teacher, config.seed)
  manifest = recorder.manifest_of(config.records, corpus, teacher)
  with storage.Synced(config.generate.records_dir) as folder, Writer(folder, manifest) as writer:
    for shard in writer.missing():
      writer.write_shard(
        shard,
        (light[n] | _targets(config.records, prompts, rows, some(n), T, records) for n in shard),
      )
    done = writer.complete()
  assert done is not None
  sums = {k: sum(getattr(s, k) for s in done.shards) for k in ("tokens", "entries", "bytes")}
  return {"sequences": done.total, **sums}


def _document(prompt: list[int], said: list[int]) -> tuple[list[int], list[bool]]:
  return [*prompt, *said], [False] * len(prompt) + [True] * len(said)


def _targets(
  c: RecordsOptions,
  prompts: dict[int, list[int]],
  rows: Sequence[Row],
  some: Sequence[int],
  T: int,
  records: Callable[[int], np.ndarray],
) -> dict[str, np.ndarray]:
  if c.kind == "text":
    return {}
  said = np.zeros(T, token_record(c))
  at = 0
  for i in some:
    read, written = len(prompts[rows[i]["prompt"]]), len(rows[i]["tokens"])
    first = at + read - 1  # the position whose label is the first token written
    said[first : first + written] = records(i)
    at += read + written
  names = {"ids": "ids_TN", "logp": "logp_TN"}
  return {names.get(n, f"{n}_T"): said[n] for n in said.dtype.names or ()}
