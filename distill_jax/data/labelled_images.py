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
from distill_jax.data.image_files import MODES, decode_errors, pillow, with_channels
from distill_jax.errors import InputError, bad_value
from distill_jax.runtime.progress import Progress

SUFFIXES = (".png", ".jpg", ".jpeg")
UBYTE = 8  # IDX's type code for unsigned bytes


@dataclasses.dataclass(frozen=True)
class LabelledImages:
  """N images and their labels.

  Attributes:
    pixels: A function from an index in `indices_N` to an image, uint8 [W, W, M]. Image files are
      read again at each call.
    indices_N: int64, the index of each image, for `pixels`.
    hashes_N: uint64, a hash of each image's pixels.
    labels_N: int32, the class index of each image.
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
    """A hash of each image's pixels as a number in [0, 1], float64, which determines its split."""
    return self.hashes_N / 2**64

  @functools.cached_property
  def digest(self) -> str:
    """The SHA-256 digest of all hashes and labels."""
    both = self.hashes_N.astype("<u8").tobytes() + self.labels_N.astype("<i4").tobytes()
    return hashlib.sha256(both).hexdigest()


def _hash(pixels_WWM: np.ndarray) -> int:
  """Returns a 64-bit hash of an image's pixels."""
  digest = hashlib.blake2b(np.ascontiguousarray(pixels_WWM).data, digest_size=8).digest()
  return int.from_bytes(digest)


@dataclasses.dataclass(frozen=True)
class ImageSpec:
  """The size and number of channels of all images.

  Attributes:
    size: The height and width in pixels.
    channels: 1 (grey) or 3 (colour). Images are converted if necessary.
    resize: True to resize images of other sizes, without keeping their aspect ratio. Otherwise they
      cannot be used.
  """

  size: int
  channels: int
  resize: bool = False

  def __post_init__(self):
    if self.channels not in MODES:
      raise bad_value("channels", self.channels, "1 or 3", "Choose one of them")
    if self.size < 1:
      raise bad_value("size", self.size, "a positive integer", "Increase it")

  def defect(self, width: int, height: int) -> str:
    """Returns the reason why an image of this size cannot be used, or "" if it can be used.

    The reason is a predicate, e.g. "is not 28 x 28".
    """
    if self.resize or (width, height) == (self.size, self.size):
      return ""
    return f"is not {self.size} x {self.size}"

  def pixels(self, image: Any) -> np.ndarray:
    """Returns the pixels of an image with this size and number of channels, uint8 [W, W, M]."""
    image = with_channels(image, self.channels)
    if image.size != (self.size, self.size):
      image = image.resize((self.size, self.size), pillow().Resampling.BILINEAR)
    return np.asarray(image).reshape(self.size, self.size, self.channels)


def read(
  path: str, classes: tuple[str, ...], spec: ImageSpec, bad: BadInputPolicy
) -> LabelledImages:
  """Reads labelled images from a folder of classes or from IDX files.

  Args:
    path: A folder that contains a folder of PNG and JPEG files for each class; or the common
      prefix of two IDX files, e.g. "fashion-mnist/train" for
      fashion-mnist/train-images-idx3-ubyte.gz and fashion-mnist/train-labels-idx1-ubyte.gz.
    classes: The names of the classes. A label is an index into them.
    spec: The size and number of channels of all images.
    bad: The policy for images that cannot be used and for classes without images.

  Raises:
    InputError: If nothing exists at `path`, if IDX files are damaged, or if `bad` raises it.
  """
  read_images = _folder if Path(path).is_dir() else _idx
  images = read_images(path, classes, spec, bad)
  counts = np.bincount(images.labels_N, minlength=len(classes))
  for name, n in zip(classes, counts, strict=True):
    if not n:
      bad.reject_subject(f"class {name!r} of {path}", "has no image")
  return images


def folders(path: str) -> tuple[str, ...]:
  """Returns the names of the classes in a folder: the names of its subfolders, sorted."""
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
  # Threads help, since decoding releases the GIL. Only a hash of each image stays in memory.
  pool = ThreadPoolExecutor()
  try:
    inspected = pool.map(lambda pair: _inspect(pair[0], spec), labelled_files)
    with Progress("open", len(labelled_files), "images") as progress:
      for (file, name), (hashed, why) in zip(labelled_files, inspected, strict=True):
        progress.add(1)
        why = why if name in classes else f"has class {name!r}, which is not a class of the task"
        if why:
          bad.reject_subject(str(file), why)
          continue
        files.append(file)
        hashes.append(hashed)
        labels.append(classes.index(name))
  finally:  # if `bad` raises an error, the other images are not inspected
    pool.shutdown(cancel_futures=True)
  pixels = functools.partial(_reread, files, hashes, spec)
  indices_N = np.arange(len(files))
  return LabelledImages(pixels, indices_N, np.array(hashes, np.uint64), np.array(labels, np.int32))


def _reread(files: Sequence[Path], hashes: Sequence[int], spec: ImageSpec, i: int) -> np.ndarray:
  """Returns the pixels of file i, and raises InputError if they have changed."""
  try:
    with pillow().open(files[i]) as image:
      pixels = spec.pixels(image)
  except decode_errors() as e:
    raise InputError(
      f"{files[i]} could be read at the start of the run, but not now ({e}). Restore the file."
    ) from e
  if _hash(pixels) != hashes[i]:
    raise InputError(f"{files[i]} has changed since the start of the run. Restart the run.")
  return pixels


def _inspect(file: Path, spec: ImageSpec) -> tuple[int, str]:
  """Returns (hash of the pixels, ""), or (0, predicate) if the file cannot be used."""
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
    raise InputError(
      f"{path} has {len(pixels)} images but {len(labels)} labels. Download both files again."
    )
  if why := spec.defect(*pixels.shape[:0:-1]):
    size = " x ".join(map(str, pixels.shape[1:]))
    raise InputError(f"An image of {path} {why}, but {size}. Set size, or resize=True.")
  good = labels < len(classes)
  for i in np.flatnonzero(~good):
    bad.reject_subject(
      f"image {i} of {path}", f"has label {labels[i]}, but there are {len(classes)} classes"
    )
  shape = (-1, spec.size, spec.size, spec.channels)
  arrays = [spec.pixels(pillow().fromarray(x)) for x in pixels[good]]
  images, indices_N = np.array(arrays, np.uint8).reshape(shape), np.arange(len(arrays))
  hashes_N = np.array([_hash(x) for x in arrays], np.uint64)
  return LabelledImages(images.__getitem__, indices_N, hashes_N, labels[good].astype(np.int32))


def _idx_array(path: str, end: str) -> np.ndarray:
  """Reads an IDX file of unsigned bytes.

  The format is two zero bytes, a byte for the type, a byte for the number of axes, the sizes as
  big-endian int32, and the data.

  Args:
    path: The beginning of the file name.
    end: The end of the file name, which contains the number of axes; ".gz" may follow it.

  Returns:
    uint8, with the axes of the file.
  """
  file = next((f for s in (".gz", "") if (f := Path(path + end + s)).is_file()), None)
  if file is None:
    raise InputError(
      f"{path} is not a folder, and {path}{end}[.gz] does not exist. Give a folder of classes, or "
      "the common prefix of IDX files."
    )
  raw = file.read_bytes()
  try:
    raw = gzip.decompress(raw) if file.suffix == ".gz" else raw
  except (OSError, EOFError, zlib.error) as e:
    raise InputError(f"{file} is damaged ({e}). Download it again.") from e
  axes = int(end.removesuffix("-ubyte")[-1])
  head = 4 + 4 * axes
  shape = tuple(np.frombuffer(raw[4:head], ">i4")) if len(raw) >= head else ()
  if raw[:4] != bytes((0, 0, UBYTE, axes)) or math.prod(map(int, shape)) != len(raw) - head:
    raise InputError(
      f"{file} is not a complete IDX file of bytes with {axes} axes. Download it again."
    )
  return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)
