"""Exports from checkpoints at object stores to object stores, by several processes."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import slow
from local_stores import free_port
from object_stores import contents
from tiny_checkpoints import CONFIG

from distill_jax.hub import export
from distill_jax.models import llama
from distill_jax.runtime import checkpoint, saved_arrays

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import jax
from tiny_checkpoints import CONFIG
from distill_jax.errors import InputError, Unavailable
from distill_jax.hub import export, export_folder
from distill_jax.models import llama
from distill_jax.runtime import checkpoint, distributed, saved_arrays, storage

verb, run, target, flag = sys.argv[1:]
distributed.initialize(flag)
workdir = storage.run_folder(run)
init = lambda: llama.Model(CONFIG, jax.random.key(0))
if verb == "save":
  with checkpoint.manager(workdir) as saves:
    checkpoint.save(saves, 1, {{"params": init()}}, {{}})
else:
  write_file = export_folder._write_file
  def report(path, *rest):
    write_file(path, *rest)
    print("wrote", path.rpartition("/")[2], flush=True)
  export_folder._write_file = report
  extra = dict(tokenizer=None, generation={{}}, card="# card\\n", shard_bytes=20_000)
  with saved_arrays.open_arrays(workdir) as saved:
    export.export_model(jax.eval_shape(init), target, saved=saved, **extra)
"""


def start(store, tmp_path, verb, flag="", **env):
  env = os.environ | store.environment() | {"DISTILL_JAX_CACHE": str(tmp_path / verb), **env}
  env |= {"JAX_PLATFORMS": "cpu"}
  script = SCRIPT.format(tests=str(ROOT / "tests"))
  line = [sys.executable, "-c", script, verb, f"{store.url}/run", f"{store.url}/out", flag]
  return subprocess.Popen(
    line, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )


def finish(*processes):
  done = [p.communicate(timeout=200) for p in processes]
  assert not any(p.returncode for p in processes), "\n".join(err for _, err in done)
  return [{w.split()[1] for w in out.splitlines() if w.startswith("wrote")} for out, _ in done]


@pytest.fixture
def expected(tmp_path):
  """The files of the same export from memory."""
  model = llama.Model(CONFIG, jax.random.key(0))
  extra = {"tokenizer": None, "generation": {}, "card": "# card\n", "shard_bytes": 20_000}
  export.export_model(model, tmp_path / "expected", **extra)
  return {p.name: p.read_bytes() for p in (tmp_path / "expected").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("object_store", ["s3", "gcs"], indirect=True)
def test_two_processes_export_from_a_store_to_it(object_store, tmp_path, expected):
  finish(start(object_store, tmp_path, "save"))
  port = free_port()
  flags = [f"localhost:{port},2,{i}" for i in range(2)]
  one, two = finish(*[start(object_store, tmp_path, "export", flag) for flag in flags])
  shards = sorted(name for name in expected if name.endswith(".safetensors"))
  assert (one, two) == (set(shards[::2]), set(shards[1::2]))
  assert contents(f"{object_store.url}/out") == expected


@pytest.mark.parametrize(
  "object_store, fault",
  [
    ("s3", "reset_request"),
    slow.param("gcs", 503),
    slow.param("s3", 503),
    slow.param("gcs", "reset_request"),
  ],
  indirect=["object_store"],
)
def test_faults_in_the_middle_of_uploads(object_store, tmp_path, expected, fault):
  with checkpoint.manager(tmp_path) as saves:
    model = llama.Model(CONFIG, jax.random.key(0))
    checkpoint.save(saves, 1, {"params": model}, {})
  failed = []

  def fail(method, path):
    if method in ("PUT", "POST") and ".safetensors" in path and len(failed) < 3:
      failed.append(path)
      return fault
    return None

  object_store.proxy.fault = fail
  url = f"{object_store.url}/out"
  extra = {"tokenizer": None, "generation": {}, "card": "# card\n", "shard_bytes": 20_000}
  with saved_arrays.open_arrays(tmp_path) as saved:
    export.export_model(jax.eval_shape(lambda: model), url, saved=saved, **extra)
  assert len(failed) == 3
  assert contents(url) == expected
