"""An image, a question of it perhaps, and what is said of it: for decoders that see, as LLaVA."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from distill_jax.data import image_files
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.tasks import _image_text_pairs, _texts
from distill_jax.types import Images, ImageText


@dataclasses.dataclass(frozen=True)
class Task(_image_text_pairs.Pairs):
  """The next token of the text after the image's patches and the prompt; of the text alone.

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

  def open(self, split: str, pretrained: Any) -> Source:
    tokenizer = _texts.tokenizer_of(self.kind, self.tokenizer, pretrained)
    if tokenizer.eos_id is None:
      raise InputError(f"{tokenizer.where} has no end of a text; take one that has")
    return Source(self, self.read(split), tokenizer, tokenizer.eos_id)

  def inputs(self, stack: Callable[[str], np.ndarray]) -> ImageText:
    pixels: Any = image_files.normalised(stack("pixels_WWM"), self.mean, self.std)
    return ImageText(Images(pixels), _texts.inputs(stack))

  def check(self, config: Any) -> None:
    if not hasattr(config, "image_token"):
      raise InputError(
        "image_captions wants a decoder that sees, such as llava, and this is a "
        f"{type(config).__module__.rpartition('.')[2]}"
      )
    ours = self.patches, self.image_token, self.vocab_size
    model = config.vision.patches, config.image_token, config.head_rows
    if ours != model:
      raise InputError(
        f"image_captions has (patches, image_token, vocab_size) {ours} and the model {model}; set "
        "them alike"
      )
    _texts.check_length(self.kind, self.max_tokens, config)
    self.check_images(config.vision)


class Source:
  """Rows of tokens beside an image each; see distill_jax/tasks. Images are read when asked for."""

  def __init__(
    self, task: Task, pairs: list[_image_text_pairs.Pair], tokenizer: Tokenizer, end: int
  ):
    self.classes, self.positions = task.vocab_size, task.max_tokens
    self._task, self._pairs = task, pairs
    before, after = (tokenizer.encode(part) for part in task.prompt.split("<image>"))
    self._prompt = [*tokenizer.begin, *before, *[task.image_token] * task.patches, *after]
    if len(self._prompt) >= task.max_tokens:
      raise InputError(
        f"{task.kind} has max_tokens {task.max_tokens} and the prompt takes {len(self._prompt)} "
        "with its image; raise it"
      )
    self._ids = [[*ids, end] for ids in tokenizer.encode_batch([p.text for p in pairs])]
    said = json.dumps([tokenizer.digest, self._prompt, self._ids, [p.digest for p in pairs]])
    self.digest = hashlib.sha256(said.encode()).hexdigest()

  def __len__(self) -> int:
    return len(self._pairs)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    T, first = self.positions, len(self._prompt)
    ids = np.array([*self._prompt, *self._ids[i]], np.int32)[: T + 1]
    read_S, labels_T = np.zeros(T, np.int32), np.zeros(T, np.int32)
    n = len(ids) - 1  # the last is a label alone
    read_S[:n], labels_T[:n] = ids[:-1], ids[1:]
    places = np.arange(T)
    return {
      "read_S": read_S,
      "seen_S": (places < n).astype(np.int32),
      "labels_T": labels_T,
      "mask_T": (places >= first - 1) & (places < n),
      "pixels_WWM": self._task.pixels(self._pairs[i]),
    }
