"""Texts to embeddings: a student brings each text to where its teacher has it. No labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from distill_jax.data import sources
from distill_jax.errors import InputError
from distill_jax.tasks import _texts
from distill_jax.tasks._skipped import LeftOut, check_on_bad
from distill_jax.types import Inputs


@dataclasses.dataclass(frozen=True)
class Task:
  """Lines of JSON with a text each, for the loss `embedding` and an online teacher.

  Attributes:
    path: a .jsonl file or a folder of them; `text` is the field.
    heldout_fraction: the share of texts that is held out, by a hash of each.
    max_tokens: a longer text is cut.
    tokenizer: a file; "": the model's own.
    on_bad: "stop" at a line that cannot be used, or "skip" it and count.
  """

  path: str = ""
  text: str = "text"
  heldout_fraction: float = 0.1
  max_tokens: int = 128
  tokenizer: str = ""
  on_bad: str = "stop"

  def __post_init__(self):
    check_on_bad("text_embeddings", self.on_bad)

  def open(self, split: str, pretrained: Any) -> _texts.Source:
    tokenizer = _texts.tokenizer_of("text_embeddings", self.tokenizer, pretrained)
    of = sources.Source("jsonl", self.path, split, self.text, self.heldout_fraction)
    texts, left_out = [], LeftOut("text_embeddings", self.on_bad)
    for line, where in sources.objects(of):
      text = line.get(self.text)
      if not isinstance(text, str) or not text.strip():
        left_out(where, f"has no text in its field {self.text!r}")
      elif sources.chosen(text, of):
        texts.append(text)
    left_out.report(len(texts))
    return _texts.Source(texts, [0] * len(texts), 1, tokenizer, self.max_tokens)

  def inputs(self, stack: Callable[[str], np.ndarray]) -> Inputs:
    return _texts.inputs(stack)

  def seen(self, stack: Callable[[str], np.ndarray]) -> np.ndarray:
    return _texts.seen(stack)

  def check(self, config: Any) -> None:
    if getattr(config, "num_labels", 1) or not hasattr(config, "embedding_size"):
      raise InputError(
        "text_embeddings wants a model that says an embedding of a text, such as bert with "
        f"num_labels 0, and this is a {type(config).__module__.rpartition('.')[2]}"
      )
    _texts.check_length("text_embeddings", self.max_tokens, config)

  def hub(self, config: Any) -> dict[str, Any]:
    """What sentence-transformers reads: the mean over tokens, then length 1."""
    parts = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
      {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
      for i, (path, kind) in enumerate(parts.items())
    ]
    return {
      "modules.json": modules,
      "sentence_bert_config.json": {"max_seq_length": self.max_tokens},
      "1_Pooling/config.json": {
        "word_embedding_dimension": config.hidden_size,
        "pooling_mode_mean_tokens": True,
      },
    }
