"""Writes Fashion-MNIST with captions generated from its labels, for configs/fashion_clip.py.

  apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb runs/fashion
  python tools/fashion_captions.py runs/fashion/usr/share/datasets/fashion-mnist runs/fashion

Each caption is one of a few sentences with the name of the image's class. It is drawn at random for
training images and is always the first sentence for held-out images. So a caption contains only the
class of its image. The script always writes the same files:

  images/            PNG files
  train.jsonl        20,000 of the training images
  small.jsonl        the first 2,000 of them
  heldout.jsonl      5,000 of the test images
  tokenizer.json     a tokenizer with one token per word

The data is by Zalando (MIT licence, in the copyright file of the package).
"""

import argparse
import gzip
import json
import random
from pathlib import Path

import numpy as np
import tokenizers
from PIL import Image
from tokenizers import models, pre_tokenizers, processors

CLASSES = (
  "t-shirt",
  "trouser",
  "pullover",
  "dress",
  "coat",
  "sandal",
  "shirt",
  "sneaker",
  "bag",
  "boot",
)
SENTENCES = (
  "a photo of a {}",
  "a grey picture of a {}",
  "a small image of a {}",
  "this is a {}",
  "one {} on a black background",
  "a {} for sale",
  "a {} seen from the side",
  "here you see a {}",
)
START, END = "<|startoftext|>", "<|endoftext|>"


def read(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns (images uint8 [N, 28, 28], labels [N]) of "train" or "t10k"."""

  def content(kind, skip):
    return np.frombuffer(
      gzip.decompress((folder / f"{name}-{kind}-ubyte.gz").read_bytes()), np.uint8, offset=skip
    )

  return content("images-idx3", 16).reshape(-1, 28, 28), content("labels-idx1", 8)


def write(out: Path, images: np.ndarray, captions: list[str], split: str) -> None:
  """Writes the images and the JSONL file of a split."""
  lines = []
  for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
    name = f"images/{split}-{i:05d}.png"
    Image.fromarray(image).save(out / name)
    lines.append(json.dumps({"image": name, "text": caption}) + "\n")
  (out / f"{split}.jsonl").write_text("".join(lines))


def tokenizer() -> tokenizers.Tokenizer:
  """Returns the tokenizer for the captions."""
  words = sorted({w for s in (*SENTENCES, *CLASSES) for w in s.replace("{}", "").split()})
  vocabulary = {word: i for i, word in enumerate(("<unk>", *words, START, END))}
  made = tokenizers.Tokenizer(models.WordLevel(vocabulary, "<unk>"))
  made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  ends = [(t, vocabulary[t]) for t in (START, END)]
  made.post_processor = processors.TemplateProcessing(f"{START} $A {END}", None, ends)
  return made


def main(source: Path, out: Path) -> None:
  """Writes all files into `out`."""
  (out / "images").mkdir(parents=True, exist_ok=True)
  rng = random.Random(0)
  images, labels = read(source, "train")
  captions = [rng.choice(SENTENCES).format(CLASSES[i]) for i in labels[:20_000]]
  write(out, images[:20_000], captions, "train")
  lines = (out / "train.jsonl").read_text().splitlines(keepends=True)
  (out / "small.jsonl").write_text("".join(lines[:2_000]))
  images, labels = read(source, "t10k")
  write(out, images[:5_000], [SENTENCES[0].format(CLASSES[i]) for i in labels[:5_000]], "heldout")
  tokenizer().save(str(out / "tokenizer.json"))


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("source", type=Path, help="the folder of the four ubyte.gz files")
  parser.add_argument("out", type=Path, help="the folder to write")
  args = parser.parse_args()
  main(args.source, args.out)
