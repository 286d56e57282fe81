"""Attention and its gradients by hand in float64, and arrays to try it on."""

import jax
import numpy as np

from distill_jax.nn import attention
from distill_jax.nn.attention import OneOf

B, SCALE = 2, 0.3


def arrays(T, H, G, h, width):
  """Returns queries, keys, values, a row of three segments with padding, and an output gradient."""
  rng = np.random.default_rng(0)
  normal = lambda n, w: rng.normal(size=(B, T, n, w)).astype(np.float32)
  cuts = np.sort(rng.integers(1, T, (B, 3)), 1)
  segments = 1 + (np.arange(T)[None, :, None] >= cuts[:, None]).sum(-1)
  segments = np.where(segments == 4, 0, segments).astype(np.int32)
  return normal(H, h), normal(G, h), normal(G, width), segments, normal(H, width)


def by_hand(q, k, v, segments, out_grad, window):
  """Computes attention and its gradients for q, k and v in float64, score by score."""
  q, k, v, out_grad = (np.asarray(x, np.float64) for x in (q, k, v, out_grad))
  (_, T, H, _), G = q.shape, k.shape[2]
  k, v = np.repeat(k, H // G, 2), np.repeat(v, H // G, 2)
  t = np.arange(T)
  back = t[:, None] - t
  sees = (back >= 0) & (back < (window or T)) & (segments[:, :, None] == segments[:, None])
  s = np.where(sees[:, None], SCALE * np.einsum("bthd,bshd->bhts", q, k), -np.inf)
  p = np.exp(s - s.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  p_grad = np.einsum("bthd,bshd->bhts", out_grad, v)
  s_grad = SCALE * p * (p_grad - (p * p_grad).sum(-1, keepdims=True))
  of_group = lambda x: x.reshape(*x.shape[:2], G, H // G, -1).sum(3)
  return (
    np.einsum("bhts,bshd->bthd", p, v),
    np.einsum("bhts,bshd->bthd", s_grad, k),
    of_group(np.einsum("bhts,bthd->bshd", s_grad, q)),
    of_group(np.einsum("bhts,bthd->bshd", p, out_grad)),
  )


def run(q, k, v, segments, out_grad, window, kernel):
  """Computes the same with the library, jitted, with `OneOf.at` traced."""
  sizes, at = window if isinstance(window, OneOf) else ((window,), 0)

  @jax.jit
  def both(q, k, v, at):
    choice = OneOf(sizes, at) if len(sizes) > 1 else sizes[0]
    of = lambda q, k, v: attention.attention(q, k, v, segments, choice, SCALE, kernel)
    out, pull = jax.vjp(of, q, k, v)
    return out, *pull(out_grad)

  return both(q, k, v, at)
