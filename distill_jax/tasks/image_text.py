"""Images and the texts that belong to them: contrastive learning, as CLIP's."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.data import pictures, sources
from distill_jax.data.tokenizers import Tokenizer, load_tokenizer
from distill_jax.errors import InputError
from distill_jax.tasks import _texts
from distill_jax.tasks._left_out import LeftOut, check_on_bad
from distill_jax.types import PAIRED, Images, ImageText


@dataclasses.dataclass(frozen=True)
class Task:
  """Pairs; each image is to find its text among all of the batch, each text its image.

  Attributes:
    path: a .jsonl file, whose image files are named from its folder on; or a folder of images,
      each beside a .txt file of its name.
    image, text: fields of a line.
    heldout: where the held-out pairs are, as `path`; "": a share `heldout_fraction` of path's, by
      a hash of each image's name.
    size, channels: of what the model reads: the shorter side is brought to `size`, the middle cut.
    mean, std: of each channel, pixels being from 0 to 1.
    max_tokens: a longer text is cut before its end token.
    tokenizer: a file; "": the model's own.
    on_bad: "stop" at a pair that cannot be used, or "skip" it and count.
  """

  path: str = ""
  image: str = "image"
  text: str = "text"
  heldout: str = ""
  heldout_fraction: float = 0.1
  size: int = 224
  channels: int = 3
  mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's
  std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
  max_tokens: int = 77
  tokenizer: str = ""
  augment: tuple[str, ...] = ()
  views: int = 1
  seed: int = 0
  on_bad: str = "stop"

  def __post_init__(self):
    check_on_bad("image_text", self.on_bad)
    if self.channels not in (1, 3) or {len(self.mean), len(self.std)} != {self.channels}:
      raise InputError(
        f"image_text has {self.channels} channels, mean {self.mean} and std {self.std}; there are "
        "1 (grey) or 3, with a mean and a std each"
      )
    if self.size < 1 or min(self.std) <= 0:
      raise InputError(
        f"image_text has size {self.size} and std {self.std}; they are at least 1, and above 0"
      )

  def open(self, split: str, came: Any) -> Source:
    tokenizer = _texts.tokenizer_of("image_text", self.tokenizer, came)
    path = self.heldout if split == "heldout" and self.heldout else self.path
    fraction = 0.0 if self.heldout else self.heldout_fraction
    of = sources.Source("jsonl", path, split, self.text, fraction)
    left_out, pairs = LeftOut("image_text", self.on_bad), []
    for image, text, where in self._pairs(of):
      if not isinstance(text, str) or not text.strip():
        left_out(where, "has no text")
      elif not isinstance(image, str) or not image:
        left_out(where, f"names no image in its field {self.image!r}")
      elif sources.chosen(image, of):
        pairs.append((Path(image), text, where))
    with ThreadPoolExecutor(8) as pool:  # decoding releases the GIL
      digests = list(pool.map(lambda pair: self._digest(pair[0]), pairs))
    for (image, _, where), digest in zip(pairs, digests, strict=True):
      if not digest:
        left_out(f"{where}: {image}", "is no image that can be read")
    used = [(*pair[:2], digest) for pair, digest in zip(pairs, digests, strict=True) if digest]
    left_out.report(len(used))
    return Source(self, used, tokenizer)

  def _pairs(self, of: sources.Source) -> Iterator[tuple[Any, Any, str]]:
    """(the image's file, its text, where that stands) of every pair."""
    path = Path(of.path)
    if path.is_dir():
      for file in sorted(p for p in path.iterdir() if p.suffix.lower() in pictures.SUFFIXES):
        text = file.with_suffix(".txt")
        yield str(file), text.read_text() if text.is_file() else None, str(text)
      return
    for line, where in sources.objects(of):
      image = line.get(self.image)
      yield str(path.parent / image) if image else image, line.get(self.text), where

  def _digest(self, image: Path) -> str:
    """Of an image that can be read; "" of another."""
    raw = image.read_bytes() if image.is_file() else b""
    readable = pictures.decode(raw, self.size, self.channels) is not None
    return hashlib.sha256(raw).hexdigest() if readable else ""

  def inputs(self, stack: Callable[[str], np.ndarray]) -> ImageText:
    pixels: Any = pictures.normalised(stack("pixels_WWM"), self.mean, self.std)
    return ImageText(Images(pixels), _texts.inputs(stack))

  def seen(self, stack: Callable[[str], np.ndarray]) -> np.ndarray:
    """Of the images, as hidden states that are compared are theirs: no patch is padding."""
    return np.ones((len(stack("mask_T")), 1), bool)

  def check(self, config: Any) -> None:
    if config.head_rows != PAIRED:
      raise InputError(
        "image_text wants a model of images and texts, such as clip, and this is a "
        f"{type(config).__module__.rpartition('.')[2]}"
      )
    _texts.check_length("image_text", self.max_tokens, config)
    want = config.vision.image_size, config.vision.num_channels
    if (self.size, self.channels) != want:
      raise InputError(
        f"image_text has size {self.size} with {self.channels} channels and the model reads "
        f"{want[0]} with {want[1]}; set them alike"
      )
    if self.tokenizer and (n := load_tokenizer(self.tokenizer).vocab_size) > config.vocab_size:
      raise InputError(
        f"{self.tokenizer} has {n} tokens and the model {config.vocab_size} rows; take the model's"
      )

  def hub(self, config: Any) -> dict[str, Any]:
    """What CLIPImageProcessor is to do with an image."""
    del config
    size = {"height": self.size, "width": self.size}
    return {
      "preprocessor_config.json": {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "resample": 3,
        "size": {"shortest_edge": self.size}, "do_center_crop": True, "crop_size": size,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(self.mean), "image_std": list(self.std),
        "do_convert_rgb": self.channels == 3,
      }
    }  # fmt: skip


class Source:
  """Pairs, in the order of the file; see distill_jax/tasks. Images are read when asked for."""

  classes, positions = PAIRED, 2

  def __init__(self, task: Task, pairs: list[tuple[Path, str, str]], tokenizer: Tokenizer):
    self._task, self._images = task, [image for image, _, _ in pairs]
    texts = [text for _, text, _ in pairs]
    self._texts = _texts.Source(texts, [0] * len(texts), PAIRED, tokenizer, task.max_tokens)
    said = json.dumps([self._texts.digest, [digest for _, _, digest in pairs]])
    self.digest = hashlib.sha256(said.encode()).hexdigest()

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    image = pictures.decode(self._images[i].read_bytes(), self._task.size, self._task.channels)
    if image is None:
      raise InputError(f"{self._images[i]} was an image when the run began; bring it back")
    # The labels are rows of the batch that the pair will be in: see types.Batch.paired.
    labels = {"labels_T": np.zeros(2, np.int32), "mask_T": np.ones(2, bool)}
    return self._texts[i] | {"pixels_WWM": image} | labels
