"""Four virtual CPU devices, and rank promotion that raises, in every test.

Most of a test's time goes into compiling. XLA's options therefore make compiling fast and not the
programs (its older emitters of fusions need a quarter of the time), and all test runs of a checkout
share the compiled programs (compile_cache.py). Tracing creates many objects, and the garbage
collector would look through all modules again and again: it is told to leave them alone.
"""

import collections
import gc
import importlib.metadata
import itertools
import os

import compile_cache

DEVICES = 4
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"  # jax's default; nn/test_remat.py reads XLA's warnings
# All devices share one pool of threads, by default one per device or core. A collective blocks its
# thread until the other devices arrive, and a device that runs its operations out of order can
# block several threads: with one per device, the last device may find none. A device has at most
# four workers (XLA's ExecuteSession::kMaxWorkers).
os.environ.setdefault("PJRT_NPROC", str(max(4 * DEVICES, os.cpu_count() or 1)))
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
from object_stores import gcs, gcs_server, object_store, s3, s3_server  # noqa: E402, F401

jax.config.update("jax_num_cpu_devices", DEVICES)
jax.config.update("jax_numpy_rank_promotion", "raise")

FILES = itertools.count(1)  # that have ended


def pytest_ignore_collect(collection_path, config):
  """Saves `-m smoke` the imports of the files that have no such test."""
  if config.option.markexpr == "smoke" and collection_path.suffix == ".py":
    return True if "pytest.mark.smoke" not in collection_path.read_text() else None
  return None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
  """Puts the files with the fewest tests first: among them are those that start processes.

  A worker of pytest-xdist takes whole files. A long file at the end leaves the other worker idle.
  """
  count = collections.Counter(item.path for item in items)
  items.sort(key=lambda item: count[item.path])


def pytest_collection_finish():
  """Makes the garbage collector rare, and excludes from it what the imports created.

  A test that traces one step of training needs a sixth less time, late in a long run far less.
  """
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 20, 20)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
  """Frees what the tests of a file made, compiled programs included, at its end.

  What survives is held by the caches of jax and by modules. It is excluded from the collector too:
  otherwise each of 200 files takes longer than the one before, up to several seconds. A program
  needs about 1 MB, and some are used in many files: the caches are emptied after every 20 files.
  """
  if nextitem is None or nextitem.path != item.path:
    if next(FILES) % 20 == 0:
      jax.clear_caches()
      gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
  """The folder of one finished run (tiny_run.py). Tests read it; what they write goes elsewhere."""
  import tiny_run

  folder = tmp_path_factory.mktemp("tiny_run")
  tiny_run.make(folder)
  return folder
