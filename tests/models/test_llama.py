"""The Llama family against transformers (torch, float32): every layer, logits, gradients."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from distill_jax.errors import InputError
from distill_jax.models import _rope, llama
from distill_jax.nn import layers, params
from distill_jax.types import Inputs

LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 10_000.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
CASES = {
  "grouped heads": {},
  "tied": {"tie_word_embeddings": True},
  "one key/value head": {"num_key_value_heads": 1},
  "every head its own": {"num_key_value_heads": 4},
  # Positions run to 95, three times the original length: wavelengths of all three kinds.
  "llama 3 rope": {"rope_parameters": LLAMA3, "head_dim": 16},
  "wide heads": {"head_dim": 20, "rms_norm_eps": 1e-2},  # 4 * 20 is not the width, 48
}
MISTRAL = {"a window": {"sliding_window": 5}, "no window": {"sliding_window": None}}


@pytest.mark.parametrize("case", CASES)
def test_every_layer_and_the_logits_match_transformers(case, tmp_path):
  theirs = parity.torch_model("llama", **CASES[case])
  errors = parity.forward_errors(theirs, parity.ours_from(theirs, tmp_path), parity.tokens())
  assert max(errors) < parity.FORWARD, errors


@pytest.mark.parametrize("case", MISTRAL)
def test_mistral_matches_transformers(case, tmp_path):
  theirs = parity.torch_model("mistral", **MISTRAL[case])
  ours = parity.ours_from(theirs, tmp_path)
  assert ours.config.sliding_window == MISTRAL[case]["sliding_window"]
  errors = parity.forward_errors(theirs, ours, parity.tokens())
  assert max(errors) < parity.FORWARD, errors


def test_the_window_of_a_mistral_without_the_key_is_that_of_transformers():
  hf = {k: v for k, v in llama.TINY.to_hf().items() if k != "sliding_window"}
  for given in ({}, {"sliding_window": None}, {"sliding_window": 7}):
    want = parity.transformers.MistralConfig(**given).sliding_window
    read = llama.Config.from_hf({**hf, **given, "model_type": "mistral"})
    assert read.sliding_window == want


def test_a_window_changes_outputs_at_these_positions(tmp_path):
  theirs = parity.torch_model("mistral", sliding_window=5)
  ours, inputs = parity.ours_from(theirs, tmp_path), parity.plain_inputs(parity.tokens())
  hidden = jax.jit(lambda m: m(inputs, layers.ComputeConfig()).hidden_BTD)
  other = _with_config(ours, dataclasses.replace(ours.config, sliding_window=6))
  assert parity.error(hidden(other), hidden(ours)) > 1000 * parity.FORWARD


@pytest.mark.parametrize("case", ["grouped heads", "tied", "llama 3 rope"])
def test_gradients_match_transformers(case, tmp_path):
  theirs = parity.torch_model("llama", **CASES[case])
  worst = parity.worst_gradient(theirs, parity.ours_from(theirs, tmp_path), parity.tokens())
  assert worst[0] < parity.GRADIENT, worst


def test_the_rope_scaling_changes_outputs_at_these_positions(tmp_path):
  """Otherwise the parity test would pass without the scaling."""
  theirs = parity.torch_model("llama", **CASES["llama 3 rope"])
  ours, inputs = parity.ours_from(theirs, tmp_path), parity.plain_inputs(parity.tokens())
  of = jax.jit(lambda m: m(inputs, layers.ComputeConfig()).hidden_BTD)
  hidden = lambda c: of(_with_config(ours, c))
  plain = dataclasses.replace(ours.config, rope_scaling=None)
  assert parity.error(hidden(plain), hidden(ours.config)) > 1000 * parity.FORWARD


def _with_config(model: llama.Model, config: llama.Config) -> llama.Model:
  other = jax.tree.map(lambda x: x, model)
  other.config = config
  return other


def test_packed_documents_are_independent(tmp_path):
  ours, tokens_BT = parity.ours_from(parity.torch_model("llama"), tmp_path), parity.tokens()[:1]
  cut, run = 40, jax.jit(lambda i: ours(i, layers.ComputeConfig(), (0, 2)))
  at = np.arange(parity.T, dtype=np.int32)[None]
  segments, positions = np.where(at < cut, 1, 2), np.where(at < cut, at, at - cut)
  packed = run(Inputs(*map(jnp.asarray, (tokens_BT, positions, segments))))
  for part in (slice(0, cut), slice(cut, parity.T)):
    alone = run(parity.plain_inputs(tokens_BT[:, part]))
    assert parity.error(packed.hidden_BTD[:, part], alone.hidden_BTD) < parity.FORWARD
    assert parity.error(packed.taps_PBTD[:, :, part], alone.taps_PBTD) < parity.FORWARD


def test_taps_are_in_the_given_order(tmp_path):
  ours = parity.ours_from(parity.torch_model("llama"), tmp_path)
  inputs = parity.plain_inputs(parity.tokens())
  of = lambda model, taps: model(inputs, layers.ComputeConfig(), taps).taps_PBTD
  run = functools.partial(jax.jit(of, static_argnums=1), ours)
  np.testing.assert_array_equal(run((2, 0)), run((0, 2))[::-1])
  assert run(()) is None


@pytest.mark.parametrize(
  "key, value, word",
  [
    ("hidden_act", "gelu", "hidden_act"),
    ("attention_bias", True, "attention_bias"),
    ("mlp_bias", True, "mlp_bias"),
    ("rope_scaling", {"rope_type": "dynamic", "factor": 4.0}, "dynamic"),
    (
      "num_key_value_heads",
      3,
      "num_attention_heads is 4; expected a multiple of num_key_value_heads, 3",
    ),
    ("hidden_size", 0, "hidden_size"),
    ("vocab_size", -1, "vocab_size"),
    ("num_hidden_layers", 2.5, "num_hidden_layers"),
    ("head_dim", 7, "head_dim"),
    ("rope_theta", float("nan"), "rope_theta"),
    ("rms_norm_eps", -1e-5, "rms_norm_eps"),
    ("tie_word_embeddings", "yes", "tie_word_embeddings"),
    ("rope_scaling", LLAMA3 | {"factor": 0}, "factor"),
    ("rope_scaling", LLAMA3 | {"high_freq_factor": 1.0}, "low_freq_factor"),
  ],
)
def test_an_unsupported_config_is_refused(key, value, word):
  with pytest.raises(InputError, match=word):
    llama.Config.from_hf({**llama.TINY.to_hf(), "rope_parameters": None, key: value})


def test_the_original_length_is_by_default_that_of_the_model():
  rope = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}
  hf = {**llama.TINY.to_hf(), "rope_scaling": rope}
  theirs = parity.transformers.LlamaConfig(**copy.deepcopy(hf)).rope_parameters
  scaling = llama.Config.from_hf(hf).rope_scaling
  assert scaling.original_max_position_embeddings == theirs["original_max_position_embeddings"]


@pytest.mark.parametrize("name", llama.CONFIGS)
def test_a_config_round_trips_through_config_json(name):
  config = llama.CONFIGS[name]
  assert llama.Config.from_hf(config.to_hf()) == config
  scaled = dataclasses.replace(config, rope_scaling=_rope.Llama3(8.0, 1.0, 4.0, 32))
  assert llama.Config.from_hf(scaled.to_hf()) == scaled


def test_smollm2_has_its_published_size():
  build = lambda key: llama.Model(llama.CONFIGS["smollm2-135m"], key)
  assert params.count(jax.eval_shape(build, jax.random.key(0))) == 134_515_008
