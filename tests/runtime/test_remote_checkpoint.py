"""Checkpoints at gs:// and s3:// URLs, on real servers."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
import jax, jax.numpy as jnp
from distill_jax.runtime import checkpoint, storage
from distill_jax.errors import InputError

workdir = storage.run_folder(sys.argv[1])
state = {"a": jnp.arange(100_000.0), "b": jnp.ones((3, 4))}
if sys.argv[2] == "save":
  with checkpoint.manager(workdir) as saves:
    for step in (1, 2):
      checkpoint.save(saves, step, state, {"x": 1})
    checkpoint.wait(saves)
else:
  with checkpoint.manager(workdir) as saves:
    print(saves.all_steps())
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    abstract = jax.tree.map(shape, state)
    found = checkpoint.restore(saves, abstract, {"x": 1})
    print(all(bool((found[name] == state[name]).all()) for name in state))
"""


def run(store, tmp_path, verb):
  env = os.environ | store.environment() | {"DISTILL_JAX_CACHE": str(tmp_path / verb)}
  command = [sys.executable, "-c", SCRIPT, f"{store.url}/run", verb]
  return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("object_store", ["s3", "gcs"], indirect=True)
def test_a_checkpoint_is_saved_and_restored_by_another_machine(object_store, tmp_path):
  saved = run(object_store, tmp_path, "save")
  assert saved.returncode == 0, saved.stderr
  restored = run(object_store, tmp_path, "restore")
  assert restored.stdout.split("\n")[:2] == ["[2]", "True"], restored.stderr
