"""Image captioning, for decoders that read images, e.g. LLaVA."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence

import numpy as np

from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError, bad_value
from distill_jax.hub.pretrained import Pretrained
from distill_jax.models import FamilyConfig
from distill_jax.tasks import _texts
from distill_jax.tasks._base import Example
from distill_jax.tasks._image_text_pairs import ImageTextPair, ImageTextTask
from distill_jax.tasks._model_configs import (
  ImageDecoderConfig,
  check_as_in_model,
  check_images,
  wrong_kind,
)


@dataclasses.dataclass(frozen=True)
class Task(ImageTextTask):
  """Next-token prediction of a caption, given an image and a prompt."""

  prompt: str = "<image>\n"
  """Prompt before each caption; "<image>" marks the place of the image and must occur once."""
  patches: int = 576
  """Number of tokens that represent an image, as in the model."""
  image_token: int = 32_000
  """Id of these tokens, as in the model."""
  max_tokens: int = 704
  """Number of tokens per row, including those of the image; a longer text is cut."""
  vocab_size: int = 32_064
  """Number of rows of the model's head."""

  def __post_init__(self):
    super().__post_init__()
    if self.prompt.count("<image>") != 1:
      raise bad_value("prompt", self.prompt, "a text with <image> once", "Correct it")

  def open(self, split: str, pretrained: Pretrained | None) -> CaptionedImages:
    tokenizer = self.load_tokenizer(pretrained)
    if tokenizer.eos_id is None:
      raise InputError(
        f"{tokenizer.where} has no end token, which captions need. Use another tokenizer."
      )
    return CaptionedImages(self, self.read_pairs(split), tokenizer, tokenizer.eos_id)

  def check(self, config: FamilyConfig) -> None:
    if not isinstance(config, ImageDecoderConfig):
      raise wrong_kind(self.kind, "a decoder that reads images, e.g. llava", config)
    check_as_in_model(self.kind, "patches", self.patches, config.vision.num_patches)
    check_as_in_model(self.kind, "image_token", self.image_token, config.image_token)
    check_as_in_model(self.kind, "vocab_size", self.vocab_size, config.head_rows)
    _texts.check_length(self.kind, self.max_tokens, config)
    check_images(self.kind, self.size, self.channels, config.vision)


class CaptionedImages:
  """A TaskSource of token rows with one image each. Images are read on access."""

  def __init__(self, task: Task, pairs: Sequence[ImageTextPair], tokenizer: Tokenizer, eos: int):
    self.classes, self.positions = task.vocab_size, task.max_tokens
    self._task, self._pairs = task, pairs
    before, after = (tokenizer.encode(part) for part in task.prompt.split("<image>"))
    self._prompt = [*tokenizer.begin, *before, *[task.image_token] * task.patches, *after]
    if len(self._prompt) >= task.max_tokens:
      raise bad_value(
        f"{task.kind}.max_tokens",
        task.max_tokens,
        f"more than the {len(self._prompt)} tokens of the prompt and image",
        "Raise it",
      )
    self._ids = [[*ids, eos] for ids in tokenizer.encode_batch([p.text for p in pairs])]
    self.token_rows = 1 + max(map(max, [self._prompt, *self._ids]))
    data = json.dumps([tokenizer.digest, self._prompt, self._ids, [p.digest for p in pairs]])
    self.digest = hashlib.sha256(data.encode()).hexdigest()

  def __len__(self) -> int:
    return len(self._pairs)

  def __getitem__(self, i: int) -> Example:
    T, first = self.positions, len(self._prompt)
    ids = np.array([*self._prompt, *self._ids[i]], np.int32)[: T + 1]
    tokens_S, labels_T = np.zeros(T, np.int32), np.zeros(T, np.int32)
    n = len(ids) - 1  # the last token is only a label
    tokens_S[:n], labels_T[:n] = ids[:-1], ids[1:]
    positions_T = np.arange(T)
    return {
      "tokens_S": tokens_S,
      "valid_S": (positions_T < n).astype(np.int32),
      "labels_T": labels_T,
      "mask_T": (positions_T >= first - 1) & (positions_T < n),
      "pixels_WWM": self._task.pixels(self._pairs[i]),
    }
