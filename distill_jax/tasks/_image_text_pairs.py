"""Images and their texts in files: what tasks of both share."""

from __future__ import annotations

import dataclasses
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distill_jax.data import image_files, sources
from distill_jax.errors import InputError
from distill_jax.models import FamilyConfig
from distill_jax.tasks._jsonl_task import JsonlTask, is_text, read_media
from distill_jax.tasks._model_configs import VisionConfig
from distill_jax.types import JsonObject


class ImageTextPair(NamedTuple):
  """An image's file, its text, and the sha256 of the file."""

  image: Path
  text: str
  digest: str


@dataclasses.dataclass(frozen=True)
class ImageTextTask(JsonlTask):
  """Where the pairs are, and how an image is read; see JsonlTask for tokenizer and on_bad.

  Attributes:
    path: a .jsonl file, whose image files are named from its folder on; or a folder of images,
      each beside a .txt file of its name.
    image, text: fields of a line.
    heldout: where the held-out pairs are, as `path`; "": a share `heldout_fraction` of path's, by
      a hash of each image's name.
    size, channels: of the model's input: the shorter side is brought to `size`, the middle cut.
    mean, std: of each channel, pixels being from 0 to 1.
    augment, views, seed: see Task.
  """

  image: str = "image"
  text: str = "text"
  heldout: str = ""
  size: int = 224
  channels: int = 3
  mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's
  std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
  augment: tuple[str, ...] = ()
  views: int = 1
  seed: int = 0

  def __post_init__(self):
    super().__post_init__()
    if self.channels not in (1, 3) or {len(self.mean), len(self.std)} != {self.channels}:
      raise InputError(
        f"{self.kind} has {self.channels} channels, mean {self.mean} and std {self.std}; there are "
        "1 (grey) or 3, with a mean and a std each"
      )
    if self.size < 1 or min(self.std) <= 0:
      raise InputError(
        f"{self.kind} has size {self.size} and std {self.std}; they are at least 1, and above 0"
      )

  def read_pairs(self, split: str) -> list[ImageTextPair]:
    """Returns the pairs of a split whose image can be read, in the order of the file."""
    source, bad = self.document_source(split, self.text), self.bad_examples()
    entries: list[tuple[Path, str, str]] = []
    for image, text, where in read_media(source, self.image, image_files.in_folder, bad):
      if not is_text(text):
        bad.reject_subject(where, "has no text")
      elif not image:
        bad.reject_subject(where, f"names no image in its field {self.image!r}")
      elif sources.in_split(image, source):
        entries.append((Path(image), text, where))
    with ThreadPoolExecutor(8) as pool:  # decoding releases the GIL
      digests = list(pool.map(self._digest, (image for image, _, _ in entries)))
    pairs = []
    for (path, text, where), digest in zip(entries, digests, strict=True):
      if digest:
        pairs.append(ImageTextPair(path, text, digest))
      else:
        bad.reject_subject(f"{where}: {path}", "is no image that can be read")
    bad.finish(len(pairs))
    return pairs

  def _digest(self, image: Path) -> str:
    """Returns the sha256 of a file; "" if it is not an image that can be read."""
    raw = image.read_bytes() if image.is_file() else b""
    readable = image_files.decode(raw, self.size, self.channels) is not None
    return hashlib.sha256(raw).hexdigest() if readable else ""

  def pixels(self, pair: ImageTextPair) -> np.ndarray:
    """Returns uint8 [size, size, channels].

    Raises:
      InputError: the file has changed since the run began.
    """
    raw = pair.image.read_bytes() if pair.image.is_file() else b""
    pixels = image_files.decode(raw, self.size, self.channels)
    if pixels is None or hashlib.sha256(raw).hexdigest() != pair.digest:
      raise InputError(f"{pair.image} is not the file it was when the run began; start it again")
    return pixels

  def check_images(self, vision: VisionConfig) -> None:
    """Refuses a vision tower that reads other images."""
    want = vision.image_size, vision.num_channels
    if (self.size, self.channels) != want:
      raise InputError(
        f"{self.kind} has size {self.size} with {self.channels} channels and the model reads "
        f"{want[0]} with {want[1]}; set them alike"
      )

  def hub_files(self, config: FamilyConfig) -> JsonObject:
    """Returns what transformers' CLIPImageProcessor reads."""
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
