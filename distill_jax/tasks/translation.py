"""Text-to-text tasks of encoder-decoders, e.g. translation and summarisation."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple, cast

from distill_jax.data import sources
from distill_jax.data.tokenizers import Tokenizer, load_tokenizer
from distill_jax.errors import InputError, bad_value
from distill_jax.generation.beam_search import Search
from distill_jax.hub.pretrained import Pretrained
from distill_jax.models import FamilyConfig
from distill_jax.tasks import _scores, _seq2seq_targets, _texts
from distill_jax.tasks._base import Example, PseudoLabels, Stack, TextTask
from distill_jax.tasks._jsonl_task import BadExamples, JsonlTask, is_text, read_objects
from distill_jax.tasks._model_configs import (
  PositionLimitedConfig,
  Seq2SeqConfig,
  SpeechConfig,
  wrong_kind,
)
from distill_jax.types import JsonObject, SourceTarget


@dataclasses.dataclass(frozen=True)
class Task(JsonlTask, TextTask):
  """Generation of a target text from a source text."""

  path: str = ""
  """A .jsonl file, or a folder of .jsonl files. `generate` writes such a file."""
  source: str = "source"
  """Name of the .jsonl field with the source text."""
  target: str = "target"
  """Name of the .jsonl field with the target text."""
  heldout: str = ""
  """Path of the held-out pairs, in the format of `path`.

  "" holds out a fraction `heldout_fraction` of `path`, chosen by a hash of the source text.
  """
  source_len: int = 128
  """Maximum number of tokens of a source text, with its end token. Longer ones cannot be used."""
  target_len: int = 128
  """Maximum number of tokens of a target text, with its end token. Longer ones cannot be used."""
  start: str = "<pad>"
  """Start token of target texts, which is not trained on; "<pad>" for T5 and Marian."""
  beams: int = 4
  """Number of beams in `evaluate` and `generate`; 1 for greedy decoding."""
  length_penalty: float = 1.0
  """Exponent of the length by which beam search divides a text's log-probability."""
  batch_size: int = 32
  """Number of texts that are decoded at once."""

  def __post_init__(self):
    super().__post_init__()
    for key in ("source_len", "target_len", "beams", "batch_size"):
      if (value := getattr(self, key)) < 1:
        raise bad_value(key, value, "at least 1", "Raise it")

  def open(self, split: str, pretrained: Pretrained | None) -> EncodedPairs:
    tokenizer = self.load_tokenizer(pretrained)
    if pretrained is not None:
      self._check_start(tokenizer, cast(Seq2SeqConfig, pretrained.config))
    source, bad = self.document_source(split, self.source), self.bad_examples()
    pairs: list[TextPair] = []
    places: list[str] = []
    for line, where in read_objects(source, bad):
      a, b = line.get(self.source), line.get(self.target)
      if not is_text(a):
        bad.reject_subject(where, f"has no text in its field {self.source!r}")
      elif not is_text(b):
        bad.reject_subject(where, f"has no text in its field {self.target!r}")
      elif sources.in_split(a, source):
        pairs.append(TextPair(a, b))
        places.append(where)
    return EncodedPairs(self, pairs, places, tokenizer, bad)

  def _check_start(self, tokenizer: Tokenizer, config: Seq2SeqConfig) -> None:
    start = _seq2seq_targets.token_id(self.kind, tokenizer, self.start)
    _seq2seq_targets.check_start(self.kind, start, config)

  def inputs(self, stack: Stack) -> SourceTarget:
    return SourceTarget(_texts.inputs(stack), _seq2seq_targets.target_inputs(stack))

  def check(self, config: FamilyConfig) -> None:
    if not isinstance(config, Seq2SeqConfig) or isinstance(config, SpeechConfig):
      expected = "an encoder-decoder of texts, e.g. t5"
      raise wrong_kind(self.kind, expected, config)
    if isinstance(config, PositionLimitedConfig):
      limit = config.max_position_embeddings
      for key, value in (("source_len", self.source_len), ("target_len", self.target_len)):
        if value > limit:
          expected = f"at most {limit}, the number of positions of the model"
          raise bad_value(f"{self.kind}.{key}", value, expected, "Lower it")
    if self.tokenizer:
      self._check_start(load_tokenizer(self.tokenizer), config)

  def hub_files(self, config: FamilyConfig) -> JsonObject:
    del config
    return {}

  def search(self, config: Seq2SeqConfig, source: EncodedPairs, generation: JsonObject) -> Search:
    del generation
    return Search(
      (config.decoder_start_token_id,),
      source.eos,
      config.pad_token_id,
      self.target_len,
      self.beams,
      self.length_penalty,
    )

  def scores(self, outputs: Sequence[str], source: EncodedPairs) -> dict[str, float]:
    references = [pair.target for pair in source.pairs[: len(outputs)]]
    return _scores.bleu_and_chrf(outputs, references)

  def shown(self, source: EncodedPairs, count: int) -> list[tuple[str, str]]:
    return [(pair.source, pair.target) for pair in source.pairs[:count]]

  def pseudo_labels(self, outputs: Sequence[str], source: EncodedPairs) -> PseudoLabels:
    """Returns the outputs that are not empty, as target texts."""
    lines = [
      {self.source: pair.source, self.target: output, "reference": pair.target}
      for output, pair in zip(outputs, source.pairs, strict=True)
      if output.strip()
    ]
    return PseudoLabels(lines, len(outputs) - len(lines))


class TextPair(NamedTuple):
  """A source text and its target text."""

  source: str
  target: str


class EncodedPairs:
  """A TaskSource of tokenized pairs, in the order of the file.

  Attributes:
    pairs: The texts.
    tokenizer: The tokenizer of both texts.
    eos: Id of the end token of both texts.
  """

  def __init__(
    self,
    task: Task,
    pairs: Sequence[TextPair],
    places: Sequence[str],
    tokenizer: Tokenizer,
    bad: BadExamples,
  ):
    self._task, self.tokenizer = task, tokenizer
    self.classes = self.token_rows = tokenizer.vocab_size
    self.positions = task.target_len
    if tokenizer.eos_id is None:
      raise InputError(
        f"{tokenizer.where} has no end token, which the task {task.kind} needs. Use another "
        "tokenizer."
      )
    self.eos = tokenizer.eos_id
    self._start = [_seq2seq_targets.token_id(task.kind, tokenizer, task.start)]
    encoded = (tokenizer.encode_batch([pair[side] for pair in pairs]) for side in (0, 1))
    self.pairs: list[TextPair] = []
    self._ids: list[tuple[list[int], list[int]]] = []
    for pair, where, source, target in zip(pairs, places, *encoded, strict=True):
      if len(source) + 1 > task.source_len:
        bad.reject_subject(where, f"has more than {task.source_len} tokens in {task.source!r}")
      elif len(target) + 1 > task.target_len:
        bad.reject_subject(where, f"has more than {task.target_len} tokens in {task.target!r}")
      else:
        self.pairs.append(pair)
        self._ids.append((source, target))
    bad.finish(len(self.pairs))
    data = hashlib.sha256(json.dumps([self._ids, self._start, self.eos]).encode())
    data.update(tokenizer.digest.encode())
    self.digest = data.hexdigest()

  def __len__(self) -> int:
    return len(self.pairs)

  def __getitem__(self, i: int) -> Example:
    source, target = self._ids[i]
    fields = _seq2seq_targets.target_fields(self._start, target, self.eos, self.positions)
    return {**_texts.padded([*source, self.eos], self._task.source_len), **fields}
