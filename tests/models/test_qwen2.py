"""The Qwen2 family against transformers (torch, float32), and what its config.json may say."""

import copy
import dataclasses

import parity
import pytest

from distill_jax.errors import InputError
from distill_jax.models import _rope, loading, qwen2

# Qwen2.5's recipe for long texts, with a length well below the positions up to 95.
YARN = {
  "rope_type": "yarn",
  "rope_theta": 1e4,
  "factor": 4.0,
  "original_max_position_embeddings": 24,
}
CASES = {
  "plain": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
  "tied": {"tie_word_embeddings": True, "num_key_value_heads": 1},
  "yarn": {"rope_parameters": YARN},
  "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
  "an unused window": {"use_sliding_window": False, "sliding_window": 4},
  "a window": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
}


@pytest.mark.parametrize("case", CASES)
def test_every_layer_and_the_logits_match_transformers(case, tmp_path):
  theirs = parity.torch_model("qwen2", **CASES[case])
  errors = parity.forward_errors(theirs, parity.ours_from(theirs, tmp_path), parity.tokens())
  assert max(errors) < parity.FORWARD, errors


def test_gradients_match_transformers(tmp_path):
  windows = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
  theirs = parity.torch_model("qwen2", **windows)
  worst = parity.worst_gradient(theirs, parity.ours_from(theirs, tmp_path), parity.tokens())
  assert worst[0] < parity.GRADIENT, worst


# With 12 to 40 positions, frequencies are scaled fully, partly or not at all.
YARNS = [
  {},
  {"truncate": False},
  {"beta_fast": 4.0, "beta_slow": 0.5},
  {"attention_factor": 1.3},
  {"mscale": 0.7, "mscale_all_dim": 1.0},
  {"factor": 0.5},
  {"factor": 40.0},
]


@pytest.mark.parametrize("given", YARNS, ids=str)
def test_yarn_matches_transformers(given):
  rope = YARN | {"original_max_position_embeddings": 400} | given
  c = parity.transformers.Qwen2Config(hidden_size=256, num_attention_heads=4, rope_parameters=rope)
  want, amplitude = parity.transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](c)
  scaling = _rope.read(rope, 32_768)
  assert parity.error(_rope.frequencies(1e4, 64, scaling), want) < 3e-7
  assert scaling.amplitude == pytest.approx(amplitude)
  assert _rope.read(_rope.write(scaling), 32_768) == scaling


@pytest.mark.parametrize(
  "both",
  [
    {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1e6},
    {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": YARN},
  ],
  ids=["another rope", "no original length", "no theta"],
)
def test_rope_scaling_is_used_as_by_transformers(both):
  """rope_scaling is preferred to rope_parameters, and takes nothing from it."""
  hf = qwen2.TINY.to_hf()
  del hf["rope_theta"], hf["rope_scaling"], hf["rope_parameters"]
  theirs = parity.transformers.Qwen2Config(**hf, **copy.deepcopy(both))
  want, amplitude = parity.transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](theirs)
  ours = qwen2.Config.from_hf(hf | both)
  got = _rope.frequencies(ours.rope_theta, ours.rope_dim, ours.rope_scaling)
  assert parity.error(got, want) < 3e-7
  assert ours.rope_scaling.amplitude == pytest.approx(amplitude)


WINDOW = {"use_sliding_window": True, "sliding_window": 8}


@pytest.mark.parametrize(
  "change, word",
  [
    ({"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window"),
    (WINDOW | {"layer_types": ["sliding_attention"]}, "layer_types is .*; expected 3 entries"),
    (WINDOW | {"layer_types": ["full_attention", "sliding_attention", "chunked"]}, "chunked"),
    (WINDOW | {"max_window_layers": 1, "sliding_window": -8}, "sliding_window is -8"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_parameters": YARN | {"beta_fast": 0.5}}, "beta_slow"),
    ({"rope_parameters": YARN | {"factor": "4"}}, "factor"),
  ],
)
def test_an_unsupported_config_is_refused(change, word):
  with pytest.raises(InputError, match=word):
    qwen2.Config.from_hf(qwen2.TINY.to_hf() | change)


def test_a_window_after_the_last_layer_is_ignored():
  change = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
  assert qwen2.Config.from_hf(qwen2.TINY.to_hf() | change) == qwen2.TINY


@pytest.mark.parametrize("given", [{}, {"sliding_window": None}], ids=str)
def test_a_window_without_a_size_is_that_of_transformers(given):
  hf = qwen2.TINY.to_hf() | {"use_sliding_window": True, "max_window_layers": 1, **given}
  want = parity.transformers.Qwen2Config(**hf)
  ours = qwen2.Config.from_hf(hf)
  assert ours.sliding_window == want.sliding_window
  assert [ours.window_at(i) is not None for i in range(3)] == [
    kind == "sliding_attention" for kind in want.layer_types
  ]


def test_kept_layers_keep_their_windows():
  c = qwen2.CONFIGS["tiny-window"]
  assert c.keep_layers((2, 1)).layer_types == ("sliding_attention", "full_attention")
  assert c.keep_layers((1,)) == dataclasses.replace(qwen2.TINY, num_hidden_layers=1)
  assert (c.window, c.keep_layers((0, 2)).window) == (None, 5)


def test_a_config_round_trips_through_config_json():
  scaled = dataclasses.replace(qwen2.TINY, rope_scaling=_rope.Yarn(4.0, 32, truncate=False))
  assert qwen2.Config.from_hf(scaled.to_hf()) == scaled


def test_changes_can_set_another_rope_scaling():
  rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
  changes = {"max_position_embeddings": 128, "rope_scaling": rope}
  c = loading.apply_changes(qwen2.TINY, changes)
  assert (c.max_position_embeddings, c.rope_scaling) == (128, _rope.Yarn(4.0, 32))
