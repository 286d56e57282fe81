"""Images to classes, from IDX files (MNIST's format) or a folder of classes."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.data import labelled_images
from distill_jax.data.image_files import normalised
from distill_jax.data.labelled_images import ImageSpec, LabelledImages
from distill_jax.errors import InputError
from distill_jax.hub.pretrained import Pretrained
from distill_jax.models import FamilyConfig
from distill_jax.tasks import _base
from distill_jax.tasks._base import Example, Stack
from distill_jax.tasks._class_names import as_hub_config, check_names
from distill_jax.tasks._jsonl_task import BadExamples
from distill_jax.tasks._model_configs import ImageEncoderConfig
from distill_jax.types import Images, JsonObject

PIXELS = "pixels_WWM"
WHICH = ("all", "labelled", "unlabelled")


@dataclasses.dataclass(frozen=True)
class Task(_base.Task):
  """One label an image.

  Attributes:
    train: a folder with a folder of PNG and JPEG files for each class, or what the names of two
      IDX files begin with: "fashion-mnist/train" of fashion-mnist/train-images-idx3-ubyte.gz.
    heldout: another; "": a part of `train`, which is then not trained on.
    heldout_fraction: that part, chosen by each image's bytes.
    classes: their names in the order of the labels; (): the folders' names.
    size, channels, resize: of the images, see data/labelled_images.py.
    mean, std: of each channel, or one for all, of pixels from 0 to 1: what is read is
      (pixel - mean) / std.
    labelled: the part of the training images whose labels are known, chosen by each image's bytes.
    which: all | labelled | unlabelled, the training images that are read. Of images without
      labels, records hold the teacher's outputs, for losses that need no labels.
    augment: names in `augmentations`, in order.
    views: of each image, each with augmentations of its own.
    seed: of the augmentations.
    on_bad: "stop" at an image or a class that cannot be used, or "skip" it and count.
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
    BadExamples(self.kind, self.on_bad)  # refuses other values
    if self.which not in WHICH:
      raise InputError(f"which is {self.which!r}; it can be one of {', '.join(WHICH)}")
    if not 0 < self.labelled <= 1 or not 0 < self.heldout_fraction < 1:
      raise InputError(
        f"labelled is {self.labelled} and heldout_fraction {self.heldout_fraction}; parts above 0 "
        "were expected, and of heldout_fraction below 1"
      )

  @property
  def image_spec(self) -> ImageSpec:
    return ImageSpec(self.size, self.channels, self.resize)

  @functools.cached_property
  def names(self) -> tuple[str, ...]:
    """The names of the classes, in the order of the labels."""
    if not self.classes and not Path(self.train).is_dir():
      raise InputError(
        f"classes is () and {self.train!r} is no folder of classes; name the classes in the order "
        "of their labels"
      )
    names = self.classes or labelled_images.folders(self.train)
    check_names(self.kind, names)
    return names

  def open(self, split: str, pretrained: Pretrained | None) -> ClassifiedImages:
    del pretrained
    path = self.heldout if split == "heldout" and self.heldout else self.train
    bad = BadExamples(self.kind, self.on_bad)
    readable = labelled_images.read(path, self.names, self.image_spec, bad)
    bad.finish(len(readable))
    if not self.heldout:
      readable = readable.where((readable.shares_N < self.heldout_fraction) == (split == "heldout"))
    if split == "train" and self.which != "all":
      # Another part of the hash than the one that chooses what is held out.
      shares_N = readable.shares_N * 2**16 % 1
      readable = readable.where((shares_N < self.labelled) == (self.which == "labelled"))
    if not len(readable):
      raise InputError(
        f"{path} has no image for split {split!r}, which {self.which!r}, labelled {self.labelled}, "
        f"heldout_fraction {self.heldout_fraction}; give it more"
      )
    return ClassifiedImages(readable, len(self.names))

  def inputs(self, stack: Stack) -> Images:
    pixels: Any = normalised(stack(PIXELS), self.mean, self.std)
    return Images(pixels)

  def valid(self, stack: Stack) -> np.ndarray:
    """Returns True for all: no patch is padding."""
    return np.ones((len(stack(PIXELS)), 1), bool)

  def check(self, config: FamilyConfig) -> None:
    reads: tuple[int | None, int | None] = (None, None)
    if isinstance(config, ImageEncoderConfig):
      reads = config.image_size, config.num_channels
    if reads != (self.size, self.channels):
      raise InputError(
        f"the model reads images of (size, channels) {reads} and the task's are "
        f"{self.size, self.channels}; set size and channels here, or change the model"
      )

  def hub_files(self, config: FamilyConfig) -> JsonObject:
    del config
    return {
      "config.json": as_hub_config(self.names),
      "preprocessor_config.json": {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": self.size, "width": self.size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": self._per_channel(self.mean),
        "image_std": self._per_channel(self.std),
      },
    }

  def _per_channel(self, values: tuple[float, ...]) -> list[float]:
    return list(values) * (self.channels // len(values))


@dataclasses.dataclass(frozen=True)
class ClassifiedImages:
  """A TaskSource: IDX files are held in memory, other images are read when they are asked for."""

  images: LabelledImages
  classes: int
  positions: int = 1

  @property
  def digest(self) -> str:
    """sha256 of pixels and labels."""
    return self.images.digest

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, i: int) -> Example:
    return {
      PIXELS: self.images[i],
      "labels_T": self.images.labels_N[i : i + 1],
      "mask_T": np.ones(1, bool),
    }
