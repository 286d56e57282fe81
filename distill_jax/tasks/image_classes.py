"""Images to classes, from IDX files (as MNIST has them) or a folder of classes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.data import labelled_images
from distill_jax.data.image_files import normalised
from distill_jax.data.labelled_images import ImageSpec, Labelled
from distill_jax.errors import InputError
from distill_jax.tasks._classes import check_names, class_names
from distill_jax.tasks._skipped import LeftOut, check_on_bad
from distill_jax.types import Images

PIXELS = "pixels_WWM"


@dataclasses.dataclass(frozen=True)
class Task:
  """One label an image.

  Attributes:
    train: a folder with a folder of PNG and JPEG files for each class, or what the names of two
      IDX files begin with: "fashion-mnist/train" of fashion-mnist/train-images-idx3-ubyte.gz.
    heldout: another; "": a part of `train`, which is then not trained on.
    heldout_fraction: that part, chosen by each image's bytes.
    classes: their names in the order of the labels; (): the folders' names.
    size, channels, resize: of the images, see data/images.py.
    mean, std: of each channel, or one for all, of pixels from 0 to 1: what is read is
      (pixel - mean) / std.
    labelled: the part of the training images whose labels are known, chosen by each image's bytes.
    which: all | labelled | unlabelled, the training images that are read. Of images without
      labels records hold what the teacher says, for losses that ask no more.
    augment: names in `augmentations`, in order.
    views: of each image, each with augmentations of its own.
    seed: of the augmentations.
    on_bad: stop | skip, what is to happen where an image or a class cannot be used.
  """

  train: str = ""
  heldout: str = ""
  heldout_fraction: float = 0.1
  classes: tuple[str, ...] = ()
  size: int = 224
  channels: int = 3
  resize: bool = False
  mean: tuple[float, ...] = (0.5,)
  std: tuple[float, ...] = (0.5,)
  labelled: float = 1.0
  which: str = "all"
  augment: tuple[str, ...] = ()
  views: int = 1
  seed: int = 0
  on_bad: str = "stop"

  def __post_init__(self):
    if any(len(v) not in (1, self.channels) for v in (self.mean, self.std)) or min(self.std) <= 0:
      raise InputError(
        f"mean is {self.mean} and std {self.std}; one number, or one for each of {self.channels} "
        "channels, was expected, and std above 0"
      )
    check_on_bad("image_classes", self.on_bad)
    if self.which not in WHICH:
      raise InputError(f"which is {self.which!r}; it can be one of {', '.join(WHICH)}")
    if not 0 < self.labelled <= 1 or not 0 < self.heldout_fraction < 1:
      raise InputError(
        f"labelled is {self.labelled} and heldout_fraction {self.heldout_fraction}; parts above 0 "
        "were expected, and of heldout_fraction below 1"
      )

  @property
  def form(self) -> ImageSpec:
    return ImageSpec(self.size, self.channels, self.resize)

  @functools.cached_property
  def names(self) -> tuple[str, ...]:
    """Of the classes."""
    if not self.classes and not Path(self.train).is_dir():
      raise InputError(
        f"classes is () and {self.train!r} is no folder of classes; name the classes in the order "
        "of their labels"
      )
    names = self.classes or labelled_images.folders(self.train)
    check_names("image_classes", names)
    return names

  def open(self, split: str, pretrained: Any) -> Source:
    """The images of "train" or "heldout"; raises InputError as data/images.py does."""
    del pretrained
    path = self.heldout if split == "heldout" and self.heldout else self.train
    left_out = LeftOut("image_classes", self.on_bad)
    found = labelled_images.read(path, self.names, self.form, left_out)
    left_out.report(len(found))
    if not self.heldout:
      found = found.where((found.shares_N < self.heldout_fraction) == (split == "heldout"))
    if split == "train" and self.which != "all":
      # Another part of the hash than the one that chooses what is held out.
      shares_N = found.shares_N * 2**16 % 1
      found = found.where((shares_N < self.labelled) == (self.which == "labelled"))
    if not len(found):
      raise InputError(
        f"{path} has no image for split {split!r}, which {self.which!r}, labelled {self.labelled}, "
        f"heldout_fraction {self.heldout_fraction}; give it more"
      )
    return Source(found, len(self.names))

  def inputs(self, stack: Callable[[str], np.ndarray]) -> Images:
    """What a model reads, of a batch's arrays by name."""
    pixels: Any = normalised(stack(PIXELS), self.mean, self.std)
    return Images(pixels)

  def seen(self, stack: Callable[[str], np.ndarray]) -> np.ndarray:
    """No position is padding."""
    return np.ones((len(stack(PIXELS)), 1), bool)

  def check(self, config: Any) -> None:
    """Refuses a model that cannot read these images or say these classes."""
    reads = tuple(getattr(config, key, None) for key in ("image_size", "num_channels"))
    if reads != (self.size, self.channels):
      raise InputError(
        f"the model reads images of (size, channels) {reads} and the task's are "
        f"{self.size, self.channels}; set size and channels here, or change the model"
      )

  def hub(self, config: Any) -> dict[str, dict[str, Any]]:
    """What an export's JSON files say beside the model's shape."""
    del config
    wide = lambda v: list(v) * (self.channels // len(v))
    return {
      "config.json": class_names(self.names),
      "preprocessor_config.json": {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": self.size, "width": self.size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": wide(self.mean),
        "image_std": wide(self.std),
      },
    }


WHICH = ("all", "labelled", "unlabelled")


@dataclasses.dataclass(frozen=True)
class Source:
  """The images of one split: IDX files are held in memory, others are read when asked for."""

  images: Labelled
  classes: int
  positions: int = 1

  @property
  def digest(self) -> str:
    """sha256 of pixels and labels."""
    return self.images.digest

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    return {
      PIXELS: self.images[i],
      "labels_T": self.images.labels_N[i : i + 1],
      "mask_T": np.ones(1, bool),
    }
