"""tools/bench/gpu.py on tiny shapes, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parents[2] / "tools" / "bench" / "gpu.py"


def measured(*flags, **environment):
  line = [sys.executable, str(GPU), "--small", *flags]
  env = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
  done = subprocess.run(line, capture_output=True, text=True, check=True, env=env)
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow  # six processes, which compile for half a minute
def test_every_part_runs():
  found = measured()
  assert not [key for key in found if key.endswith(".error")]
  assert {key.split(".")[0] for key in found} == {
    "kernels",
    "parity",
    "step",
    "record",
    "decode",
    "head",
  }
  # Qwen's weights and activations in bfloat16 have 8 bits, and errors of 2**-9 in each product.
  assert 0 < found["parity.kl"] < 1e-3 and found["parity.gradient_angle_degrees"] < 5
  assert found["record.over_plain_pass"] > 0 and found["decode.4_rows.tokens_per_second"] > 0


@pytest.mark.slow
def test_a_part_that_fails_is_reported_and_the_others_run():
  found = measured("--parts=nothing,kernels")
  assert "exit 2" in found["nothing.error"] and found["kernels.xla.over_xla"] == 1
