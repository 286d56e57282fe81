"""Labelled images from IDX files or a folder of classes."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import math
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.data.bad_input import BadInputPolicy
from distill_jax.data.image_files import decode_errors, pillow
from distill_jax.errors import InputError
from distill_jax.runtime.progress import Progress

SUFFIXES = (".png", ".jpg", ".jpeg")
UBYTE = 8  # IDX's code of a byte
MODES = {1: "L", 3: "RGB"}


@dataclasses.dataclass(frozen=True)
class LabelledImages:
  """N images and their labels.

  Attributes:
    pixels: returns an image, uint8 [W, W, M], by its number in `indices_N`; files are read anew.
    indices_N: int64, the number of each image, for `pixels`.
    hashes_N: uint64, of each image's pixels.
    labels_N: int32.
  """

  pixels: Callable[[int], np.ndarray]
  indices_N: np.ndarray
  hashes_N: np.ndarray
  labels_N: np.ndarray

  def __len__(self) -> int:
    return len(self.labels_N)

  def __getitem__(self, i: int) -> np.ndarray:
    return self.pixels(self.indices_N[i])

  def where(self, kept_N: np.ndarray) -> LabelledImages:
    """Returns the images where `kept_N` is True."""
    return LabelledImages(
      self.pixels, *(x[kept_N] for x in (self.indices_N, self.hashes_N, self.labels_N))
    )

  @property
  def shares_N(self) -> np.ndarray:
    """A number from 0 to 1 for each image, made from its pixels, that decides its split."""
    return self.hashes_N / 2**64

  @functools.cached_property
  def digest(self) -> str:
    """sha256 of all pixels' hashes and of the labels."""
    both = self.hashes_N.astype("<u8").tobytes() + self.labels_N.astype("<i4").tobytes()
    return hashlib.sha256(both).hexdigest()


def _hash(pixels_WWM: np.ndarray) -> int:
  """Returns a hash of 64 bits."""
  digest = hashlib.blake2b(np.ascontiguousarray(pixels_WWM).data, digest_size=8).digest()
  return int.from_bytes(digest)


@dataclasses.dataclass(frozen=True)
class ImageSpec:
  """What every image has to be.

  Attributes:
    size: height and width.
    channels: 1 or 3; colours become grey, or grey three equal colours.
    resize: images of other sizes are made this one, without regard to their shape.
  """

  size: int
  channels: int
  resize: bool = False

  def __post_init__(self):
    if self.channels not in MODES or self.size < 1:
      raise InputError(f"channels is {self.channels} and size {self.size}; 1 or 3 and above 0")

  def defect(self, width: int, height: int) -> str:
    """Returns why an image of this size cannot be used; "" if it can."""
    if self.resize or (width, height) == (self.size, self.size):
      return ""
    return f"is not {self.size} x {self.size}"

  def pixels(self, image: Any) -> np.ndarray:
    """Returns an image as the model reads it, uint8 [W, W, M]."""
    image = image.convert(MODES[self.channels])
    if image.size != (self.size, self.size):
      image = image.resize((self.size, self.size), pillow().Resampling.BILINEAR)
    return np.asarray(image).reshape(self.size, self.size, self.channels)


def read(
  path: str, classes: tuple[str, ...], spec: ImageSpec, bad: BadInputPolicy
) -> LabelledImages:
  """Reads the images of a folder of classes, or of IDX files, that can be used.

  Args:
    path: a folder with a folder of PNG and JPEG files for each class; or what the names of two
      IDX files begin with, such as "fashion-mnist/train" of train-images-idx3-ubyte.gz.
    classes: their names; a label is the number of one.
    spec: what every image has to be.
    bad: rejects images that cannot be used, and classes without images.

  Raises:
    InputError: there is nothing at `path`, or IDX files are damaged.
  """
  read_images = _folder if Path(path).is_dir() else _idx
  images = read_images(path, classes, spec, bad)
  counts = np.bincount(images.labels_N, minlength=len(classes))
  for name, n in zip(classes, counts, strict=True):
    if not n:
      bad.reject_subject(f"class {name!r} of {path}", "has no image")
  return images


def folders(path: str) -> tuple[str, ...]:
  """Returns the names of the classes that a folder holds."""
  return tuple(sorted(p.name for p in Path(path).iterdir() if p.is_dir()))


def _folder(
  path: str, classes: tuple[str, ...], spec: ImageSpec, bad: BadInputPolicy
) -> LabelledImages:
  labelled_files = [
    (file, name)
    for name in folders(path)
    for file in sorted(p for p in (Path(path) / name).iterdir() if not p.name.startswith("."))
  ]
  files, hashes, labels = [], [], []
  # Decoding releases the GIL; only a hash of each image is kept.
  pool = ThreadPoolExecutor()
  try:
    inspected = pool.map(lambda pair: _inspect(pair[0], spec), labelled_files)
    with Progress("open", len(labelled_files), "images") as progress:
      for (file, name), (hashed, why) in zip(labelled_files, inspected, strict=True):
        progress.add(1)
        why = why if name in classes else f"is of class {name!r}, which the task does not name"
        if why:
          bad.reject_subject(str(file), why)
          continue
        files.append(file)
        hashes.append(hashed)
        labels.append(classes.index(name))
  finally:  # where the first that is bad stops the run, the rest is not inspected
    pool.shutdown(cancel_futures=True)
  pixels = functools.partial(_reread, files, hashes, spec)
  indices_N = np.arange(len(files))
  return LabelledImages(pixels, indices_N, np.array(hashes, np.uint64), np.array(labels, np.int32))


def _reread(files: Sequence[Path], hashes: Sequence[int], spec: ImageSpec, i: int) -> np.ndarray:
  """Returns the pixels of file i; raises InputError if they have changed."""
  try:
    with pillow().open(files[i]) as image:
      pixels = spec.pixels(image)
  except decode_errors() as e:
    raise InputError(f"{files[i]} could be read when the run began ({e}); mend it") from e
  if _hash(pixels) != hashes[i]:
    raise InputError(f"{files[i]} has other pixels than when the run began; start it again")
  return pixels


def _inspect(file: Path, spec: ImageSpec) -> tuple[int, str]:
  """Returns (hash of the pixels, "") of a file, or (0, why it cannot be used)."""
  if file.suffix.lower() not in SUFFIXES:
    return 0, "is neither PNG nor JPEG"
  try:
    with pillow().open(file) as image:
      return (0, why) if (why := spec.defect(*image.size)) else (_hash(spec.pixels(image)), "")
  except decode_errors():
    return 0, "is damaged"


def _idx(
  path: str, classes: tuple[str, ...], spec: ImageSpec, bad: BadInputPolicy
) -> LabelledImages:
  pixels, labels = (_idx_array(path, f"-{n}-ubyte") for n in ("images-idx3", "labels-idx1"))
  if len(pixels) != len(labels):
    raise InputError(f"{path} has {len(pixels)} images and {len(labels)} labels; fetch both again")
  if why := spec.defect(*pixels.shape[:0:-1]):
    raise InputError(f"an image of {path} {why}, but {pixels.shape[1:]}; set size, or resize=True")
  good = labels < len(classes)
  for i in np.flatnonzero(~good):
    bad.reject_subject(
      f"image {i} of {path}", f"has label {labels[i]}, and there are {len(classes)} classes"
    )
  shape = (-1, spec.size, spec.size, spec.channels)
  arrays = [spec.pixels(pillow().fromarray(x)) for x in pixels[good]]
  images, indices_N = np.array(arrays, np.uint8).reshape(shape), np.arange(len(arrays))
  hashes_N = np.array([_hash(x) for x in arrays], np.uint64)
  return LabelledImages(images.__getitem__, indices_N, hashes_N, labels[good].astype(np.int32))


def _idx_array(path: str, end: str) -> np.ndarray:
  """Reads an IDX file: two zeros, a type, the number of axes, big-endian sizes, the bytes.

  Args:
    path: what the file's name begins with.
    end: what it ends with, with the number of axes in it; ".gz" may follow.

  Returns:
    uint8.
  """
  file = next((f for s in (".gz", "") if (f := Path(path + end + s)).is_file()), None)
  if file is None:
    raise InputError(
      f"{path} is no folder and there is no {path}{end}[.gz]; give a folder of classes, or what "
      "the names of IDX files begin with"
    )
  raw = file.read_bytes()
  try:
    raw = gzip.decompress(raw) if file.suffix == ".gz" else raw
  except (OSError, EOFError, zlib.error) as e:
    raise InputError(f"{file} is damaged ({e}); fetch it again") from e
  axes = int(end.removesuffix("-ubyte")[-1])
  head = 4 + 4 * axes
  shape = tuple(np.frombuffer(raw[4:head], ">i4")) if len(raw) >= head else ()
  if raw[:4] != bytes((0, 0, UBYTE, axes)) or math.prod(map(int, shape)) != len(raw) - head:
    raise InputError(f"{file} is no IDX file of {axes} axes, or cut off; fetch it again")
  return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)
