"""Four virtual CPU devices, and rank promotion that raises, in every test.

Most of a test's time goes into compiling. XLA's options therefore make compiling fast and not the
programs (its older emitters of fusions need a quarter of the time), and all test runs of a checkout
share the compiled programs (compile_cache.py).
"""

import importlib.metadata
import os

import compile_cache

os.environ["JAX_PLATFORMS"] = "cpu"
compile_cache.use()
# Compiling the many small programs takes as long as the few large ones: all of them are kept.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
QUICK = [
  "--xla_backend_optimization_level=0",
  "--xla_cpu_parallel_codegen_split_count=1",
  # On a loaded machine a virtual device may wait longer for the others than the default 40 s.
  "--xla_cpu_collective_call_terminate_timeout_seconds=240",
]
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 12):
  QUICK.append("--xla_cpu_use_fusion_emitters=false")  # later versions stop at the unknown flag
os.environ["XLA_FLAGS"] = " ".join([*os.environ.get("XLA_FLAGS", "").split(), *QUICK])

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Two programs in flight on four virtual devices share one small pool of threads. On a loaded
# machine with two cores, training steps have been seen to wait for each other forever.
jax.config.update("jax_cpu_enable_async_dispatch", False)


def pytest_ignore_collect(collection_path, config):
  """Saves `-m smoke` the imports of the files that have no such test."""
  if config.option.markexpr == "smoke" and collection_path.suffix == ".py":
    return True if "pytest.mark.smoke" not in collection_path.read_text() else None
  return None


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
  """The folder of one finished run (tiny_run.py). Tests read it; what they write goes elsewhere."""
  import tiny_run

  folder = tmp_path_factory.mktemp("tiny_run")
  tiny_run.make(folder)
  return folder
