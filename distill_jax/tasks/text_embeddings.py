"""Text embeddings, without labels: the student is trained to match the teacher's embeddings."""

from __future__ import annotations

import dataclasses
from typing import cast

import numpy as np

from distill_jax.data import sources
from distill_jax.hub import sentence_files
from distill_jax.hub.pretrained import Pretrained
from distill_jax.models import FamilyConfig
from distill_jax.tasks import _texts
from distill_jax.tasks._base import Stack
from distill_jax.tasks._jsonl_task import JsonlTask, is_text, read_objects
from distill_jax.tasks._model_configs import TextEncoderConfig, wrong_kind
from distill_jax.types import Inputs, JsonObject


@dataclasses.dataclass(frozen=True)
class Task(JsonlTask):
  """One text per example, for the loss "embedding" and an online teacher."""

  text: str = "text"
  """Name of the .jsonl field with the text."""
  max_tokens: int = 128
  """Maximum number of tokens of a text; a longer one is cut."""

  def open(self, split: str, pretrained: Pretrained | None) -> _texts.EncodedTexts:
    tokenizer = self.load_tokenizer(pretrained)
    source, bad = self.document_source(split, self.text), self.bad_examples()
    texts: list[str] = []
    for line, where in read_objects(source, bad):
      text = line.get(self.text)
      if not is_text(text):
        bad.reject_subject(where, f"has no text in its field {self.text!r}")
      elif sources.in_split(text, source):
        texts.append(text)
    bad.finish(len(texts))
    return _texts.EncodedTexts(texts, [0] * len(texts), 1, tokenizer, self.max_tokens)

  def inputs(self, stack: Stack) -> Inputs:
    return _texts.inputs(stack)

  def valid(self, stack: Stack) -> np.ndarray:
    return _texts.valid(stack)

  def check(self, config: FamilyConfig) -> None:
    if not isinstance(config, TextEncoderConfig) or config.num_labels:
      expected = "a model that outputs text embeddings, e.g. bert with num_labels 0"
      raise wrong_kind(self.kind, expected, config)
    _texts.check_length(self.kind, self.max_tokens, config)

  def hub_files(self, config: FamilyConfig) -> JsonObject:
    """Returns the files of sentence-transformers: pooling and normalisation."""
    pooling = cast(TextEncoderConfig, config).pooling
    return {
      **sentence_files.content(pooling, config.hidden_size),
      "sentence_bert_config.json": {"max_seq_length": self.max_tokens},
    }
