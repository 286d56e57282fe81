"""Logits over a vocabulary: made of hidden states, capped, restricted to rows, and normalised."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def logits(hidden_BTD: jax.Array, head_VD: jax.Array, vocab_size: int | None = None) -> jax.Array:
  """float32 [B, T, V], whatever the dtype of the product's inputs.

  Rows of the head from `vocab_size` on are padding: -inf, so that they get no probability.
  """
  z_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, head_VD, preferred_element_type=jnp.float32)
  if vocab_size is None or vocab_size >= head_VD.shape[0]:
    return z_BTV
  real_V = jnp.arange(head_VD.shape[0]) < vocab_size
  return jnp.where(real_V[None, None], z_BTV, -jnp.inf)


def soft_cap(logits_BTV: jax.Array, cap: float | None) -> jax.Array:
  """cap * tanh(logits / cap), where a family has a cap (arXiv:2408.00118); padding stays -inf."""
  if cap is None:
    return logits_BTV
  return jnp.where(logits_BTV > -jnp.inf, cap * jnp.tanh(logits_BTV / cap), -jnp.inf)


def only_rows(logits_BCV: jax.Array, rows_BC2: jax.Array | None) -> jax.Array:
  """Logits of those rows among which each position chooses, from `first` to before `past`.

  The others are -inf, as padding rows are. None, and a position whose rows are (0, 0), as
  masked ones' are, choose among all.
  """
  if rows_BC2 is None:
    return logits_BCV
  row_V = jnp.arange(logits_BCV.shape[-1])[None, None]
  first, past = rows_BC2[..., :1], rows_BC2[..., 1:]
  return jnp.where(((row_V >= first) & (row_V < past)) | (past == 0), logits_BCV, -jnp.inf)


def cap_and_select(
  logits_BCV: jax.Array, cap: float | None, rows_BC2: jax.Array | None
) -> jax.Array:
  """Logits as every loss and metric reads them: capped, over the rows to choose among."""
  return only_rows(soft_cap(logits_BCV, cap), rows_BC2)


def fit_rows(logits_BCV: jax.Array, like_BCV: jax.Array) -> jax.Array:
  """Logits over as many rows as `like` has: padding rows are cut, or added as -inf.

  Rows that are padding on either side are padding here: both sides sum over the same tokens.
  """
  rows = like_BCV.shape[-1]
  logits_BCV = logits_BCV[..., :rows]
  if missing := rows - logits_BCV.shape[-1]:
    pad = ((0, 0), (0, 0), (0, missing))
    logits_BCV = jnp.pad(logits_BCV, pad, constant_values=-jnp.inf)
  return jnp.where(like_BCV > -jnp.inf, logits_BCV, -jnp.inf)


def log_sum_exp(logits_BCV: jax.Array) -> jax.Array:
  """log of the sum of exponentials, [B, C, 1]: one form for every loss and metric.

  What several of them ask of the same logits is then the same to XLA, and done once a chunk.
  """
  return jax.nn.logsumexp(logits_BCV, axis=-1, keepdims=True)


def logp_at(logits_BCV: jax.Array, ids_BCK: jax.Array) -> jax.Array:
  """log softmax at a few ids, [B, C, K], without the log-probabilities of all the others."""
  picked = jnp.take_along_axis(logits_BCV, ids_BCK, axis=-1)
  return picked - log_sum_exp(logits_BCV)


def label_logp(logits_BCV: jax.Array, labels_BC: jax.Array) -> jax.Array:
  """log softmax at one id of each position, [B, C]."""
  return logp_at(logits_BCV, labels_BC[..., None])[..., 0]
