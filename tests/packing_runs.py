"""Packing in this process or in one that kills itself; used by test_packed_text.py."""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import tiny
from tiny_store import contents

from distill_jax import config
from distill_jax.commands import pack
from distill_jax.data import packing, sources
from distill_jax.models import loading
from distill_jax.records.writer import Writer

BLOCK = 500  # bytes, so that a small corpus has many blocks
SHARD = 16  # rows
WINDOW = 4  # rows of the longest length


def write_corpus(path, documents=40):
  """Writes documents of very different lengths; some are blank."""
  with Path(path).open("w") as file:
    for i in range(documents):
      text = " ".join(tiny.sentences(1 + i % 13))
      file.write(json.dumps({"text": f"{i}: {text}" if i % 11 else " "}) + "\n" * (1 + i % 2))
  return str(path)


def made(folder, path, **data):
  """Returns the config of a corpus, with a shard for every SHARD rows."""
  folder.mkdir(parents=True, exist_ok=True)
  c = tiny.tiny(folder)
  c.teacher.source = ""
  c.data.kind, c.data.path, c.data.sequences = "jsonl", str(path), 0
  c.records.tokens_per_shard = SHARD * tiny.SEQ_LEN
  for key, value in data.items():
    setattr(c.data, key, value)
  return c


def run(c, folder, workers=1):
  """Packs with small blocks and windows; returns the result of the command."""
  c.pack.workers = workers
  before = sources.BLOCK_BYTES, packing.WINDOW_ROWS
  sources.BLOCK_BYTES, packing.WINDOW_ROWS = BLOCK, WINDOW
  try:
    return pack.run(config.resolve(c), folder)
  finally:
    sources.BLOCK_BYTES, packing.WINDOW_ROWS = before


def store_bytes(folder):
  """Returns the bytes of a store, without the notes about the corpus."""
  return {k: v for k, v in contents(folder).items() if k != "packing.json"}


def kill_in_shard(number, phase):
  """Kills this process with SIGKILL before or after a shard is registered."""
  write = Writer.write_shard
  written = 0

  def write_shard(self, rows, records):
    nonlocal written
    if (is_last := written == number) and phase == "before":
      os.kill(os.getpid(), signal.SIGKILL)
    shard = write(self, rows, records)
    written += 1
    if is_last:
      os.kill(os.getpid(), signal.SIGKILL)
    return shard

  Writer.write_shard = write_shard


def peak_bytes(folder, documents):
  """Packs short documents and opens their rows; returns the largest resident size."""
  folder.mkdir()
  with (folder / "many.jsonl").open("w") as file:
    file.writelines(json.dumps({"text": f"document {i}"}) + "\n" for i in range(documents))
  c = made(folder, folder / "many.jsonl")
  c.records.tokens_per_shard = 2**16
  resolved = config.resolve(c)
  pack.open_rows(resolved, loading.open_source(resolved.teacher), folder / "packed")
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
  if len(sys.argv) == 3:
    print(peak_bytes(Path(sys.argv[1]), int(sys.argv[2])))
  else:
    folder, path, workers, number, phase, data = sys.argv[1:]
    kill_in_shard(int(number), phase)
    run(made(Path(folder), path, **json.loads(data)), Path(folder) / "packed", int(workers))
