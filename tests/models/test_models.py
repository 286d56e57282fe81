"""What every family keeps: causality, packing, named taps. Truths, not comparisons."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from distill_jax import registry
from distill_jax.errors import InputError
from distill_jax.models import loading
from distill_jax.models.options import ModelOptions
from distill_jax.nn import layers
from distill_jax.types import Inputs

T = 12


@pytest.fixture(scope="module", params=tiny.decoder_shapes(), ids=lambda p: " ".join(p))
def family(request):
  name, shape = request.param
  module = registry.load("models", name)
  config = module.CONFIGS[shape]
  return module, jax.jit(lambda key: module.Model(config, key))(jax.random.key(0))


@functools.partial(jax.jit, static_argnames=("dtype", "taps"))
def run(model, inputs, dtype="float32", taps=()):
  return model(inputs, layers.ComputeConfig(dtype), taps)


@jax.jit
def sensitivity(model, inputs):
  """Returns |d hidden / d embedding table|, summed over both widths, [t, row]."""

  def hidden(rows_VD):
    model_ = jax.tree.map(lambda x: x, model)
    model_.embed = model.embed.replace(rows_VD)
    return model_(inputs, layers.ComputeConfig()).hidden_BTD[0]

  hidden_TD, pull = jax.vjp(hidden, model.embed[...])
  basis = jnp.eye(hidden_TD.size).reshape(-1, *hidden_TD.shape)
  # One after another: ragged_dot has no rule for vmap here.
  sizes = jax.lax.map(lambda unit_TD: jnp.abs(pull(unit_TD)[0]).sum(1), basis)
  return sizes.reshape(*hidden_TD.shape, -1).sum(1)


def influence(model, segments_T, positions_T):
  """Returns |d hidden_t / d embedding of token s|, [t, s]: the positions that t attends to."""
  tokens = jnp.arange(T)[None]  # all different: one row each
  inputs = Inputs(tokens, jnp.asarray(positions_T)[None], jnp.asarray(segments_T)[None])
  return np.asarray(sensitivity(model, inputs))[:, :T]


def test_attention_is_causal(family):
  seen = influence(family[1], np.ones(T, np.int32), np.arange(T, dtype=np.int32))
  assert np.all(seen[np.triu_indices(T, 1)] == 0)
  assert np.all(seen[np.tril_indices(T)] > 0)


def test_attention_stays_within_a_document(family):
  segments = np.array([1] * 5 + [2] * 4 + [0] * 3, np.int32)
  positions = np.array([*range(5), *range(4), *range(3)], np.int32)
  seen = influence(family[1], segments, positions)
  apart = segments[:, None] != segments[None, :]
  assert np.all(seen[apart] == 0)
  assert np.all(np.diag(seen) > 0)


def test_a_packed_document_has_the_same_outputs_alone(family):
  _, model = family
  tokens = jax.random.randint(jax.random.key(1), (1, T), 0, 256)
  segments = jnp.asarray([[1] * 5 + [2] * 7])
  positions = jnp.asarray([[*range(5), *range(7)]])
  packed = run(model, Inputs(tokens, positions, segments)).hidden_BTD[:, 5:]
  alone = Inputs(tokens[:, 5:], positions[:, 5:], jnp.ones((1, 7), jnp.int32))
  np.testing.assert_allclose(packed, run(model, alone).hidden_BTD, atol=2e-6)


def test_taps_are_the_given_layers_in_the_given_order(family):
  _, model = family
  inputs = Inputs(*(jnp.ones((1, T), jnp.int32),) * 3)
  L = model.config.num_hidden_layers
  all_taps = run(model, inputs, taps=tuple(range(L))).taps_PBTD
  two = run(model, inputs, taps=(L - 1, 0)).taps_PBTD
  np.testing.assert_array_equal(two, all_taps[jnp.asarray([L - 1, 0])])
  assert jax.eval_shape(run, model, inputs).taps_PBTD is None
  with pytest.raises(InputError, match=f"from 0 to {L - 1}"):
    run(model, inputs, taps=(L,))


def test_configs_round_trip_through_config_json(family):
  config = family[1].config
  assert family[0].Config.from_hf(config.to_hf()) == config
  assert dataclasses.is_dataclass(config)


def test_bfloat16_is_near_float32(family):
  _, model = family
  inputs = Inputs(*(jnp.ones((1, T), jnp.int32),) * 3)
  exact = run(model, inputs).hidden_BTD
  half = run(model, inputs, "bfloat16").hidden_BTD
  assert half.dtype == jnp.bfloat16
  # bfloat16 keeps 8 bits: 2**-8 an operation, over a dozen of them a layer.
  np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=0.1)


def test_fields_of_a_part_can_be_changed():
  made = lambda **changes: (
    loading.open_source(ModelOptions(family="llava", shape="tiny", changes=changes)).config
  )
  whole = loading.open_source(ModelOptions(family="llava", shape="tiny")).config
  vision = dataclasses.replace(whole.vision, num_hidden_layers=2)
  assert made(vision={"num_hidden_layers": 2}) == dataclasses.replace(whole, vision=vision) != whole
  with pytest.raises(
    InputError, match="changes is 'vision.patchsize'.*Did you mean 'vision.patch_size'"
  ):
    made(vision={"patchsize": 2})
  with pytest.raises(InputError, match="changes.vision is 3; expected a dict of its fields"):
    made(vision=3)
