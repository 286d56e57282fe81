"""Image classification, from IDX files (the format of MNIST) or a folder per class."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.data import labelled_images
from distill_jax.data.image_files import normalised
from distill_jax.data.labelled_images import ImageSpec, LabelledImages
from distill_jax.errors import InputError, bad_value, check_choice
from distill_jax.hub.pretrained import Pretrained
from distill_jax.models import FamilyConfig
from distill_jax.tasks import _base
from distill_jax.tasks._base import Example, Stack
from distill_jax.tasks._class_names import as_hub_config, check_names
from distill_jax.tasks._jsonl_task import BadExamples
from distill_jax.tasks._model_configs import ImageEncoderConfig, check_images, wrong_kind
from distill_jax.types import Images, JsonObject

PIXELS = "pixels_WWM"
WHICH = ("all", "labelled", "unlabelled")


@dataclasses.dataclass(frozen=True)
class Task(_base.Task):
  """One label per image."""

  train: str = ""
  """Path of the training images: a folder with one subfolder per class, or a prefix of IDX files.

  The subfolders hold PNG and JPEG files. The prefix of fashion-mnist/train-images-idx3-ubyte.gz is
  "fashion-mnist/train".
  """
  heldout: str = ""
  """Path of the held-out images, in the format of `train`; "" holds out a fraction of `train`."""
  heldout_fraction: float = 0.1
  """Fraction of `train` that is held out if `heldout` is "", chosen by a hash of each image."""
  classes: tuple[str, ...] = ()
  """Names of the classes, in the order of the labels; () for the names of the subfolders."""
  size: int = 224
  """Height and width of the model's input, in pixels."""
  channels: int = 3
  """Number of channels of the model's input: 1 (grey) or 3 (RGB)."""
  resize: bool = False
  """True to resize images of other sizes; False to treat them as unusable."""
  mean: tuple[float, ...] = (0.5,)
  """Mean for pixels from 0 to 1: one number, or one per channel.

  The input is (pixel - mean) / std.
  """
  std: tuple[float, ...] = (0.5,)
  """Standard deviation for pixels from 0 to 1: one number, or one per channel."""
  labelled: float = 1.0
  """Fraction of the training images that counts as labelled, chosen by a hash of each image."""
  which: str = "all"
  """Training images to use: "all", "labelled" or "unlabelled".

  Records of unlabelled images hold the teacher's outputs, for losses that do not need labels.
  """
  augment: tuple[str, ...] = ()
  """Names in `augmentations`, applied to training images in this order."""
  views: int = 1
  """Number of augmented views of each training image."""
  seed: int = 0
  """Random seed of the augmentations."""
  on_bad: str = "stop"
  """Policy for images that cannot be used: "stop" with an error, or "skip" and count them."""

  def __post_init__(self):
    for key, values in (("mean", self.mean), ("std", self.std)):
      if len(values) not in (1, self.channels):
        expected = f"one number, or one for each of {self.channels} channels"
        raise bad_value(key, values, expected, "Correct it")
    if min(self.std) <= 0:
      raise bad_value("std", self.std, "numbers above 0", "Correct it")
    BadExamples(self.kind, self.on_bad)  # checks on_bad
    check_choice("which", self.which, WHICH, "Correct it")
    if not 0 < self.labelled <= 1:
      raise bad_value("labelled", self.labelled, "a fraction above 0 and at most 1", "Correct it")
    if not 0 < self.heldout_fraction < 1:
      expected = "a fraction above 0 and below 1"
      raise bad_value("heldout_fraction", self.heldout_fraction, expected, "Correct it")

  @property
  def image_spec(self) -> ImageSpec:
    """The required format of an image."""
    return ImageSpec(self.size, self.channels, self.resize)

  @functools.cached_property
  def names(self) -> tuple[str, ...]:
    """Names of the classes, in the order of the labels."""
    if not self.classes and not Path(self.train).is_dir():
      raise bad_value(
        f"{self.kind}.classes",
        (),
        f"the classes of {self.train}, which is not a folder",
        "List their names in the order of the labels",
      )
    names = self.classes or labelled_images.folders(self.train)
    check_names(names)
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
      # Lower bits of the hash, which are independent of those that choose the held-out images.
      shares_N = readable.shares_N * 2**16 % 1
      readable = readable.where((shares_N < self.labelled) == (self.which == "labelled"))
    if not len(readable):
      raise InputError(
        f"{path} has no image of split {split!r} with which={self.which!r}, "
        f"labelled={self.labelled} and heldout_fraction={self.heldout_fraction}. Add images."
      )
    return ClassifiedImages(readable, len(self.names))

  def inputs(self, stack: Stack) -> Images:
    pixels: Any = normalised(stack(PIXELS), self.mean, self.std)
    return Images(pixels)

  def valid(self, stack: Stack) -> np.ndarray:
    """Returns True for every row: no patch is padding."""
    return np.ones((len(stack(PIXELS)), 1), bool)

  def check(self, config: FamilyConfig) -> None:
    if not isinstance(config, ImageEncoderConfig):
      raise wrong_kind(self.kind, "an image classifier, e.g. vit", config)
    check_images(self.kind, self.size, self.channels, config)

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
  """A TaskSource of images. IDX files are in memory; other images are read on access."""

  images: LabelledImages
  classes: int
  positions: int = 1
  token_rows: int = 0

  @property
  def digest(self) -> str:
    """sha256 of the pixels and labels."""
    return self.images.digest

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, i: int) -> Example:
    return {
      PIXELS: self.images[i],
      "labels_T": self.images.labels_N[i : i + 1],
      "mask_T": np.ones(1, bool),
    }
