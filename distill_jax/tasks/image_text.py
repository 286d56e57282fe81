"""Contrastive learning from pairs of an image and a text, e.g. for CLIP."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import cast

import numpy as np

from distill_jax.data.tokenizers import Tokenizer, load_tokenizer
from distill_jax.errors import InputError
from distill_jax.hub.pretrained import Pretrained
from distill_jax.models import FamilyConfig
from distill_jax.tasks import _texts
from distill_jax.tasks._base import Example, Stack
from distill_jax.tasks._image_text_pairs import ImageTextPair, ImageTextTask
from distill_jax.tasks._model_configs import ImageTextConfig, check_images, wrong_kind
from distill_jax.types import IN_BATCH_CLASSES


@dataclasses.dataclass(frozen=True)
class Task(ImageTextTask):
  """Matching of each image to its text, and of each text to its image, within a batch."""

  max_tokens: int = 77
  """Maximum number of tokens of a text. A longer one is cut before its end token."""

  def open(self, split: str, pretrained: Pretrained | None) -> EncodedImageTextPairs:
    tokenizer = self.load_tokenizer(pretrained)
    return EncodedImageTextPairs(self, self.read_pairs(split), tokenizer)

  def valid(self, stack: Stack) -> np.ndarray:
    """Returns True for every row: features are those of the image tower, without padding."""
    return np.ones((len(stack("mask_T")), 1), bool)

  def check(self, config: FamilyConfig) -> None:
    if config.head_rows != IN_BATCH_CLASSES:
      raise wrong_kind(self.kind, "a model of images and texts, e.g. clip", config)
    image_text_config = cast(ImageTextConfig, config)  # head_rows identifies it
    _texts.check_length(self.kind, self.max_tokens, image_text_config)
    check_images(self.kind, self.size, self.channels, image_text_config.vision)
    if self.tokenizer:
      self._check_tokenizer(load_tokenizer(self.tokenizer), image_text_config)

  def _check_tokenizer(self, tokenizer: Tokenizer, config: ImageTextConfig) -> None:
    """Raises InputError if the tokenizer does not fit the text tower.

    The state at the end token represents the text, so both must use the same end token.
    """
    if (n := tokenizer.vocab_size) > config.vocab_size:
      raise InputError(
        f"{self.tokenizer} has {n} tokens, but the model's embedding table has {config.vocab_size} "
        "rows. Use the model's tokenizer."
      )
    end = config.text.eos_token_id
    end = n - 1 if end == 2 else end  # old files have 2 instead of the largest id
    if tokenizer.end != [end]:
      end_tokens = ", ".join(map(str, tokenizer.end)) or "none"
      raise InputError(
        f"{self.tokenizer} ends texts with token {end_tokens}, but eos_token_id of the text tower "
        f"is {end}. Correct eos_token_id, or use the model's tokenizer."
      )


class EncodedImageTextPairs:
  """A TaskSource of pairs in the order of the file. Images are read on access."""

  classes, positions = IN_BATCH_CLASSES, 2

  def __init__(self, task: Task, pairs: Sequence[ImageTextPair], tokenizer: Tokenizer):
    self._task, self._pairs = task, pairs
    texts, labels = [pair.text for pair in pairs], [0] * len(pairs)
    self._texts = _texts.EncodedTexts(texts, labels, self.classes, tokenizer, task.max_tokens)
    self.token_rows = self._texts.token_rows
    data = json.dumps([self._texts.digest, [pair.digest for pair in pairs]])
    self.digest = hashlib.sha256(data.encode()).hexdigest()

  def __len__(self) -> int:
    return len(self._pairs)

  def __getitem__(self, i: int) -> Example:
    image = {"pixels_WWM": self._task.pixels(self._pairs[i])}
    # The labels depend on the batch; Batch.with_contrastive_labels sets them.
    labels = {"labels_T": np.zeros(2, np.int32), "mask_T": np.ones(2, bool)}
    return self._texts[i] | image | labels
