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


def exponentials(
  logits_BCV: jax.Array, temperature: jax.Array | float = 1.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns (exp((logits - maximum) / temperature), the maximum, the sum of the exponentials).

  The maximum and the sum are [B, C, 1]; the maximum has no gradient. All losses and metrics of
  distributions call this function, so that XLA computes them once for the same logits.
  """
  max_BC1 = jax.lax.stop_gradient(jnp.max(logits_BCV, -1, keepdims=True))
  max_BC1 = jnp.where(max_BC1 > -jnp.inf, max_BC1, 0.0)
  exp_BCV = jnp.exp((logits_BCV - max_BC1) / temperature)
  return exp_BCV, max_BC1, jnp.sum(exp_BCV, -1, keepdims=True)


def log_sum_exp(logits_BCV: jax.Array) -> jax.Array:
  """Returns log(sum(exp(logits))), [B, C, 1]."""
  _, max_BC1, sum_BC1 = exponentials(logits_BCV)
  return max_BC1 + jnp.log(sum_BC1)


def entropy(logits_BCV: jax.Array) -> jax.Array:
  """Returns the entropy of softmax(logits) in nats, [B, C]. Rows of -inf have probability 0."""
  exp_BCV, max_BC1, sum_BC1 = exponentials(logits_BCV)
  weighted_BCV = jnp.where(exp_BCV > 0, exp_BCV * (logits_BCV - max_BC1), 0.0)
  return jnp.log(sum_BC1[..., 0]) - jnp.sum(weighted_BCV, -1) / sum_BC1[..., 0]


@jax.custom_jvp
def kl(teacher_BCV: jax.Array, student_BCV: jax.Array, temperature: jax.Array | float) -> jax.Array:
  """Returns KL(p || q) in nats, [B, C], of softmax(teacher / T) and softmax(student / T).

  Only the student is differentiated: the gradient is (q - p) / T. Rows of -inf have probability 0;
  those of the student must be so in the teacher too.

  With s and t the logits minus their maximum, it is the mean of (t - s) / T under p minus the
  logarithm of the ratio of the sums of exponentials. Both are small where p and q are close, so
  that little cancels.
  """
  p_BCV, max_p_BC1, sum_p_BC1 = exponentials(teacher_BCV, temperature)
  _, max_q_BC1, sum_q_BC1 = exponentials(student_BCV, temperature)
  gap_BCV = (teacher_BCV - max_p_BC1) - (student_BCV - max_q_BC1)
  gap_BC1 = jnp.sum(jnp.where(p_BCV > 0, p_BCV * gap_BCV, 0.0), -1, keepdims=True)
  kl_BC1 = gap_BC1 / (sum_p_BC1 * temperature) - jnp.log(sum_p_BC1 / sum_q_BC1)
  return jnp.maximum(kl_BC1, 0.0)[..., 0]


@kl.defjvp
def _kl_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
  teacher_BCV, student_BCV, temperature = primals
  p_BCV, _, sum_p_BC1 = exponentials(teacher_BCV, temperature)
  q_BCV, _, sum_q_BC1 = exponentials(student_BCV, temperature)
  gradient_BCV = q_BCV * (1 / (sum_q_BC1 * temperature)) - p_BCV * (1 / (sum_p_BC1 * temperature))
  return kl(*primals), jnp.sum(gradient_BCV * tangents[1], -1)


@jax.custom_jvp
def label_logit(logits_BCV: jax.Array, labels_BC: jax.Array) -> jax.Array:
  """Returns the logit of one id of each position, [B, C].

  Its gradient is a comparison of all ids with the label, which XLA fuses into the gradient of the
  other terms. That of `take_along_axis` is a scatter, before and after which XLA stores the
  gradient of all logits in float32.
  """
  return jnp.take_along_axis(logits_BCV, labels_BC[..., None], -1)[..., 0]


@label_logit.defjvp
def _label_logit_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
  logits_BCV, labels_BC = primals
  is_label_BCV = jnp.arange(logits_BCV.shape[-1])[None, None] == labels_BC[..., None]
  return label_logit(*primals), jnp.sum(jnp.where(is_label_BCV, tangents[0], 0.0), -1)


def logp_at(logits_BCV: jax.Array, ids_BCK: jax.Array) -> jax.Array:
  """Returns the log-softmax at K ids, [B, C, K], without storing it for the whole vocabulary."""
  picked = jnp.take_along_axis(logits_BCV, ids_BCK, axis=-1)
  return picked - log_sum_exp(logits_BCV)


def label_logp(logits_BCV: jax.Array, labels_BC: jax.Array) -> jax.Array:
  """Returns the log-softmax at one id of each position, [B, C]."""
  return label_logit(logits_BCV, labels_BC) - log_sum_exp(logits_BCV)[..., 0]
