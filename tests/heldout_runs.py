"""Recording of training and held-out rows, in this process or in one that kills itself."""

import sys
from pathlib import Path

import packing_runs
import tiny
from json_lines import write_lines

from distill_jax import config
from distill_jax.commands import record

HELDOUT, ROWS = 8, 20


def made(folder: Path, heldout: int = HELDOUT):
  """Returns the config of a corpus with held-out documents; a random model is the teacher."""
  folder.mkdir(parents=True, exist_ok=True)
  c = tiny.tiny(folder)
  c.teacher.source = ""
  lines = enumerate(tiny.sentences())
  c.data.kind = "jsonl"
  c.data.path = str(
    write_lines(folder / "corpus.jsonl", ({"text": f"<{i}> {s}"} for i, s in lines))
  )
  c.data.heldout_fraction, c.data.sequences = 0.3, ROWS
  c.records.heldout_sequences = heldout
  c.pack.workers = 1
  return c


def run(c, folder: Path):
  return record.run(config.resolve(c), folder)


if __name__ == "__main__":
  packing_runs.kill_in_shard(int(sys.argv[2]), "after")
  run(made(Path(sys.argv[1])), Path(sys.argv[1]) / "records")
