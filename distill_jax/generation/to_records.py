"""Generated texts as records: packed whole, with the teacher's distributions as it wrote them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.config import Config
from distill_jax.data import packing
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.models.loading import ModelSource
from distill_jax.records import recorder
from distill_jax.records.fields import RecordSpec
from distill_jax.records.options import RecordsOptions
from distill_jax.records.store import Writer
from distill_jax.runtime import storage
from distill_jax.types import JsonObject

SampleRow = Mapping[str, Any]  # of samples.jsonl, by its `prompt`'s number and `tokens`


@dataclasses.dataclass(frozen=True)
class GeneratedStore:
  """The store at generate.records_dir that sampled texts become, as section `records` has it."""

  config: Config
  teacher: ModelSource

  def check(self) -> None:
    """Refuses a store that generated texts cannot fill."""
    data, generate, records = self.config.data, self.config.generate, self.config.records
    if data.seq_len < generate.cache_len:
      raise InputError(
        f"data.seq_len is {data.seq_len} and texts have up to generate.cache_len "
        f"{generate.cache_len} tokens; records hold them whole, so raise the first or lower "
        "the other"
      )
    if records.taps:
      raise InputError(
        f"records.taps is {records.taps}, and texts are generated without taps; leave it empty, or "
        "record the text"
      )

  @property
  def records(self) -> RecordsOptions | None:
    """What is recorded of each token's distribution; None: nothing."""
    return None if self.config.records.kind == "text" else self.config.records

  def token_record(self, vocab_size: int) -> np.dtype | None:
    """What is recorded of each token, as sampler.of_logits gives it; None: nothing."""
    if self.records is None:
      return None
    spec = recorder.record_spec(self.records, vocab_size)
    sizes = {"T": (), "TN": (spec.n,)}
    return np.dtype([(f.name, f.dtype, sizes[f.axes]) for f in spec.recorded])

  def write(
    self,
    tokenizer: Tokenizer,
    prompts: Mapping[int, Sequence[int]],
    rows: Sequence[SampleRow],
    token_records: Callable[[int], np.ndarray],
  ) -> JsonObject:
    """Packs texts in order, each after its prompt, into the store; the prompts are not trained on.

    Args:
      prompts: the tokens of each prompt.
      token_records: of the place of a text in `rows`, what was recorded of its tokens.
    """
    T = self.config.data.seq_len
    documents = (_document(prompts[r["prompt"]], r["tokens"]) for r in rows)
    packed = list(packing.pack(documents, T, None, whole=True))
    sequences = [sequence.record() for sequence in packed]
    ends = np.cumsum([sequence.segments_T.max() for sequence in packed])  # of the texts in each

    def row(n: int) -> dict[str, np.ndarray]:
      texts = range(ends[n - 1] if n else 0, ends[n])
      return sequences[n] | self._targets(manifest.spec, prompts, rows, texts, token_records)

    config = self.config
    teacher = self.teacher.identity if self.records else {}
    corpus = recorder.Corpus.of_text(sequences, tokenizer, T)
    manifest = recorder.manifest_of(config.records, corpus, teacher)
    target = self.config.generate.records_dir
    with storage.Synced(target) as folder, Writer(folder, manifest) as writer:
      for shard in writer.missing():
        writer.write_shard(shard, map(row, shard))
      done = writer.complete()
    assert done is not None
    sums = {k: sum(getattr(s, k) for s in done.shards) for k in ("tokens", "entries", "bytes")}
    return {"sequences": done.total, **sums}

  def _targets(
    self,
    spec: RecordSpec,
    prompts: Mapping[int, Sequence[int]],
    rows: Sequence[SampleRow],
    texts: Sequence[int],
    token_records: Callable[[int], np.ndarray],
  ) -> dict[str, np.ndarray]:
    """The recorded fields of one packed sequence, which holds `texts` of `rows`."""
    if not spec.recorded:
      return {}
    targets = np.zeros(self.config.data.seq_len, self.token_record(spec.vocab_size))
    at = 0
    for i in texts:
      read, written = len(prompts[rows[i]["prompt"]]), len(rows[i]["tokens"])
      first = at + read - 1  # the position whose label is the first generated token
      targets[first : first + written] = token_records(i)
      at += read + written
    return {f.record: targets[f.name] for f in spec.recorded}


def _document(prompt: Sequence[int], tokens: Sequence[int]) -> tuple[list[int], list[bool]]:
  """A text after its prompt, and which of these tokens are trained on."""
  return [*prompt, *tokens], [False] * len(prompt) + [True] * len(tokens)
