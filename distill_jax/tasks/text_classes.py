"""Texts to classes: sentiment, topic, language."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from distill_jax.data import corpus, sources
from distill_jax.data.tokenizers import Tokenizer, load_tokenizer
from distill_jax.errors import InputError
from distill_jax.tasks._classes import check_names, class_names
from distill_jax.tasks._left_out import LeftOut, check_on_bad
from distill_jax.types import Inputs


@dataclasses.dataclass(frozen=True)
class Task:
  """Lines of JSON, a text and its class each.

  Attributes:
    path: a .jsonl file or a folder of them.
    text, label: their fields. A label is one of `classes`.
    classes: the classes' names, in the order of the head's rows.
    heldout_fraction: the share of texts that is held out, by a hash of each.
    max_tokens: a longer text is cut.
    tokenizer: a file; "": the model's own.
    on_bad: "stop" at a line that cannot be used, or "skip" it and count.
  """

  path: str = ""
  text: str = "text"
  label: str = "label"
  classes: tuple[str, ...] = ()
  heldout_fraction: float = 0.1
  max_tokens: int = 128
  tokenizer: str = ""
  on_bad: str = "stop"

  def __post_init__(self):
    check_names("text_classes", self.classes)
    check_on_bad("text_classes", self.on_bad)
    if self.max_tokens < 3:
      raise InputError(f"text_classes has max_tokens {self.max_tokens}; it is at least 3")

  def open(self, split: str, came: Any) -> Source:
    tokenizer = self._tokenizer(came)
    of = sources.Source("jsonl", self.path, split, self.text, self.heldout_fraction)
    texts, labels, left_out = [], [], LeftOut("text_classes", self.on_bad)
    for line, where in sources.objects(of):
      text, label = line.get(self.text), line.get(self.label)
      if not isinstance(text, str) or not text.strip():
        left_out(where, f"has no text in its field {self.text!r}")
      elif label not in self.classes:
        left_out(where, f"has {label!r:.40} in its field {self.label!r}, which is no class")
      elif sources.chosen(text, of):
        texts.append(text)
        labels.append(self.classes.index(label))
    left_out.report(len(texts))
    if empty := [c for i, c in enumerate(self.classes) if i not in set(labels)]:
      raise InputError(
        f"{self.path} has no text of class {empty[0]!r} among its {len(texts)} of split {split!r}; "
        "leave the class out or give more texts"
      )
    return Source(self, texts, labels, tokenizer)

  def _tokenizer(self, came: Any) -> Tokenizer:
    if self.tokenizer:
      return load_tokenizer(self.tokenizer)
    if came is None or came.tokenizer is None:
      raise InputError("text_classes has no tokenizer and the model brings none; name a file")
    return corpus.of_files(came.tokenizer, came.source)

  def inputs(self, stack: Callable[[str], np.ndarray]) -> Inputs:
    tokens, segments = stack("read_S"), stack("seen_S")
    places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    read: Any = (tokens, places, segments)  # numpy until to_device
    return Inputs(*read)

  def seen(self, stack: Callable[[str], np.ndarray]) -> np.ndarray:
    return stack("seen_S") > 0

  def check(self, config: Any) -> None:
    if not hasattr(config, "num_labels"):
      raise InputError(
        f"text_classes wants a model that classifies texts, such as bert, and this is a "
        f"{type(config).__module__.rpartition('.')[2]}"
      )
    if self.max_tokens > config.max_position_embeddings:
      raise InputError(
        f"text_classes has max_tokens {self.max_tokens} and the model reads at most "
        f"{config.max_position_embeddings}; lower it"
      )

  def hub(self) -> dict[str, dict[str, Any]]:
    return {"config.json": class_names(self.classes)}


class Source:
  """Texts as tokens, in the order of the file; see distill_jax/tasks."""

  positions = 1

  def __init__(self, task: Task, texts: list[str], labels: list[int], tokenizer: Tokenizer):
    self.classes, self._max = len(task.classes), task.max_tokens
    ids = tokenizer.encode_batch(texts)
    self._ids = [_cut([*tokenizer.begin, *i, *tokenizer.end], self._max) for i in ids]
    self._labels = labels
    said = hashlib.sha256(json.dumps([self._ids, labels]).encode())
    said.update(tokenizer.digest.encode())
    self.digest = said.hexdigest()

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    ids = self._ids[i]
    read_S, seen_S = np.zeros(self._max, np.int32), np.zeros(self._max, np.int32)
    read_S[: len(ids)], seen_S[: len(ids)] = ids, 1
    label_T = np.array([self._labels[i]], np.int32)
    return {"read_S": read_S, "seen_S": seen_S, "labels_T": label_T, "mask_T": np.ones(1, bool)}


def _cut(ids: list[int], most: int) -> list[int]:
  """At most so many ids, of which the last stays: a text's end, as BERT's [SEP]."""
  return ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]
