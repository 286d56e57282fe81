"""Images and their texts, as files hold them: what tasks of both share."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill_jax.data import image_files, sources
from distill_jax.errors import InputError
from distill_jax.tasks._skipped import LeftOut, check_on_bad


class Pair(NamedTuple):
  """An image's file, its text, and the sha256 of the file."""

  image: Path
  text: str
  digest: str


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Where pairs are, and how an image is read.

  Attributes:
    path: a .jsonl file, whose image files are named from its folder on; or a folder of images,
      each beside a .txt file of its name.
    image, text: fields of a line.
    heldout: where the held-out pairs are, as `path`; "": a share `heldout_fraction` of path's, by
      a hash of each image's name.
    size, channels: of what the model reads: the shorter side is brought to `size`, the middle cut.
    mean, std: of each channel, pixels being from 0 to 1.
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
  tokenizer: str = ""
  augment: tuple[str, ...] = ()
  views: int = 1
  seed: int = 0
  on_bad: str = "stop"

  def __post_init__(self):
    check_on_bad(self.kind, self.on_bad)
    if self.channels not in (1, 3) or {len(self.mean), len(self.std)} != {self.channels}:
      raise InputError(
        f"{self.kind} has {self.channels} channels, mean {self.mean} and std {self.std}; there are "
        "1 (grey) or 3, with a mean and a std each"
      )
    if self.size < 1 or min(self.std) <= 0:
      raise InputError(
        f"{self.kind} has size {self.size} and std {self.std}; they are at least 1, and above 0"
      )

  @property
  def kind(self) -> str:
    """What the task is called."""
    return type(self).__module__.rpartition(".")[2]

  def read(self, split: str) -> list[Pair]:
    """The pairs of a split whose image can be read, in the order of the file."""
    path = self.heldout if split == "heldout" and self.heldout else self.path
    fraction = 0.0 if self.heldout else self.heldout_fraction
    of = sources.Source("jsonl", path, split, self.text, fraction)
    left_out, found = LeftOut(self.kind, self.on_bad), []
    for image, text, where in self._named(of):
      if not isinstance(text, str) or not text.strip():
        left_out(where, "has no text")
      elif not isinstance(image, str) or not image:
        left_out(where, f"names no image in its field {self.image!r}")
      elif sources.chosen(image, of):
        found.append((Path(image), text, where))
    with ThreadPoolExecutor(8) as pool:  # decoding releases the GIL
      digests = list(pool.map(lambda pair: self._digest(pair[0]), found))
    pairs = []
    for (image, text, where), digest in zip(found, digests, strict=True):
      if digest:
        pairs.append(Pair(image, text, digest))
      else:
        left_out(f"{where}: {image}", "is no image that can be read")
    left_out.report(len(pairs))
    return pairs

  def _named(self, of: sources.Source) -> Iterator[tuple[Any, Any, str]]:
    """(the image's file, its text, where that stands) of every pair."""
    path = Path(of.path)
    if path.is_dir():
      for file in sorted(p for p in path.iterdir() if p.suffix.lower() in image_files.SUFFIXES):
        text = file.with_suffix(".txt")
        yield str(file), text.read_text() if text.is_file() else None, str(text)
      return
    for line, where in sources.objects(of):
      image = line.get(self.image)
      named = str(path.parent / image) if isinstance(image, str) and image else None
      yield named, line.get(self.text), where

  def _digest(self, image: Path) -> str:
    """Of an image that can be read; "" of another."""
    raw = image.read_bytes() if image.is_file() else b""
    readable = image_files.decode(raw, self.size, self.channels) is not None
    return hashlib.sha256(raw).hexdigest() if readable else ""

  def pixels(self, pair: Pair) -> np.ndarray:
    """uint8 [size, size, channels]; raises InputError if the file is not what it was."""
    raw = pair.image.read_bytes() if pair.image.is_file() else b""
    pixels = image_files.decode(raw, self.size, self.channels)
    if pixels is None or hashlib.sha256(raw).hexdigest() != pair.digest:
      raise InputError(f"{pair.image} is not the file it was when the run began; start it again")
    return pixels

  def check_images(self, vision: Any) -> None:
    """Refuses a vision tower that reads other images."""
    want = vision.image_size, vision.num_channels
    if (self.size, self.channels) != want:
      raise InputError(
        f"{self.kind} has size {self.size} with {self.channels} channels and the model reads "
        f"{want[0]} with {want[1]}; set them alike"
      )

  def hub(self, config: Any) -> dict[str, Any]:
    """What CLIPImageProcessor is to do with an image."""
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
