"""Texts to texts: translation, summaries, by an encoder-decoder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distill_jax.data import sources
from distill_jax.data.tokenizers import Tokenizer, load_tokenizer
from distill_jax.errors import InputError
from distill_jax.generation.beam_search import Search
from distill_jax.tasks import _scores, _seq2seq_targets, _texts
from distill_jax.tasks._skipped import LeftOut, check_on_bad
from distill_jax.types import SourceTarget


@dataclasses.dataclass(frozen=True)
class Task:
  """Lines of JSON, a text and its translation each.

  Attributes:
    path: a .jsonl file or a folder of them; what `generate` has written is one.
    source, target: their fields.
    heldout: where the held-out pairs are, as `path`; "": a share `heldout_fraction` of path's, by
      a hash of each source.
    source_len, target_len: tokens at the most, the end token among them.
    start: the token that a translation begins with, which nobody learns: "<pad>" of T5, Marian.
    tokenizer: a file; "": the model's own.
    on_bad: "stop" at a pair that cannot be used, or "skip" it and count.
    beams: of translations that `evaluate` scores and `generate` writes; 1: greedy.
    length_penalty: see decode/seq2seq.py.
    batch_size: texts that are translated at once.
  """

  path: str = ""
  source: str = "source"
  target: str = "target"
  heldout: str = ""
  heldout_fraction: float = 0.1
  source_len: int = 128
  target_len: int = 128
  start: str = "<pad>"
  tokenizer: str = ""
  on_bad: str = "stop"
  beams: int = 4
  length_penalty: float = 1.0
  batch_size: int = 32

  def __post_init__(self):
    check_on_bad("translation", self.on_bad)
    if min(self.source_len, self.target_len, self.beams, self.batch_size) < 1:
      raise InputError(
        f"translation has source_len {self.source_len}, target_len {self.target_len}, beams "
        f"{self.beams} and batch_size {self.batch_size}; each is at least 1"
      )

  def open(self, split: str, pretrained: Any) -> Source:
    tokenizer = _texts.tokenizer_of("translation", self.tokenizer, pretrained)
    if pretrained is not None:
      self._check_start(tokenizer, pretrained.config)
    path = self.heldout if split == "heldout" and self.heldout else self.path
    fraction = 0.0 if self.heldout else self.heldout_fraction
    of = sources.Source("jsonl", path, split, self.source, fraction)
    left_out = LeftOut("translation", self.on_bad)
    pairs, places = [], []
    for line, where in _seq2seq_targets.objects(of, left_out):
      pair = line.get(self.source), line.get(self.target)
      names = (self.source, self.target)
      if bad := [n for n, x in zip(names, pair, strict=True) if not _seq2seq_targets.is_text(x)]:
        left_out(where, f"has no text in its field {bad[0]!r}")
      elif sources.chosen(str(pair[0]), of):
        pairs.append(pair)
        places.append(where)
    return Source(self, pairs, places, tokenizer, left_out)

  def _check_start(self, tokenizer: Tokenizer, config: Any) -> None:
    start = _seq2seq_targets.token_id("translation", tokenizer, self.start)
    _seq2seq_targets.check_start("translation", start, config)

  def inputs(self, stack: Callable[[str], np.ndarray]) -> SourceTarget:
    source = _seq2seq_targets.as_inputs(stack("read_S"), stack("seen_S"))
    return SourceTarget(source, _seq2seq_targets.target(stack))

  def check(self, config: Any) -> None:
    if not hasattr(config, "decoder_start_token_id") or hasattr(config, "num_mel_bins"):
      raise InputError(
        "translation wants a model of texts with an encoder and a decoder, such as t5, and this is "
        f"a {type(config).__module__.rpartition('.')[2]}"
      )
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and max(self.source_len, self.target_len) > most:
      raise InputError(
        f"translation has source_len {self.source_len} and target_len {self.target_len} and the "
        f"model reads at most {most}; lower them"
      )
    if self.tokenizer:
      self._check_start(load_tokenizer(self.tokenizer), config)

  def hub(self, config: Any) -> dict[str, dict[str, Any]]:
    del config
    return {}

  def search(self, config: Any, source: Source, generation: dict[str, Any]) -> Search:
    """How a model of this config translates."""
    del generation
    return Search(
      (config.decoder_start_token_id,),
      source.eos,
      config.pad_token_id,
      self.target_len,
      self.beams,
      self.length_penalty,
    )

  def scores(self, said: Sequence[str], source: Source) -> dict[str, float]:
    """Of what was said of the first examples of a source, in their order."""
    return _scores.bleu_and_chrf(said, [target for _, target in source.pairs[: len(said)]])

  def labelled(self, said: Sequence[str], source: Source) -> tuple[list[dict[str, Any]], int]:
    """(lines of a file that this task reads, with what was said as the target; how many of them are
    left out, since nothing was said)."""
    lines = [
      {self.source: a, self.target: new, "reference": b}
      for new, (a, b) in zip(said, source.pairs, strict=True)
    ]
    return [line for line in lines if line[self.target].strip()], sum(not s.strip() for s in said)


class Source:
  """Pairs as tokens, in the order of the file; see distill_jax/tasks.

  Attributes:
    pairs: (source, target), the texts.
    tokenizer, eos: of both sides.
  """

  def __init__(
    self, task: Task, pairs: list[Any], places: list[str], tokenizer: Tokenizer, left_out: LeftOut
  ):
    self._task, self.tokenizer = task, tokenizer
    self.classes, self.positions = tokenizer.vocab_size, task.target_len
    if tokenizer.eos_id is None:
      raise InputError(f"{tokenizer.where} has no end token; translation needs one")
    self.eos = tokenizer.eos_id
    self._start = [_seq2seq_targets.token_id("translation", tokenizer, task.start)]
    sides = [tokenizer.encode_batch([pair[i] for pair in pairs]) for i in (0, 1)]
    self.pairs, self._ids = [], []
    for pair, where, read, said in zip(pairs, places, *sides, strict=True):
      if len(read) + 1 > task.source_len:
        left_out(where, f"has more than {task.source_len} tokens in {task.source!r}")
      elif len(said) + 1 > task.target_len:
        left_out(where, f"has more than {task.target_len} tokens in {task.target!r}")
      else:
        self.pairs.append(pair)
        self._ids.append((read, said))
    left_out.report(len(self.pairs))
    data = hashlib.sha256(json.dumps([self._ids, self._start, self.eos]).encode())
    data.update(tokenizer.digest.encode())
    self.digest = data.hexdigest()

  def __len__(self) -> int:
    return len(self.pairs)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    read, said = self._ids[i]
    target = _seq2seq_targets.fields(self._start, said, self.eos, self._task.target_len)
    return {**_seq2seq_targets.padded([*read, self.eos], self._task.source_len), **target}
