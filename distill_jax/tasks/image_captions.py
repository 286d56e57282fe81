"""Images and their captions, for decoders that read images, such as LLaVA."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from distill_jax.data import image_files
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.hub.pretrained import Pretrained
from distill_jax.models import FamilyConfig
from distill_jax.tasks import _texts
from distill_jax.tasks._base import Example, Stack
from distill_jax.tasks._image_text_pairs import ImageTextPair, ImageTextTask
from distill_jax.tasks._model_configs import ImageDecoderConfig, wrong_kind
from distill_jax.types import Images, ImageText


@dataclasses.dataclass(frozen=True)
class Task(ImageTextTask):
  """The next token of the caption, after the image's patches and the prompt.

  Attributes:
    prompt: what stands before each image's text, with "<image>" where the patches are.
    patches: tokens that an image takes, and `image_token` their id, both as the model has them.
    max_tokens: of a row, the image's among them; a longer text is cut.
    vocab_size: rows of the model's head.
  """

  prompt: str = "<image>\n"
  patches: int = 576
  image_token: int = 32_000
  max_tokens: int = 704
  vocab_size: int = 32_064

  def __post_init__(self):
    super().__post_init__()
    if self.prompt.count("<image>") != 1:
      raise InputError(f"{self.kind} has prompt {self.prompt!r}; it has <image> once")

  def open(self, split: str, pretrained: Pretrained | None) -> CaptionedImages:
    tokenizer = self.load_tokenizer(pretrained)
    if tokenizer.eos_id is None:
      raise InputError(f"{tokenizer.where} has no end of a text; take one that has")
    return CaptionedImages(self, self.read_pairs(split), tokenizer, tokenizer.eos_id)

  def inputs(self, stack: Stack) -> ImageText:
    pixels: Any = image_files.normalised(stack("pixels_WWM"), self.mean, self.std)
    return ImageText(Images(pixels), _texts.inputs(stack))

  def check(self, config: FamilyConfig) -> None:
    if not isinstance(config, ImageDecoderConfig):
      raise wrong_kind(self.kind, "a decoder that reads images, such as llava", config)
    ours = self.patches, self.image_token, self.vocab_size
    model = config.vision.num_patches, config.image_token, config.head_rows
    if ours != model:
      raise InputError(
        f"image_captions has (patches, image_token, vocab_size) {ours} and the model {model}; set "
        "them alike"
      )
    _texts.check_length(self.kind, self.max_tokens, config)
    self.check_images(config.vision)


class CaptionedImages:
  """A TaskSource of rows of tokens with an image each, which is read when it is asked for."""

  def __init__(self, task: Task, pairs: Sequence[ImageTextPair], tokenizer: Tokenizer, eos: int):
    self.classes, self.positions = task.vocab_size, task.max_tokens
    self._task, self._pairs = task, pairs
    before, after = (tokenizer.encode(part) for part in task.prompt.split("<image>"))
    self._prompt = [*tokenizer.begin, *before, *[task.image_token] * task.patches, *after]
    if len(self._prompt) >= task.max_tokens:
      raise InputError(
        f"{task.kind} has max_tokens {task.max_tokens} and the prompt takes {len(self._prompt)} "
        "with its image; raise it"
      )
    self._ids = [[*ids, eos] for ids in tokenizer.encode_batch([p.text for p in pairs])]
    data = json.dumps([tokenizer.digest, self._prompt, self._ids, [p.digest for p in pairs]])
    self.digest = hashlib.sha256(data.encode()).hexdigest()

  def __len__(self) -> int:
    return len(self._pairs)

  def __getitem__(self, i: int) -> Example:
    T, first = self.positions, len(self._prompt)
    ids = np.array([*self._prompt, *self._ids[i]], np.int32)[: T + 1]
    tokens_S, labels_T = np.zeros(T, np.int32), np.zeros(T, np.int32)
    n = len(ids) - 1  # the last is a label alone
    tokens_S[:n], labels_T[:n] = ids[:-1], ids[1:]
    positions_T = np.arange(T)
    return {
      "tokens_S": tokens_S,
      "valid_S": (positions_T < n).astype(np.int32),
      "labels_T": labels_T,
      "mask_T": (positions_T >= first - 1) & (positions_T < n),
      "pixels_WWM": self._task.pixels(self._pairs[i]),
    }
