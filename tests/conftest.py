"""Four virtual CPU devices, and rank promotion that raises, in every test.

Most of a test's time goes into compiling. XLA's options therefore make compiling fast and not the
programs (its older emitters of fusions need a quarter of the time), and all test runs of a checkout
share the compiled programs (compile_cache.py).
"""

import os

import compile_cache

os.environ["JAX_PLATFORMS"] = "cpu"
compile_cache.use()
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
QUICK = (
  "--xla_backend_optimization_level=0",
  "--xla_cpu_use_fusion_emitters=false",
  "--xla_cpu_parallel_codegen_split_count=1",
  # On a loaded machine a virtual device may wait longer for the others than the default 40 s.
  "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)
os.environ["XLA_FLAGS"] = " ".join([*os.environ.get("XLA_FLAGS", "").split(), *QUICK])

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
