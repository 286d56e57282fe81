"""Base class of tasks with pairs of an image and a text."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill_jax.data import image_files, sources
from distill_jax.errors import InputError, bad_value
from distill_jax.models import FamilyConfig
from distill_jax.tasks import _texts
from distill_jax.tasks._base import Stack
from distill_jax.tasks._jsonl_task import JsonlTask, is_text, media_folder, read_media
from distill_jax.types import Images, ImageText, JsonObject


class ImageTextPair(NamedTuple):
  """An image file, its text, and the sha256 of the file."""

  image: Path
  text: str
  digest: str


@dataclasses.dataclass(frozen=True)
class ImageTextTask(JsonlTask):
  """A task whose examples are pairs of an image and a text."""

  path: str = ""
  """A .jsonl file, or a folder of images.

  A .jsonl file names image files relative to its own folder. In a folder of images, the text of
  x.png is in x.txt.
  """
  image: str = "image"
  """Name of the .jsonl field with the image file's name."""
  text: str = "text"
  """Name of the .jsonl field with the text."""
  heldout: str = ""
  """Path of the held-out pairs, in the format of `path`.

  "" holds out a fraction `heldout_fraction` of `path`, chosen by a hash of each image's path
  relative to the folder of `path`.
  """
  size: int = 224
  """Height and width of the model's input, in pixels.

  Images are resized so that the shorter side has this length, and cropped at the centre.
  """
  channels: int = 3
  """Number of channels of the model's input: 1 (grey) or 3 (RGB)."""
  mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # those of OpenAI's CLIP
  """Mean of each channel, for pixels from 0 to 1. The input is (pixel - mean) / std."""
  std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
  """Standard deviation of each channel, for pixels from 0 to 1."""
  augment: tuple[str, ...] = ()
  """Names in `augmentations`, applied to training images in this order."""
  views: int = 1
  """Number of augmented views of each training pair."""
  seed: int = 0
  """Random seed of the augmentations."""

  def __post_init__(self):
    super().__post_init__()
    if self.channels not in (1, 3):
      raise bad_value("channels", self.channels, "1 (grey) or 3 (RGB)", "Correct it")
    for key, values in (("mean", self.mean), ("std", self.std)):
      if len(values) != self.channels:
        raise bad_value(key, values, f"{self.channels} numbers, one per channel", "Correct it")
    if min(self.std) <= 0:
      raise bad_value("std", self.std, "numbers above 0", "Correct it")
    if self.size < 1:
      raise bad_value("size", self.size, "at least 1", "Set the model's image size")

  def read_pairs(self, split: str) -> list[ImageTextPair]:
    """Returns the pairs of a split with a readable image, in the order of the file.

    Args:
      split: "train" or "heldout".

    Raises:
      InputError: A pair cannot be used and `on_bad` is "stop", or no pair can be used.
    """
    source, bad = self.document_source(split, self.text), self.bad_examples()
    entries: list[tuple[Path, str, str]] = []
    folder = media_folder(Path(source.path))
    for image, text, where in read_media(source, self.image, image_files.in_folder, bad):
      if not is_text(text):
        bad.reject_subject(where, "has no text")
      elif not image:
        bad.reject_subject(where, f"has no image in its field {self.image!r}")
      elif sources.in_split(os.path.relpath(image, folder), source):
        entries.append((Path(image), text, where))
    with ThreadPoolExecutor(8) as pool:  # decoding releases the GIL
      digests = list(pool.map(self._digest, (image for image, _, _ in entries)))
    pairs = []
    for (path, text, where), digest in zip(entries, digests, strict=True):
      if digest:
        pairs.append(ImageTextPair(path, text, digest))
      else:
        bad.reject_subject(f"{where}: {path}", "is not a readable image")
    bad.finish(len(pairs))
    return pairs

  def _digest(self, image: Path) -> str:
    """Returns the sha256 of a file; "" if it is not a readable image."""
    raw = image.read_bytes() if image.is_file() else b""
    readable = image_files.decode(raw, self.size, self.channels) is not None
    return hashlib.sha256(raw).hexdigest() if readable else ""

  def pixels(self, pair: ImageTextPair) -> np.ndarray:
    """Returns the image of a pair, uint8 [size, size, channels].

    Raises:
      InputError: The file has changed since the run began.
    """
    raw = pair.image.read_bytes() if pair.image.is_file() else b""
    pixels = image_files.decode(raw, self.size, self.channels)
    if pixels is None or hashlib.sha256(raw).hexdigest() != pair.digest:
      raise InputError(f"{pair.image} has changed since the run began. Start the run again.")
    return pixels

  def inputs(self, stack: Stack) -> ImageText:
    pixels: Any = image_files.normalised(stack("pixels_WWM"), self.mean, self.std)
    return ImageText(Images(pixels), _texts.inputs(stack))

  def hub_files(self, config: FamilyConfig) -> JsonObject:
    """Returns the config of transformers' CLIPImageProcessor."""
    del config
    size = {"height": self.size, "width": self.size}
    return {
      "preprocessor_config.json": {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "resample": 3,
        "size": {"shortest_edge": self.size},
        "do_center_crop": True,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(self.mean),
        "image_std": list(self.std),
        "do_convert_rgb": self.channels == 3,
      }
    }
