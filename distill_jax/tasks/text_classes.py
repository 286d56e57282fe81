"""Texts to classes: sentiment, topic, language."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from distill_jax.data import sources
from distill_jax.errors import InputError
from distill_jax.tasks import _texts
from distill_jax.tasks._classes import check_names, class_names
from distill_jax.tasks._skipped import LeftOut, check_on_bad
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

  def open(self, split: str, pretrained: Any) -> _texts.Source:
    tokenizer = _texts.tokenizer_of("text_classes", self.tokenizer, pretrained)
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
    return _texts.Source(texts, labels, len(self.classes), tokenizer, self.max_tokens)

  def inputs(self, stack: Callable[[str], np.ndarray]) -> Inputs:
    return _texts.inputs(stack)

  def seen(self, stack: Callable[[str], np.ndarray]) -> np.ndarray:
    return _texts.seen(stack)

  def check(self, config: Any) -> None:
    if not getattr(config, "num_labels", 0):
      raise InputError(
        "text_classes wants a model that classifies texts, such as bert with num_labels, and this "
        f"is a {type(config).__module__.rpartition('.')[2]}"
      )
    _texts.check_length("text_classes", self.max_tokens, config)

  def hub(self, config: Any) -> dict[str, Any]:
    del config
    return {"config.json": class_names(self.classes)}
