"""Stores in the tokens of one small tokenizer, and configs that convert them to another's."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path

import numpy as np
import tiny
import tokenizers
from tiny_store import contents
from tokenizers import decoders, models, pre_tokenizers, trainers

from distill_jax import config
from distill_jax.commands import retarget
from distill_jax.cross_tokenizer import summary
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.records import registration, shard_writer, tfds_info
from distill_jax.records.store import Manifest, Writer

T, N, ROWS, HELDOUT, PER_SHARD = 32, 15, 20, 4, 6
END = "<|endoftext|>"


def write_tokenizer(path: Path, texts: list[str], tokens: int) -> Path:
  """Writes a byte-level BPE tokenizer of that many tokens, and one that ends documents."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=tokens, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
  )
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.save(str(path))
  return path


def write_tokenizers(folder: Path) -> tuple[Path, Path]:
  """Writes the teacher's tokenizer, with tokens of this text, and the student's, of another."""
  folder.mkdir(parents=True, exist_ok=True)
  student = [s.upper() + s for s in tiny.sentences(20)]
  return (
    write_tokenizer(folder / "teacher.json", tiny.sentences(), 330),
    write_tokenizer(folder / "student.json", student, 300),
  )


def records(tokenizer_file: Path, first: int, count: int) -> list[dict[str, np.ndarray]]:
  """Returns records whose samples hold the label, and other tokens at random."""
  tokenizer, out = load_tokenizer(tokenizer_file), []
  for i in range(first, first + count):
    rng = np.random.default_rng(i)
    tokens: list[int] = []
    segments: list[int] = []
    for number, sentence in enumerate(tiny.sentences(2 * (i + 1))[-2:], 1):
      ids = [*tokenizer.encode(sentence), tokenizer.eos_id]
      tokens += ids
      segments += [number] * len(ids)
    tokens, segments = tokens[:T], segments[:T]
    pad = T - len(tokens)
    segments_T = np.array(segments + [0] * pad, np.int32)
    tokens_T = np.array(tokens + [0] * pad, np.int32)
    mask_T = (segments_T > 0) & (np.append(segments_T[1:], 0) == segments_T)
    ids_TN = rng.integers(1, tokenizer.vocab_size, (T, N))
    ids_TN[:, : N // 2] = np.append(tokens_T[1:], 0)[:, None]
    out.append(
      {
        "tokens_T": tokens_T,
        "segments_T": segments_T,
        "mask_T": mask_T,
        "ids_TN": np.sort(ids_TN, 1).astype(np.int32),
        "argmax_T": np.append(tokens_T[1:], 0),
        "entropy_T": rng.random(T).astype(np.float32),
        "label_logp_T": np.full(T, np.log(0.5), np.float32),
      }
    )
  return out


def write_store(folder: Path, tokenizer_file: Path, rows: list, **change) -> Path:
  tokenizer = load_tokenizer(tokenizer_file)
  fields = {
    "kind": "sampled",
    "n": N,
    "vocab_size": tokenizer.vocab_size,
    "seq_len": T,
    "teacher": {"name": "t", "digest": "abc"},
    "tokenizer": tokenizer.digest,
    "corpus": "cor",
    "sequences_per_shard": PER_SHARD,
    "extents": (len(rows),),
  }
  with Writer(folder, Manifest(**{**fields, **change})) as writer:
    for r in writer.missing():
      writer.write_shard(r, (rows[i] for i in r))
    writer.complete()
  return folder


def write_source(folder: Path) -> Path:
  """Writes tokenizers, and folder/records, a store with held-out rows."""
  teacher, _ = write_tokenizers(folder)
  write_store(folder / "records", teacher, records(teacher, 0, ROWS))
  heldout = records(teacher, ROWS, HELDOUT)
  write_store(folder / "records" / "heldout", teacher, heldout, heldout_fraction=0.1)
  return folder


def made(folder: Path, **options):
  """Returns the config that converts folder/records, with some keys of `retarget`."""
  c = config.base()
  c.teacher.shape = c.student.shape = "tiny"
  c.data.tokenizer = str(folder / "teacher.json")
  c.retarget.records = str(folder / "records")
  c.retarget.tokenizer = str(folder / "student.json")
  c.retarget.workers = 1
  for key, value in options.items():
    c.retarget[key] = value
  return c


def run(c, workdir: Path | None = None) -> dict:
  """Runs the command with a config that is not resolved yet."""
  return retarget.run(config.resolve(c), workdir)


def stores(folder: Path) -> dict[str, dict[str, bytes]]:
  """Returns the bytes of the files of a store and of its held-out store."""
  return {name: contents(folder / name) for name in (".", "heldout")}


def kill_at(call: int) -> None:
  """Kills this process with SIGKILL at a call that changes the folder, counted from 0."""
  calls = itertools.count()

  def dying(function):
    def wrapped(*args, **kwargs):
      if next(calls) == call:
        os.kill(os.getpid(), signal.SIGKILL)
      return function(*args, **kwargs)

    return wrapped

  for module, name in (
    (summary, "write_shard"),
    (shard_writer, "digest"),
    (registration, "write"),
    (summary, "merge"),
    (tfds_info, "write"),
  ):
    setattr(module, name, dying(getattr(module, name)))
  Path.replace = dying(Path.replace)


if __name__ == "__main__":
  source, target, call, workers = sys.argv[1:]
  kill_at(int(call))
  run(made(Path(source), workers=int(workers)), Path(target))
