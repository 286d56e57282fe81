"""Generated texts as a store of records, with the teacher's distributions during generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.config import Config
from distill_jax.data import packing
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import bad_value
from distill_jax.models.loading import ModelSource
from distill_jax.records import recorder
from distill_jax.records.fields import RecordSpec
from distill_jax.records.options import RecordsOptions
from distill_jax.records.store import Writer
from distill_jax.runtime import storage
from distill_jax.types import JsonObject

SampleRow = Mapping[str, Any]  # a sample with `prompt` (the index of the prompt) and `tokens`


@dataclasses.dataclass(frozen=True)
class GeneratedStore:
  """The store at generate.records_dir, written from sampled texts.

  Attributes:
    config: The config; its section `records` determines the format.
    teacher: The teacher.
  """

  config: Config
  teacher: ModelSource

  def check(self) -> None:
    """Raises InputError if generated texts cannot be stored with this config."""
    data, generate, records = self.config.data, self.config.generate, self.config.records
    if data.seq_len < generate.cache_len:
      raise bad_value(
        "data.seq_len",
        data.seq_len,
        f"at least generate.cache_len ({generate.cache_len}), since texts are not cut",
        "Increase it, or reduce generate.cache_len",
      )
    if records.taps:
      raise bad_value(
        "records.taps",
        records.taps,
        "() for generated texts",
        "Leave it empty, or run `record` on the texts",
      )

  @property
  def records(self) -> RecordsOptions | None:
    """Settings for recording the distribution of each token, or None if nothing is recorded."""
    return None if self.config.records.kind == "text" else self.config.records

  def token_record(self, vocab_size: int) -> np.dtype | None:
    """Returns the dtype of a token's record (the fields of sampler.of_logits), or None."""
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
    """Packs prompts with their texts into the store, in order. Prompts are not trained on.

    Args:
      tokenizer: The tokenizer.
      prompts: The tokens of each prompt, by index.
      rows: The samples.
      token_records: Returns the records of the tokens of `rows[i]`, given i.

    Returns:
      A dict with the numbers of sequences, tokens, entries and bytes.
    """
    T = self.config.data.seq_len
    documents = (_document(prompts[r["prompt"]], r["tokens"]) for r in rows)
    packed = list(packing.pack(documents, T, None, whole=True))
    sequences = [sequence.record() for sequence in packed]
    # Sequence n contains the texts ends[n - 1] to ends[n] - 1.
    ends = np.cumsum([sequence.segments_T.max() for sequence in packed])

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
    """Returns the recorded fields of one packed sequence, which contains `texts` of `rows`."""
    if not spec.recorded:
      return {}
    targets = np.zeros(self.config.data.seq_len, self.token_record(spec.vocab_size))
    at = 0
    for i in texts:
      read, written = len(prompts[rows[i]["prompt"]]), len(rows[i]["tokens"])
      first = at + read - 1  # position whose label is the first generated token
      targets[first : first + written] = token_records(i)
      at += read + written
    return {f.record: targets[f.name] for f in spec.recorded}


def _document(prompt: Sequence[int], tokens: Sequence[int]) -> tuple[list[int], list[bool]]:
  """Returns the tokens of a prompt and its text, and the mask of those that are trained on."""
  return [*prompt, *tokens], [False] * len(prompt) + [True] * len(tokens)
