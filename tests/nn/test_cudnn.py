"""The calls of cuDNN's packed layout: against an emulation, lowered for CUDA, and on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import arrays, by_hand, run
from jax._src.cudnn import fused_attention_stablehlo

from distill_jax.nn import attention, cudnn, dense

ON_A_GPU = jax.default_backend() == "gpu"


def emulated(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
  """Computes what jax documents, with NaN in values and gradients outside of the segments."""
  assert mask_type.name == "PADDING_CAUSAL" and k.shape == v.shape == q.shape
  assert q_seqlen is kv_seqlen and q_offsets is kv_offsets
  assert q_offsets.shape[1] == q_seqlen.shape[1] + 1 and q_seqlen.dtype == jnp.int32
  begin, size = q_offsets[:, None, :-1], q_seqlen[:, None]
  t = jnp.arange(q.shape[1])[None, :, None]
  inside = (begin >= 0) & (begin <= t) & (t < begin + size)
  covered = inside.any(-1)[..., None, None]

  @jax.custom_vjp
  def with_gaps_in_gradient(x):
    return x

  with_gaps_in_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.where(covered, g, jnp.nan),))
  segments = (inside * jnp.arange(1, inside.shape[-1] + 1)[None, None]).sum(-1)
  index, at = jnp.arange(q.shape[1]), jnp.int32(0)
  q_k_v = map(with_gaps_in_gradient, (q, k, v))
  out = dense.attention(*q_k_v, segments, segments, index, at, (None,), scale)
  return jnp.where(covered, out, jnp.nan)


@pytest.fixture
def gpu(monkeypatch):
  """Simulates a GPU with float32 up to the call of jax's function."""
  monkeypatch.setattr(attention, "platform", lambda: "cuda")
  monkeypatch.setattr(attention, "cudnn_limitation", lambda q: "")
  monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", emulated)


@pytest.mark.parametrize("segments_a_call", [2, 32])
def test_packed_calls_match_a_float64_reference(segments_a_call, gpu, monkeypatch):
  """Rows of 1 and 5 segments, in three calls and in one; grouped heads and narrower values."""
  monkeypatch.setattr(cudnn, "SEGMENTS", segments_a_call)
  T = 40
  q, k, v, _, out_grad = arrays(T, 4, 2, 24, 16)
  t = np.arange(T)
  segments = np.stack([np.ones(T), np.searchsorted([3, 4, 20, 38], t, side="right") + 1])
  segments[1, 38:] = 0
  given = q, k, v, segments.astype(np.int32), out_grad
  for got, want in zip(run(*given, None, "cudnn_packed"), by_hand(*given, None), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def lowered(monkeypatch, window, capability=9):
  """Returns the program of both passes for CUDA, which needs no GPU, only a cuDNN version."""
  monkeypatch.setattr(attention, "platform", lambda: "cuda")
  monkeypatch.setattr(cudnn, "capability", lambda: capability)
  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000)
  monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
  of = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
  args = of((2, 96, 4, 24)), of((2, 96, 2, 24)), of((2, 96, 2, 16)), of((2, 96), jnp.int32)

  def loss(q, k, v, segments):
    out = attention.attention(q, k, v, segments, window, kernel="cudnn_packed")
    return jnp.sum(out.astype(jnp.float32))

  traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*args)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert "dot_general" not in text  # no scores outside cuDNN
  return text, [line for line in text.splitlines() if "@__cudnn$fmha" in line]


def test_the_packed_layout_has_no_mask(monkeypatch):
  """Both passes of the first call, then a loop with both passes of the others."""
  text, calls = lowered(monkeypatch, None)
  assert sorted("Backward(" in line for line in calls) == [False, False, True, True]
  for line in calls:
    assert "PADDING_CAUSAL" in line and "max_seg_per_batch\\22: 32" in line
    assert "tensor<2x32xi32>" in line and "tensor<2x33xi32>" in line  # lengths and offsets
  assert "96x96" not in text


@pytest.mark.parametrize("window, capability", [(5, 9), (None, 8)])
def test_windows_and_older_gpus_have_a_mask(window, capability, monkeypatch):
  _, calls = lowered(monkeypatch, window, capability)
  assert ["Backward(" in line for line in calls] == [False, True]
  assert all("CAUSAL" in line and "tensor<2x1x96x96xbf16>" in line for line in calls)


@pytest.mark.skipif(not ON_A_GPU, reason="compares cuDNN itself, which needs a GPU")
@pytest.mark.parametrize("kernel", ["cudnn", "cudnn_packed"])
@pytest.mark.parametrize("segments_a_call", [2, 32])
@pytest.mark.parametrize("window", [None, 50])
def test_cudnn_matches_a_float64_reference(window, segments_a_call, kernel, monkeypatch):
  """Errors are 2**-9 per operand. Run this file on a GPU with --noconftest, which sets the CPU."""
  monkeypatch.setattr(cudnn, "SEGMENTS", segments_a_call)
  *given, out_grad = (
    jnp.asarray(x, jnp.bfloat16) if x.dtype == np.float32 else x for x in arrays(512, 4, 2, 64, 64)
  )
  for got, want in zip(
    run(*given, out_grad, window, kernel), by_hand(*given, out_grad, window), strict=True
  ):
    np.testing.assert_allclose(got.astype(np.float32), want, rtol=0.03, atol=0.03)
