"""Text classification, e.g. by sentiment, topic or language."""

from __future__ import annotations

import dataclasses

import numpy as np

from distill_jax.data import sources
from distill_jax.errors import InputError
from distill_jax.hub.pretrained import Pretrained
from distill_jax.models import FamilyConfig
from distill_jax.tasks import _texts
from distill_jax.tasks._base import Stack
from distill_jax.tasks._class_names import as_hub_config, check_names
from distill_jax.tasks._jsonl_task import JsonlTask, is_text, read_objects
from distill_jax.tasks._model_configs import TextEncoderConfig, wrong_kind
from distill_jax.types import Inputs, JsonObject


@dataclasses.dataclass(frozen=True)
class Task(JsonlTask):
  """One class per text."""

  text: str = "text"
  """Name of the .jsonl field with the text."""
  label: str = "label"
  """Name of the .jsonl field with the label, one of `classes`."""
  classes: tuple[str, ...] = ()
  """Names of the classes, in the order of the rows of the head; two or more."""
  max_tokens: int = 128
  """Maximum number of tokens of a text; a longer one is cut."""

  def __post_init__(self):
    super().__post_init__()
    check_names(self.classes)

  def open(self, split: str, pretrained: Pretrained | None) -> _texts.EncodedTexts:
    tokenizer = self.load_tokenizer(pretrained)
    source, bad = self.document_source(split, self.text), self.bad_examples()
    texts: list[str] = []
    labels: list[int] = []
    for line, where in read_objects(source, bad):
      text, label = line.get(self.text), line.get(self.label)
      if not is_text(text):
        bad.reject_subject(where, f"has no text in its field {self.text!r}")
      elif label not in self.classes:
        predicate = f"has {label!r:.40} in its field {self.label!r}, which is not a class"
        bad.reject_subject(where, predicate)
      elif sources.in_split(text, source):
        texts.append(text)
        labels.append(self.classes.index(label))
    bad.finish(len(texts))
    if empty := [c for i, c in enumerate(self.classes) if i not in set(labels)]:
      raise InputError(
        f"{self.path} has no text of class {empty[0]!r} among its {len(texts)} texts of split "
        f"{split!r}. Remove the class or add texts."
      )
    return _texts.EncodedTexts(texts, labels, len(self.classes), tokenizer, self.max_tokens)

  def inputs(self, stack: Stack) -> Inputs:
    return _texts.inputs(stack)

  def valid(self, stack: Stack) -> np.ndarray:
    return _texts.valid(stack)

  def check(self, config: FamilyConfig) -> None:
    if not isinstance(config, TextEncoderConfig) or not config.num_labels:
      expected = "a text classifier, e.g. bert with num_labels above 0"
      raise wrong_kind(self.kind, expected, config)
    _texts.check_length(self.kind, self.max_tokens, config)

  def hub_files(self, config: FamilyConfig) -> JsonObject:
    del config
    return {"config.json": as_hub_config(self.classes)}
