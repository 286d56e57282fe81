"""Images and the texts that belong to them: contrastive learning, such as CLIP's."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from distill_jax.data import image_files
from distill_jax.data.tokenizers import Tokenizer, load_tokenizer
from distill_jax.errors import InputError
from distill_jax.hub.pretrained import Pretrained
from distill_jax.models import FamilyConfig
from distill_jax.tasks import _texts
from distill_jax.tasks._base import Example, Stack
from distill_jax.tasks._image_text_pairs import ImageTextPair, ImageTextTask
from distill_jax.tasks._model_configs import ImageTextConfig, wrong_kind
from distill_jax.types import IN_BATCH_CLASSES, Images, ImageText


@dataclasses.dataclass(frozen=True)
class Task(ImageTextTask):
  """Each image is to find its text among all of the batch, each text its image.

  Attributes:
    max_tokens: a longer text is cut before its end token.
  """

  max_tokens: int = 77

  def open(self, split: str, pretrained: Pretrained | None) -> EncodedImageTextPairs:
    tokenizer = self.load_tokenizer(pretrained)
    return EncodedImageTextPairs(self, self.read_pairs(split), tokenizer)

  def inputs(self, stack: Stack) -> ImageText:
    pixels: Any = image_files.normalised(stack("pixels_WWM"), self.mean, self.std)
    return ImageText(Images(pixels), _texts.inputs(stack))

  def valid(self, stack: Stack) -> np.ndarray:
    """Returns True for all: features of the image tower are compared, and no patch is padding."""
    return np.ones((len(stack("mask_T")), 1), bool)

  def check(self, config: FamilyConfig) -> None:
    if config.head_rows != IN_BATCH_CLASSES:
      raise wrong_kind(self.kind, "a model of images and texts, such as clip", config)
    image_text_config = cast(ImageTextConfig, config)  # as its rows of the head tell
    _texts.check_length(self.kind, self.max_tokens, image_text_config)
    self.check_images(image_text_config.vision)
    if self.tokenizer:
      self._check_tokenizer(load_tokenizer(self.tokenizer), image_text_config)

  def _check_tokenizer(self, tokenizer: Tokenizer, config: ImageTextConfig) -> None:
    """Refuses another end token than the model's, whose state stands for the whole text."""
    if (n := tokenizer.vocab_size) > config.vocab_size:
      raise InputError(
        f"{self.tokenizer} has {n} tokens and the model {config.vocab_size} rows; take the model's"
      )
    end = config.text.eos_token_id
    end = n - 1 if end == 2 else end  # old files give 2 where they mean the largest id
    if tokenizer.end != [end]:
      end_tokens = ", ".join(map(str, tokenizer.end)) or "none"
      raise InputError(
        f"{self.tokenizer} ends texts with token {end_tokens} and the model with {end}; set "
        "eos_token_id of the text tower"
      )


class EncodedImageTextPairs:
  """A TaskSource of pairs in the order of the file; images are read when they are asked for."""

  classes, positions = IN_BATCH_CLASSES, 2

  def __init__(self, task: Task, pairs: Sequence[ImageTextPair], tokenizer: Tokenizer):
    self._task, self._pairs = task, pairs
    texts, labels = [pair.text for pair in pairs], [0] * len(pairs)
    self._texts = _texts.EncodedTexts(texts, labels, self.classes, tokenizer, task.max_tokens)
    data = json.dumps([self._texts.digest, [pair.digest for pair in pairs]])
    self.digest = hashlib.sha256(data.encode()).hexdigest()

  def __len__(self) -> int:
    return len(self._pairs)

  def __getitem__(self, i: int) -> Example:
    image = {"pixels_WWM": self._task.pixels(self._pairs[i])}
    # The labels are rows of the batch that the pair will be in: Batch.with_contrastive_labels.
    labels = {"labels_T": np.zeros(2, np.int32), "mask_T": np.ones(2, bool)}
    return self._texts[i] | image | labels
