"""What every family keeps: causality, packing, named taps. Truths, not comparisons."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import folder, layers
from distill_jax.errors import InputError
from distill_jax.types import Inputs

FAMILIES = folder.names("models")
T = 12


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
  module = folder.load("models", request.param)
  return module, module.Model(module.TINY, jax.random.key(0))


def influence(module, model, segments_T, positions_T):
  """|d hidden_t / d embedding of token s|, [t, s]: who sees whom."""
  tokens = jnp.arange(T)[None]  # all different, so that each has a row of its own
  inputs = Inputs(tokens, jnp.asarray(positions_T)[None], jnp.asarray(segments_T)[None])

  def hidden(rows_VD):
    model_ = jax.tree.map(lambda x: x, model)
    model_.embed = model.embed.replace(rows_VD)
    return model_(inputs, layers.Compute()).hidden_BTD[0]

  grad_TDVD = jax.jacrev(hidden)(model.embed[...])
  return np.abs(np.asarray(grad_TDVD[:, :, :T])).sum((1, 3))


def test_a_position_sees_itself_and_what_came_before(family):
  seen = influence(*family, np.ones(T, np.int32), np.arange(T, dtype=np.int32))
  assert np.all(seen[np.triu_indices(T, 1)] == 0)
  assert np.all(seen[np.tril_indices(T)] > 0)


def test_documents_of_a_row_do_not_see_each_other(family):
  segments = np.array([1] * 5 + [2] * 4 + [0] * 3, np.int32)
  positions = np.array([*range(5), *range(4), *range(3)], np.int32)
  seen = influence(*family, segments, positions)
  apart = segments[:, None] != segments[None, :]
  assert np.all(seen[apart] == 0)
  assert np.all(np.diag(seen) > 0)


def test_a_packed_document_is_read_as_if_it_were_alone(family):
  _, model = family
  tokens = jax.random.randint(jax.random.key(1), (1, T), 0, 256)
  segments = jnp.asarray([[1] * 5 + [2] * 7])
  positions = jnp.asarray([[*range(5), *range(7)]])
  packed = model(Inputs(tokens, positions, segments), layers.Compute()).hidden_BTD[:, 5:]
  alone = Inputs(tokens[:, 5:], positions[:, 5:], jnp.ones((1, 7), jnp.int32))
  np.testing.assert_allclose(packed, model(alone, layers.Compute()).hidden_BTD, atol=2e-6)


def test_taps_are_the_layers_asked_for_in_that_order(family):
  module, model = family
  inputs = Inputs(*(jnp.ones((1, T), jnp.int32),) * 3)
  L = module.TINY.num_hidden_layers
  all_taps = model(inputs, layers.Compute(), taps=tuple(range(L))).taps_PBTD
  two = model(inputs, layers.Compute(), taps=(L - 1, 0)).taps_PBTD
  np.testing.assert_array_equal(two, all_taps[jnp.asarray([L - 1, 0])])
  assert model(inputs, layers.Compute()).taps_PBTD is None
  with pytest.raises(InputError, match=f"from 0 to {L - 1}"):
    model(inputs, layers.Compute(), taps=(L,))


def test_configs_survive_hugging_face_form(family):
  config = family[0].TINY
  assert family[0].Config.from_hf(config.to_hf()) == config
  assert dataclasses.is_dataclass(config)


def test_bfloat16_is_near_float32(family):
  _, model = family
  inputs = Inputs(*(jnp.ones((1, T), jnp.int32),) * 3)
  exact = model(inputs, layers.Compute()).hidden_BTD
  half = model(inputs, layers.Compute(dtype="bfloat16")).hidden_BTD
  assert half.dtype == jnp.bfloat16
  # bfloat16 keeps 8 bits: 2**-8 an operation, over a dozen of them a layer.
  np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=0.1)
