"""Exports of a checkpoint that is larger than the memory, and to a disk that is too small."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tiny_checkpoints import CONFIG

from distill_jax.models import llama
from distill_jax.runtime import checkpoint

ROOT = Path(__file__).parents[2]
LARGE = dataclasses.replace(
  CONFIG, vocab_size=8192, hidden_size=512, intermediate_size=2048, num_hidden_layers=14
)
MB = 2**20
SCRIPT = """
import dataclasses, json, resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import jax
from distill_jax.hub import export, tensors
from distill_jax.models import llama
from distill_jax.runtime import saved_arrays
import tiny_checkpoints

def peak():  # in bytes
  return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

def run(config, folder, to):
  abstract = jax.eval_shape(lambda: llama.Model(config, jax.random.key(0)))
  with saved_arrays.open_arrays(folder) as saved:
    export.export_model(abstract, to, saved=saved, tokenizer=None, generation={{}}, card="",
                        shard_bytes=20_000_000)

# The limits of the package, divided by 32 as the checkpoint is.
tensors.PART_BYTES, saved_arrays.CACHE_BYTES = 2 * 2**20, 8 * 2**20
small, large, to, file_limit = sys.argv[1:]
run(tiny_checkpoints.CONFIG, small, to + "-small")
before = peak()
if int(file_limit):
  resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_limit), int(file_limit)))
changes = json.loads({changes!r})
run(dataclasses.replace(tiny_checkpoints.CONFIG, **changes), large, to)
print(peak() - before)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """The checkpoints of a tiny model and of one of 52 million parameters."""
  folder = tmp_path_factory.mktemp("runs")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoint, "CHUNK_BYTES", 2**20)
    for name, c in (("small", CONFIG), ("large", LARGE)):
      model = jax.jit(lambda key, c=c: llama.Model(c, key))(jax.random.key(0))
      with checkpoint.manager(folder / name) as saves:
        checkpoint.save(saves, 1, {"params": model}, {})
  return folder


def export(runs, to, file_limit=0):
  changed = {k: v for k, v in vars(LARGE).items() if v != getattr(CONFIG, k)}
  script = SCRIPT.format(tests=str(ROOT / "tests"), changes=json.dumps(changed))
  line = [sys.executable, "-c", script, str(runs / "small"), str(runs / "large"), str(to)]
  env = os.environ | {"JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "2"}
  return subprocess.run([*line, str(file_limit)], capture_output=True, text=True, cwd=ROOT, env=env)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoint(runs, tmp_path):
  done = export(runs, tmp_path / "out")
  assert done.returncode == 0, done.stderr
  written = sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
  assert written > 80 * MB
  # In float32 the checkpoint takes twice this; the export holds less than half.
  assert int(done.stdout) < 0.5 * 2 * written, f"{int(done.stdout) / MB:.0f} MB"


def test_a_full_disk_leaves_nothing(runs, tmp_path):
  """A limit of 10 MB per file replaces a full disk: the system raises a similar error."""
  done = export(runs, tmp_path / "out", file_limit=10 * MB)
  assert done.returncode == 1 and "File too large" in done.stderr
  assert [p.name for p in tmp_path.iterdir()] == ["out-small"]
