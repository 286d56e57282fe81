"""The compile cache of the tests: where it is, what is deleted, and that damage is harmless."""

import importlib.metadata
import os
from pathlib import Path

import compile_cache
import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

pytestmark = pytest.mark.smoke


def test_the_folder_is_of_one_jax_and_one_processor(monkeypatch, tmp_path):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  compile_cache.use(tmp_path)
  name = Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).name
  assert name == f"jax-{importlib.metadata.version('jax')}-{compile_cache.processor()}"


def test_the_callers_folder_is_used(monkeypatch, tmp_path):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
  compile_cache.use(tmp_path)
  assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/somewhere"


def test_programs_of_all_versions_are_deleted_after_two_weeks_without_use(tmp_path):
  now, day = 1_800_000_000.0, 24 * 3600
  ages = {"jax-1/old": (15, 15), "jax-2/read": (1, 15), "jax-2/new": (13, 13)}
  for name, (read, written) in ages.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    os.utime(tmp_path / name, (now - read * day, now - written * day))
  compile_cache.prune(tmp_path, now)
  left = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*")}
  assert left == {"jax-2/read", "jax-2/new"}


@pytest.fixture
def cache(tmp_path):
  """An empty folder that jax keeps every compiled program in."""
  keys = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
  before = {key: getattr(jax.config, key) for key in keys}
  for key, value in zip(keys, (str(tmp_path), 0), strict=True):
    jax.config.update(key, value)
  compilation_cache.reset_cache()
  yield tmp_path
  for key, value in before.items():
    jax.config.update(key, value)
  compilation_cache.reset_cache()


@pytest.mark.parametrize(
  "damage",
  [
    lambda whole: b"",
    lambda whole: whole[: len(whole) // 2],
    lambda whole: bytes(len(whole) // 2) + whole[len(whole) // 2 :],
  ],
  ids=["empty", "cut", "garbled"],
)
def test_a_damaged_program_is_compiled_again(damage, cache):
  """As a run that was killed while it wrote leaves them."""
  x = np.arange(12.0, dtype="float32").reshape(3, 4)
  total = lambda x: (x @ x.T).sum()
  want = jax.jit(total)(x)
  (program,) = cache.glob("*-cache")
  program.write_bytes(damage(program.read_bytes()))
  jax.clear_caches()
  with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
    assert jax.jit(total)(x) == want
