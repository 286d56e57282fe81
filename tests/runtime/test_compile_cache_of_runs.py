"""The compiled programs in a run's workdir: a start of the same run compiles nothing again."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import slow
import tiny

from distill_jax.runtime import compile_cache

ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_cache(monkeypatch):
  """This process without the tests' own cache, which is restored afterwards."""
  keys = ("jax_compilation_cache_dir", "jax_persistent_cache_enable_xla_caches")
  before = {key: getattr(jax.config, key) for key in keys}
  jax.config.update("jax_compilation_cache_dir", None)
  yield
  for key, value in before.items():
    jax.config.update(key, value)


def environment(**variables):
  """Returns the environment of a process that keeps all of its programs where its run does."""
  inherited = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
  return inherited | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | variables


def programs(workdir):
  return {p.name for p in workdir.glob(f"{compile_cache.FOLDER}/*/*-cache")}


@pytest.mark.slow
def test_a_start_on_another_machine_compiles_nothing_again(tiny_run, tmp_path):
  """The workdir without its checkpoints, as at the start; then a resumed run."""
  changes = "c.train.steps, c.evaluate.batch_size = 2, 4"
  config = tiny.write_config(tmp_path / "config.py", tiny_run, changes)
  workdir = tmp_path / "run"
  env = environment(JAX_LOG_COMPILES="0")
  line = [sys.executable, "-m", "distill_jax.cli", "train", f"--config={config}"]

  def train():
    done = subprocess.run(
      [*line, f"--workdir={workdir}"], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return programs(workdir)

  first = train()
  assert len(first) > 5
  shutil.rmtree(workdir / "checkpoints")
  assert train() == first


def test_the_folder_of_a_url_is_given_to_jax(no_cache):
  compile_cache.use("memory://bucket/run")  # jax does not write there
  assert jax.config.jax_compilation_cache_dir is None
  compile_cache.use("file:///tmp/run")
  assert jax.config.jax_compilation_cache_dir == f"/tmp/run/.jax_cache/{compile_cache.processor()}"


def test_the_users_folder_is_kept(no_cache):
  jax.config.update("jax_compilation_cache_dir", "/somewhere")
  compile_cache.use("/tmp/run")
  assert jax.config.jax_compilation_cache_dir == "/somewhere"


def test_a_full_folder_is_emptied(no_cache, tmp_path, monkeypatch):
  folder = tmp_path / compile_cache.FOLDER / compile_cache.processor()
  folder.mkdir(parents=True)
  (folder / "a-cache").write_bytes(bytes(100))
  compile_cache.use(tmp_path)
  assert list(folder.iterdir())
  jax.config.update("jax_compilation_cache_dir", None)
  monkeypatch.setattr(compile_cache, "MAX_BYTES", 99)
  compile_cache.use(tmp_path)
  assert not folder.exists()


SCRIPT = """
import sys
import jax, jax.numpy as jnp
from distill_jax.runtime import compile_cache
compile_cache.use(sys.argv[1])
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
print(jax.jit(lambda x: (x @ x.T).sum())(jnp.ones((3, 4))))
print("hits", events.count("/jax/compilation_cache/cache_hits"))
"""


@pytest.mark.parametrize("object_store", slow.all_but(("s3",), ("s3", "gcs")), indirect=True)
def test_programs_are_kept_at_object_stores(object_store, tmp_path):
  env = environment(**object_store.environment())
  line = [sys.executable, "-c", SCRIPT, object_store.url]
  outputs = []
  for _ in range(2):
    done = subprocess.run(line, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    outputs.append(done.stdout.split())
  assert outputs[0] == ["36.0", "hits", "0"]
  assert outputs[1][:2] == ["36.0", "hits"] and int(outputs[1][2]) > 0
