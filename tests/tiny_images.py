"""Small image files of three classes, and a run on them."""

import gzip
import json
import struct

import numpy as np
from PIL import Image

from distill_jax import config

W, NAMES = 12, ("ankle", "bag", "coat")


def idx(path, array, gz=True):
  head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
  data = head + array.astype(np.uint8).tobytes()
  path.write_bytes(gzip.compress(data) if gz else data)


def write_idx(folder, n=40, labels=None, seed=0):
  """IDX files of n random images; returns what they hold."""
  rng = np.random.default_rng(seed)
  pixels = rng.integers(0, 256, (n, W, W))
  labels = np.arange(n) % 3 if labels is None else np.asarray(labels)
  idx(folder / "train-images-idx3-ubyte.gz", pixels)
  idx(folder / "train-labels-idx1-ubyte.gz", labels)
  return pixels, labels


def write_folder(folder, n=4, channels=1):
  """A folder of classes, of PNG files; returns pixels by class."""
  made = {}
  for k, name in enumerate(NAMES):
    (folder / name).mkdir(parents=True)
    made[name] = np.random.default_rng(k).integers(0, 256, (n, W, W, channels)).astype(np.uint8)
    for i, x in enumerate(made[name]):
      Image.fromarray(x[..., 0] if channels == 1 else x).save(folder / name / f"{i}.png")
  return made


def write_shades(folder, n, step):
  """Writes n grey squares of 8 by 8 whose texts name their shade; returns the .jsonl of pairs."""
  lines = []
  for i in range(n):
    Image.new("L", (8, 8), step * i).save(folder / f"{i}.png")
    lines.append(json.dumps({"image": f"{i}.png", "text": f"shade {i}"}))
  (folder / "pairs.jsonl").write_text("\n".join(lines))
  return str(folder / "pairs.jsonl")


def configured(folder):
  """The config of a run on `write_idx(folder)`: a ViT learns from a ViT, augmented."""
  c = config.base()
  for model in (c.teacher, c.student):
    model.family, model.shape = "vit", "tiny"
    model.changes = {"num_labels": 3, "num_hidden_layers": 1}
  c.tasks.things = config.task(
    "image_classes",
    train=str(folder / "train"),
    size=W,
    channels=1,
    classes=NAMES,
    mean=(0.4,),
    std=(0.3,),
    heldout_fraction=0.3,
    augment=("shift", "flip", "mix"),
    views=2,
  )
  c.augmentations.shift = config.augmentation("crop", pad=2)
  c.augmentations.flip = config.augmentation("flip")
  c.augmentations.mix = config.augmentation("mixup", alpha=1.0)
  c.records.kind, c.records.batch_size = "dense", 8
  c.losses.soft = config.loss("kd", temperature=2.0)
  c.train.records = (str(folder / "records"),)
  c.train.steps, c.train.batch_size, c.train.checkpoint_every = 2, 8, 2
  c.evaluate.batch_size = 8
  return c
