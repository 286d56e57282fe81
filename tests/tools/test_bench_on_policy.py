"""The benchmark tools/bench/on_policy.py: its rival, and all of its figures with tiny models."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import steps

from distill_jax.losses import kd
from distill_jax.models import llama
from distill_jax.training.step import Fixed

SCRIPT = Path(__file__).parents[2] / "tools" / "bench" / "on_policy.py"
pytestmark = pytest.mark.slow
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: .[tpu] has it"
)


def test_materialised_logits_give_the_loss_and_gradient_of_the_live_step():
  spec = importlib.util.spec_from_file_location("bench_on_policy", SCRIPT)
  bench = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(bench)
  step = steps.make_step(losses={"soft": kd.Loss(divergence="reverse_kl")})
  batch = steps.make_batch().replace(targets={})
  student, teacher = (llama.Model(llama.TINY, jax.random.key(seed)) for seed in (0, 1))

  def gradient(loss):
    def of_student(model):
      return loss((model, {}), batch, Fixed({"teacher": teacher}, 0, 50.0), {"soft": 0.5})

    (total, means), grad = jax.jit(jax.value_and_grad(of_student, has_aux=True))(student)
    return total, means["soft"].value(), means["ce"].value(), grad

  ours = gradient(step.loss)
  rival = gradient(lambda *args: bench.materialised(step, *args))
  assert float(ours[0]) > 0.01
  for a, b in zip(jax.tree.leaves(rival), jax.tree.leaves(ours), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.abs(b).max()))


@needs_libtpu
def test_all_figures_with_tiny_models():
  command = [sys.executable, str(SCRIPT), "--small", "--every=2", "--rounds=1"]
  run = subprocess.run(command, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  r = json.loads(run.stdout.splitlines()[-1])
  assert r["resume_identical"] == 1.0 and abs(r["self_teacher_loss"]) < 1e-6
  assert r["generate_share"] + r["score_share"] + r["train_share"] == pytest.approx(1)
  assert r["live_over_offline_seconds"] > 0 and r["peak_ratio"] > 0
