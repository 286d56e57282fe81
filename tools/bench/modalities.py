"""Compares steps on records with steps with an online teacher and on labels alone, by modality.

  python tools/bench/modalities.py [images …] [--rounds=10] [--seconds=5] [--small]

Each modality is a function below, which writes random data into a folder and returns the config of
a task, a teacher and a student. The teacher (with random weights) is recorded, the steps are
compiled and run in turn, and batches are loaded as in training, with augmentations. The last line
is a JSON object, in which the name of the modality is a prefix of each key:

  records_seconds, online_seconds  seconds per step (median), wall clock
  online_over_records              ratio of the two, the median over rounds
  records_over_labels              speed of training from records over that of training from labels
                                   alone, with the loader, the median over rounds
  records_over_labels_cpu_time     the same from the CPU time of all threads, for machines with
                                   other work; nothing is hidden by reading ahead
  examples_per_second              speed of the loader
  loader_over_step                 speed of the loader over the speed of the step on records
  loader_over_step_cpu_time        CPU time of a step on records over that of loading a batch
  bytes_per_example                size of the store

Results on two cores that other processes used (load 2.6 to 3.1), with `images --rounds=4
--seconds=3` and `tiny --rounds=10 --seconds=3`. In brackets is the version that decoded each record
alone:

  |                              | images      | tiny        |
  |------------------------------|-------------|-------------|
  | online_over_records          | 2.20        | 1.83        |
  | records_over_labels          | 1.01 (0.86) | 0.96 (0.35) |
  | records_over_labels_cpu_time | 1.02 (0.85) | 0.85 (0.35) |
  | loader_over_step             | 22.4 (7.1)  | 0.44 (0.29) |
  | loader_over_step_cpu_time    | 21.9 (7.1)  | 0.83 (0.27) |
  | bytes_per_example            | 146         | 146         |

What `tiny` has left in CPU time, for 64 examples and a step of 2.4 ms: kd and ce take 0.3 ms more
than ce alone, five more arrays on the device 0.2 ms, and reading the records 0.8 ms, most of which
is the overhead of a hundred calls of numpy. None of that grows with the model.

Earlier results on two busy cores, 6 rounds:

  |                       | texts | captions | translation | speech |
  |-----------------------|-------|----------|-------------|--------|
  | online_over_records   | 1.52  | 2.46     | 2.64        | 1.84   |
  | loader_over_step      | 14    | 32       | 5.1         | 18     |
  | bytes_per_example     | 128   | 2,560    | 2,080       | 3,072  |
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import itertools
import json
import os
import statistics
import struct
import tempfile
import time
import wave
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import tokenizers
from PIL import Image
from tokenizers import models, pre_tokenizers

from distill_jax import config
from distill_jax.commands import record
from distill_jax.models import loading, runs
from distill_jax.nn import sharding
from distill_jax.runtime.workdir import Workdir
from distill_jax.training import loop, state, stores

STEPS = 10  # steps of training in a round


def images(folder: Path, small: bool) -> ml_collections.ConfigDict:
  """Grey images of 28 x 28, shifted and mirrored: a ViT of 2.7 M parameters, a student of 0.1 M."""
  c = config.base()
  n, size = (64, 12) if small else (1_024, 28)
  rng = np.random.default_rng(0)
  for name, data in (
    ("images-idx3", rng.integers(0, 256, (n, size, size), dtype=np.uint8)),
    ("labels-idx1", (np.arange(n) % 10).astype(np.uint8)),
  ):
    head = struct.pack(f">BBBB{data.ndim}I", 0, 0, 8, data.ndim, *data.shape)
    (folder / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(head + data.tobytes(), 1))
  c.tasks.images = config.task(
    "image_classes",
    train=str(folder / "train"),
    classes=tuple("abcdefghij"),
    size=size,
    channels=1,
    augment=("shift", "flip"),
  )
  c.augmentations.shift = config.augmentation("crop", pad=2)
  c.augmentations.flip = config.augmentation("flip")

  def shape(width, layers, heads):
    return {
      "hidden_size": width,
      "intermediate_size": 4 * width,
      "num_hidden_layers": layers,
      "num_attention_heads": heads,
      "image_size": size,
      "patch_size": 4,
    }

  for model, changes in ((c.teacher, shape(192, 6, 6)), (c.student, shape(48, 3, 4))):
    model.family, model.shape, model.changes = "vit", "tiny", {} if small else changes
  c.train.batch_size = c.records.batch_size = 8 if small else 64
  c.records.kind = "dense"
  c.losses.soft = config.loss("kd")
  return c


def tiny(folder: Path, small: bool) -> ml_collections.ConfigDict:
  """The same images without augmentation, and a student of 3,000 parameters: a step is short."""
  c = images(folder, small)
  c.tasks.images.augment = ()
  shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
  size = {"image_size": c.tasks.images.size, "patch_size": c.tasks.images.size // 2}
  for model in (c.teacher, c.student):
    model.changes = {**shape, "num_attention_heads": 2, **size}
  return c


def words(folder: Path, count: int) -> str:
  """Writes a tokenizer with the words w0, w1, … and T5's special tokens; returns its path."""
  made = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)}, "w0"))
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  made.add_special_tokens(["<pad>", "</s>"])
  made.save(str(folder / "tokenizer.json"))
  return str(folder / "tokenizer.json")


def special(count: int) -> dict[str, int]:
  return {
    "vocab_size": count + 2,
    "pad_token_id": count,
    "eos_token_id": count + 1,
    "decoder_start_token_id": count,
  }


def random_words(rng: np.random.Generator, count: int, length: int) -> str:
  return " ".join(f"w{i}" for i in rng.integers(count, size=rng.integers(1, length)))


def texts(folder: Path, small: bool) -> ml_collections.ConfigDict:
  """Texts of up to 31 words in four classes: a BERT with MiniLM's shape, a student of 2 layers."""
  c, rng = config.base(), np.random.default_rng(0)
  n, count, length = (64, 50, 8) if small else (2_048, 30_000, 32)
  lines = [
    {"text": f"{i} {random_words(rng, count, length)}", "label": "abcd"[i % 4]} for i in range(n)
  ]
  (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  c.tasks.texts = config.task(
    "text_classes",
    path=str(folder / "texts.jsonl"),
    classes=tuple("abcd"),
    max_tokens=length,
    heldout_fraction=0.0,
    tokenizer=words(folder, count),
  )
  shape = {"vocab_size": count + 2, "num_labels": 4}
  for model, layers in ((c.teacher, 6), (c.student, 2)):
    model.family, model.shape = "bert", "tiny" if small else "minilm-l6"
    model.changes = {**shape, "num_hidden_layers": layers}
  c.train.batch_size = c.records.batch_size = 8 if small else 32
  c.records.kind = "dense"
  c.losses.soft = config.loss("kd")
  return c


def translation(folder: Path, small: bool) -> ml_collections.ConfigDict:
  """Pairs of up to 31 words, vocabulary 8,000: a T5 of 10 M parameters, a student of 2 M."""
  c, rng = config.base(), np.random.default_rng(0)
  n, count, length = (32, 50, 8) if small else (4_096, 8_000, 32)
  pairs = [
    {"source": random_words(rng, count, length), "target": random_words(rng, count, length)}
    for _ in range(n)
  ]
  (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
  c.tasks.pairs = config.task(
    "translation",
    path=str(folder / "pairs.jsonl"),
    heldout_fraction=0.0,
    source_len=length,
    target_len=length,
    tokenizer=words(folder, count),
  )

  def shape(width, layers):
    return {
      "d_model": width,
      "d_kv": width // 4,
      "d_ff": 2 * width,
      "num_layers": layers,
      "num_decoder_layers": layers,
    }

  for model, changes in ((c.teacher, shape(256, 4)), (c.student, shape(96, 2))):
    model.family, model.shape = "t5", "tiny"
    model.changes = {**special(count), **({} if small else changes)}
  c.train.batch_size = c.records.batch_size = 4 if small else 32
  c.losses.soft = config.loss("kd")
  return c


def speech(folder: Path, small: bool) -> ml_collections.ConfigDict:
  """Noise of up to 6 seconds: a Whisper with tiny.en's shape, a student of half its decoder."""
  c, rng = config.base(), np.random.default_rng(0)
  n, count, frames = (8, 50, 32) if small else (64, 51_862, 600)
  lines = []
  for i in range(n):
    samples = rng.integers(-9_999, 9_999, rng.integers(80, 80 * frames)).astype("<i2")
    with wave.open(str(folder / f"{i}.wav"), "wb") as f:
      f.setnchannels(1)
      f.setsampwidth(2)
      f.setframerate(8_000)  # resampled to 16 kHz on reading
      f.writeframes(samples.tobytes())
    lines.append({"audio": f"{i}.wav", "text": random_words(rng, count, 16)})
  (folder / "speech.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  c.tasks.speech = config.task(
    "speech",
    path=str(folder / "speech.jsonl"),
    heldout_fraction=0.0,
    frames=frames,
    bins=8 if small else 80,
    max_tokens=24,
    prompt=("<pad>",),
    end="</s>",
    tokenizer=words(folder, count),
  )
  shape = {} if small else {"max_source_positions": frames // 2}
  for model, layers in ((c.teacher, 4), (c.student, 2)):
    model.family, model.shape = "whisper", "tiny" if small else "whisper-tiny.en"
    model.changes = {**special(count), **shape, "decoder_layers": layers}
  c.student.train, c.student.frozen = "frozen", ("model.encoder.",)
  c.train.batch_size = c.records.batch_size = 4 if small else 8
  c.losses.soft = config.loss("kd")
  return c


def captions(folder: Path, small: bool) -> ml_collections.ConfigDict:
  """Images of 64 x 64 with a text each: a LLaVA of 20 M parameters, a student of 6 M."""
  c, rng = config.base(), np.random.default_rng(0)
  n, count, size, length = (16, 50, 8, 8) if small else (256, 8_000, 64, 32)
  lines = []
  for i in range(n):
    Image.fromarray(rng.integers(0, 256, (size, size), dtype=np.uint8)).save(folder / f"{i}.png")
    lines.append({"image": f"{i}.png", "text": random_words(rng, count, length)})
  (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
  patches = (size // 4 if small else size // 8) ** 2
  c.tasks.captions = config.task(
    "image_captions",
    path=str(folder / "captions.jsonl"),
    heldout_fraction=0.0,
    size=size,
    channels=1,
    mean=(0.5,),
    std=(0.25,),
    tokenizer=words(folder, count),
    prompt="w1 <image> w2",
    patches=patches,
    image_token=count,
    max_tokens=patches + length + 4,
    vocab_size=count + 2,
  )

  def shape(width: int, layers: int) -> dict[str, Any]:
    ids = {"vocab_size": count + 2}
    if small:
      return {"text": ids, "image_token": count}
    heads = {"num_attention_heads": width // 32, "num_hidden_layers": layers}
    both = {"hidden_size": width, "intermediate_size": 3 * width, **heads}
    text = {**ids, **both, "num_key_value_heads": width // 32, "head_dim": 32}
    return {
      "image_token": count,
      "vision": {**both, "image_size": size, "patch_size": 8},
      "text": {**text, "max_position_embeddings": 256},
    }

  for model, changes in ((c.teacher, shape(384, 6)), (c.student, shape(256, 2))):
    model.family, model.shape, model.changes = "llava", "tiny", changes
  c.student.train, c.student.frozen = "frozen", ("vision_tower.",)
  c.train.batch_size = c.records.batch_size = 4 if small else 8
  c.losses.soft = config.loss("kd")
  return c


MODALITIES: dict[str, Callable[[Path, bool], ml_collections.ConfigDict]] = {
  "texts": texts,
  "images": images,
  "tiny": tiny,
  "captions": captions,
  "translation": translation,
  "speech": speech,
}


def measured(c: ml_collections.ConfigDict, folder: Path, rounds: int, seconds: float):
  """Returns the results of one modality."""
  c.train.records = (str(folder / "records"),)
  recorded = config.resolve(c)
  with Workdir(folder / "records", recorded) as records:
    store = record.run(recorded, records)
  alone = dataclasses.replace(recorded.train, online=True, records=())
  c.train.records, c.losses.hard = (), config.loss("ce")
  del c.losses["soft"]
  ways = {
    "records": recorded,
    "online": dataclasses.replace(recorded, train=alone),
    "labels": config.resolve(c),
  }
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  steps = {name: Way(of, mesh) for name, of in ways.items()}
  times: dict[str, list[Clock]] = {}
  for i in range(rounds + 1):
    for name in sorted(steps, reverse=i % 2 == 1):
      way = steps[name]
      timed = {name: way.step()} | ({} if name == "online" else {f"{name}_train": way.train()})
      if i:  # the first round warms up
        for key, clock in timed.items():
          times.setdefault(key, []).append(clock)
  loads = steps["records"].load(seconds)

  def ratio(a: str, b: str, clock: str) -> float:
    pairs = zip(times[a], times[b], strict=True)
    return statistics.median(getattr(x, clock) / getattr(y, clock) for x, y in pairs)

  median = {name: statistics.median(t.wall for t in times[name]) for name in ("records", "online")}
  cpu, size = statistics.median(t.cpu for t in times["records"]), recorded.train.batch_size
  return {
    **{f"{name}_seconds": t for name, t in median.items()},
    "online_over_records": ratio("online", "records", "wall"),
    "records_over_labels": ratio("labels_train", "records_train", "wall"),
    "records_over_labels_cpu_time": ratio("labels_train", "records_train", "cpu"),
    "examples_per_second": size / loads.wall,
    "loader_over_step": median["records"] / loads.wall,
    "loader_over_step_cpu_time": cpu / loads.cpu,
    "bytes_per_example": store["bytes"] / store["sequences"],
  }


class Clock(NamedTuple):
  """Seconds per batch: wall clock, and CPU time of all threads."""

  wall: float
  cpu: float

  @classmethod
  def of(cls, run: Callable[[], int]) -> Clock:
    """Returns the time of a function per batch; it returns their number."""
    wall, cpu = time.perf_counter(), time.process_time()
    batches = run()
    return cls((time.perf_counter() - wall) / batches, (time.process_time() - cpu) / batches)


class Way:
  """A compiled step and its data."""

  def __init__(self, c: config.Config, mesh: Any):
    self.config, self.mesh, self.stores = c, mesh, stores.open_stores(c)
    keys = runs.keys(c.seed)
    step = loop.make_step(c, self.stores)
    student = loading.open_source(c.student, c.seed).load(mesh, keys["student"]).model
    self.program, self.state = jax.jit(step, donate_argnums=0), jax.jit(step.init)(student)
    self.teachers = {
      name: source.load(mesh, keys["teacher"]).model
      for name, source in state.online_teachers(c).items()
    }
    self.batch = next(stores.device_batches(c, self.stores, mesh))

  def step(self) -> Clock:
    """Runs one step, from the state of the last."""
    return Clock.of(lambda: self._run([self.batch]))

  def train(self) -> Clock:
    """Runs STEPS steps on batches from the loader, without the first."""
    batches = stores.device_batches(self.config, self.stores, self.mesh)
    next(batches)
    return Clock.of(lambda: self._run(itertools.islice(batches, STEPS)))

  def _run(self, batches: Iterable[Any]) -> int:
    n = 0
    for batch in batches:
      self.state, metrics = self.program(self.state, batch, self.teachers)
      n += 1
    assert np.isfinite(float(metrics["loss"]))
    return n

  def load(self, seconds: float) -> Clock:
    """Loads batches, without the first."""
    batches = stores.batches(self.config, self.stores)
    next(batches)
    end = time.perf_counter() + seconds
    return Clock.of(
      lambda: sum(1 for _ in itertools.takewhile(lambda _: time.perf_counter() < end, batches))
    )


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("names", nargs="*", default=list(MODALITIES), help="some of MODALITIES")
  parser.add_argument("--rounds", type=int, default=10)
  parser.add_argument("--seconds", type=float, default=5.0, help="seconds of loading")
  parser.add_argument("--small", action="store_true", help="tiny shapes, to check the script")
  args = parser.parse_args()
  figures: dict[str, float] = {}
  for name in args.names:
    with tempfile.TemporaryDirectory() as folder:
      made = MODALITIES[name](Path(folder), args.small)
      found = measured(made, Path(folder), args.rounds, args.seconds)
    figures |= {f"{name}_{key}": value for key, value in found.items()}
  for key, value in figures.items():
    print(f"{key:32}{value:14,.4f}")
  print(f"load {os.getloadavg()[0]:.1f}")
  print(json.dumps({k: round(v, 4) for k, v in figures.items()}))


if __name__ == "__main__":
  main()
