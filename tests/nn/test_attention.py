"""Every kernel against float64 by hand; those of hardware that is not here, compiled for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import SCALE, arrays, by_hand, run

from distill_jax import registry
from distill_jax.errors import InputError
from distill_jax.nn import attention, layers, sharding, splash
from distill_jax.nn.attention import OneOf
from distill_jax.types import Inputs

CASES = {  # T, heads, key/value heads, their width, that of values, window
  "grouped heads": (300, 4, 2, 24, 24, None),  # three blocks, the last not full
  "a window over blocks": (300, 2, 2, 8, 8, 140),
  "a window within a block": (256, 2, 1, 16, 16, 5),
  "narrower values": (130, 2, 2, 24, 16, None),
  "the first of two windows": (300, 2, 1, 8, 8, OneOf((None, 140), jnp.int32(0))),
  "the second of two windows": (300, 2, 1, 8, 8, OneOf((None, 140), jnp.int32(1))),
  "a window past the end": (128, 1, 1, 8, 8, 4_096),
}


@pytest.fixture
def interpreted(monkeypatch):
  """Simulates a TPU: Pallas interprets its kernels."""
  monkeypatch.setattr(attention, "platform", lambda: "tpu")
  interpreting = functools.partial(splash.attention, interpret=True)
  monkeypatch.setattr(splash, "attention", interpreting)


@pytest.mark.parametrize("kernel", ["xla", "splash"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_match_a_float64_reference(case, kernel, interpreted):
  """The tolerance is for float32 sums of 300 terms."""
  *shape, window = CASES[case]
  given = arrays(*shape)
  size = window.sizes[int(window.at)] if isinstance(window, OneOf) else window
  for got, want in zip(run(*given, window, kernel), by_hand(*given, size), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_splash_is_the_same_on_a_mesh(interpreted):
  """Sequences are sharded over fsdp and heads over tensor, with each group next to its keys."""
  window = OneOf((None, 5), jnp.int32(1))
  *given, out_grad = arrays(100, 4, 2, 8, 8)
  want = run(*given, out_grad, window, "auto")
  mesh = sharding.make_mesh(1, 2, 2)
  place = lambda x: jax.device_put(x, sharding.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    got = run(*map(place, given), place(out_grad), window, "auto")
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama tiny-window", "gemma3 tiny", "deepseek_v3 tiny"])
def test_a_model_is_the_same_with_splash(family, interpreted):
  """Covers alternating windows, values narrower than keys, and scales set by the family."""
  name, shape = family.split()
  module = registry.load("models", name)
  config = module.CONFIGS[shape].keep_layers((0, 1))  # one layer of each kind
  model = jax.jit(lambda key: module.Model(config, key))(jax.random.key(0))
  t_T = np.arange(20)
  row = lambda x_T: jnp.asarray(np.tile(x_T, (2, 1)), jnp.int32)
  inputs = Inputs(row(t_T * 7), row(np.where(t_T < 9, t_T, t_T - 9)), row(1 + (t_T >= 9)))
  hidden = lambda kernel: jax.jit(
    lambda m: m(inputs, layers.ComputeConfig(attention=kernel, remat="full")).hidden_BTD
  )(model)
  np.testing.assert_allclose(hidden("splash"), hidden("xla"), rtol=1e-5, atol=1e-5)


def test_bfloat16_queries_are_rounded_once_more(interpreted):
  """The error is 2**-9 per operand; outputs are means of values of size 1."""
  *given, out_grad = (
    jnp.asarray(x, jnp.bfloat16) if x.dtype == np.float32 else x for x in arrays(130, 2, 2, 16, 16)
  )
  for got, want in zip(
    run(*given, out_grad, None, "splash"), by_hand(*given, out_grad, None), strict=True
  ):
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), want, rtol=0.03, atol=0.03)


def queries(T=64, h=64, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct((2, T, 4, h), dtype)


@pytest.mark.parametrize(
  "platform, q, want",
  [
    ("cpu", queries(), "xla"),
    ("tpu", queries(), "splash"),
    ("tpu", queries(dtype=jnp.float32), "splash"),
    ("gpu", queries(), "cudnn"),
    ("cuda", queries(h=256, dtype=jnp.float16), "cudnn"),
    ("gpu", queries(dtype=jnp.float32), "xla"),
    ("gpu", queries(h=264), "xla"),
    ("gpu", queries(h=12), "xla"),
    ("gpu", queries(T=63), "xla"),
  ],
)
def test_auto_chooses_the_kernel_for_the_device(platform, q, want, monkeypatch):
  monkeypatch.setattr(attention, "platform", lambda: platform)
  assert attention.choose_kernel("auto", q) == want
  assert attention.choose_kernel("xla", q) == "xla"


@pytest.mark.parametrize(
  "platform, kernel, q, words",
  [
    ("cpu", "flash", queries(), "attention is 'flash'; expected one of auto, xla"),
    ("cpu", "splash", queries(), "runs on cpu, while this one runs on tpu"),
    ("tpu", "cudnn", queries(), "runs on tpu, while this one runs on gpu"),
    ("gpu", "cudnn", queries(dtype=jnp.float32), "compute dtype is float32"),
    ("gpu", "cudnn", queries(h=12), "multiples of 8 up to 256, not 12"),
    ("gpu", "cudnn", queries(T=63), "even number of positions and sequences have 63"),
  ],
)
def test_a_kernel_that_cannot_run_is_refused(platform, kernel, q, words, monkeypatch):
  monkeypatch.setattr(attention, "platform", lambda: platform)
  with pytest.raises(InputError, match=words):
    attention.choose_kernel(kernel, q)


def test_different_rules_for_queries_and_keys_are_refused(interpreted):
  table = sharding.TABLE | {"kv_heads": (None, None)}
  rules = sharding.Rules(tuple(table.items()))
  q, k, v, segments, _ = arrays(8, 4, 2, 8, 8)
  with (
    jax.set_mesh(sharding.make_mesh(1, 2, 2)),
    pytest.raises(InputError, match="Shard 'heads' and 'kv_heads' over the same"),
  ):
    jax.jit(lambda *x: attention.attention(*x, kernel="splash", rules=rules))(q, k, v, segments)


@pytest.mark.parametrize("window", [None, 140, OneOf((None, 5), jnp.int32(1))])
def test_a_row_of_a_cache_does_not_depend_on_other_rows(window):
  """Rows of three blocks of slots; a row has the same bits whichever blocks the others read."""
  q, k, v, segments, out_grad = arrays(300, 4, 2, 8, 16)
  size = window.sizes[int(window.at)] if isinstance(window, OneOf) else window
  want = by_hand(q, k, v, np.ones_like(segments), out_grad, size)[0]
  blocks = [slice(0, 128), slice(128, 256), slice(256, 300)]
  cache = [(k[:, b].transpose(0, 2, 3, 1), v[:, b].swapaxes(1, 2)) for b in blocks]
  rows = np.arange(2)[:, None]

  @jax.jit
  def attend(q_BTHh, cache, positions_BT):
    return attention.cached(q_BTHh, lambda n: cache[n], [128, 128, 44], positions_BT, window, SCALE)

  cases = [np.array(([20, 21], second)) for second in ([22, 23], [127, 128], [298, 299])]
  results = [attend(q[rows, positions], cache, positions) for positions in cases]
  for got, positions in zip(results, cases, strict=True):
    np.testing.assert_array_equal(got[0], results[0][0])
    np.testing.assert_allclose(got, want[rows, positions], rtol=1e-5, atol=1e-5)
  unread = cache[:1] + [(k * np.nan, v * np.nan) for k, v in cache[1:]]
  np.testing.assert_array_equal(attend(q[rows, cases[0]], unread, cases[0]), results[0])
