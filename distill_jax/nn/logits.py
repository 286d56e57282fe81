"""Functions on logits: computing, capping, masking and normalising them."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def logits(hidden_BTD: jax.Array, head_VD: jax.Array, vocab_size: int | None = None) -> jax.Array:
  """Returns hidden @ head.T as float32 [B, T, V], also for bfloat16 inputs.

  Args:
    hidden_BTD: the hidden states.
    head_VD: the unembedding, in the same dtype.
    vocab_size: the number of rows of the head that are not padding; None for all. Logits of padding
      rows are -inf, so that their probability is 0.
  """
  z_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, head_VD, preferred_element_type=jnp.float32)
  if vocab_size is None or vocab_size >= head_VD.shape[0]:
    return z_BTV
  real_V = jnp.arange(head_VD.shape[0]) < vocab_size
  return jnp.where(real_V[None, None], z_BTV, -jnp.inf)


def soft_cap(logits_BTV: jax.Array, cap: float | None) -> jax.Array:
  """Returns cap * tanh(logits / cap) (arXiv:2408.00118), or the logits if the cap is None.

  Logits of -inf, i.e. padding rows, stay -inf.
  """
  if cap is None:
    return logits_BTV
  return jnp.where(logits_BTV > -jnp.inf, cap * jnp.tanh(logits_BTV / cap), -jnp.inf)


def only_rows(logits_BCV: jax.Array, rows_BC2: jax.Array | None) -> jax.Array:
  """Masks logits outside each position's class range [first, past) to -inf.

  Args:
    logits_BCV: the logits.
    rows_BC2: int32, (first, past) for each position; None for no mask. A position with (0, 0), such
      as a masked one, is not masked.
  """
  if rows_BC2 is None:
    return logits_BCV
  row_V = jnp.arange(logits_BCV.shape[-1])[None, None]
  first, past = rows_BC2[..., :1], rows_BC2[..., 1:]
  return jnp.where(((row_V >= first) & (row_V < past)) | (past == 0), logits_BCV, -jnp.inf)


def cap_and_select(
  logits_BCV: jax.Array, cap: float | None, rows_BC2: jax.Array | None
) -> jax.Array:
  """Applies `soft_cap` and `only_rows`, as every loss and metric does first."""
  return only_rows(soft_cap(logits_BCV, cap), rows_BC2)


def fit_rows(logits_BCV: jax.Array, like_BCV: jax.Array) -> jax.Array:
  """Returns logits with as many rows as `like_BCV`: padding rows are removed, or added as -inf.

  Rows that are -inf in either argument are -inf in the result, so that both distributions cover the
  same tokens.
  """
  rows = like_BCV.shape[-1]
  logits_BCV = logits_BCV[..., :rows]
  if missing := rows - logits_BCV.shape[-1]:
    pad = ((0, 0), (0, 0), (0, missing))
    logits_BCV = jnp.pad(logits_BCV, pad, constant_values=-jnp.inf)
  return jnp.where(like_BCV > -jnp.inf, logits_BCV, -jnp.inf)


def log_sum_exp(logits_BCV: jax.Array) -> jax.Array:
  """Returns log(sum(exp(logits))), [B, C, 1].

  All losses and metrics call this function, so that XLA computes it once for the same logits.
  """
  return jax.nn.logsumexp(logits_BCV, axis=-1, keepdims=True)


def logp_at(logits_BCV: jax.Array, ids_BCK: jax.Array) -> jax.Array:
  """Returns the log-softmax at K ids, [B, C, K], without storing it for the whole vocabulary."""
  picked = jnp.take_along_axis(logits_BCV, ids_BCK, axis=-1)
  return picked - log_sum_exp(logits_BCV)


def label_logp(logits_BCV: jax.Array, labels_BC: jax.Array) -> jax.Array:
  """Returns the log-softmax at one id of each position, [B, C]."""
  return logp_at(logits_BCV, labels_BC[..., None])[..., 0]
