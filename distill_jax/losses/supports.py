"""Teacher and student on the same outcomes, for any kind of targets.

dense    every token: an online teacher's logits, made for the chunk.
top-k    the k stored tokens, and what the convention does with the mass outside them.
sampled  the sampled tokens, each with an unbiased estimate of its p.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from distill_jax.errors import InputError
from distill_jax.losses.divergences import Terms
from distill_jax.nn import fused_head
from distill_jax.types import Targets

NOTHING = -1e4  # a log-probability whose exponential is 0, and finite as -inf is not
LEAST_TAIL = 1e-7  # of the mass outside top-k: float32 cannot tell 1 - sum(p) from less


def check(kind: str, has_logp: bool, divergence: str, temperature_changes: bool) -> None:
  """Refuses a divergence over records that cannot serve it without bias.

  Args:
    kind: of the records; "dense" for an online teacher.
    has_logp: sampled records that hold true log-probabilities beside the counts.
    temperature_changes: a temperature other than the recorded one is asked for.
  """
  if kind == "sampled" and divergence == "adaptive_kl":
    raise InputError(
      "adaptive_kl ranks all outcomes and sampled records hold a random few; record kind topk"
    )
  if kind == "sampled" and not has_logp and divergence != "forward_kl":
    raise InputError(
      f"{divergence} needs p itself and sampled records hold counts, which estimate it without "
      "bias only where the loss is linear in p; record with records.logp=True, or kind topk"
    )
  if kind == "sampled" and not has_logp and temperature_changes:
    raise InputError(
      "the temperature is not the recorded one and sampled records hold counts, which cannot be "
      "raised to a power without bias; record at that temperature, or with records.logp=True"
    )


def divergence(
  terms: Terms,
  targets: Targets,
  logits_BCV: jax.Array,
  T: jax.Array | float,
  missing_mass: str = "tail_bucket",
) -> jax.Array:
  """The divergence per position, float32 [B, C], at temperature T.

  Dense: exact. Top-k with "tail_bucket": exact between the distributions over the k tokens
  and the rest as one outcome (T must be 1); with "renormalise": between the k tokens, both
  sides renormalised. Sampled with log-probabilities: unbiased at T=1, and consistent for
  T != 1 by self-normalised weights p^(1/T - 1).
  """
  if targets.hidden_BTD is not None:
    logp, logq = dense(targets, logits_BCV, T)
    return _sum(terms, logp, logq)
  assert targets.ids_BTK is not None
  if targets.weight_BTK is None:
    return _sum(terms, *top_k(targets, logits_BCV, T, missing_mass))
  logp, logq, weight = sampled(targets, logits_BCV, T)
  valid = weight > 0
  logp = jnp.where(valid, logp, 0.0)
  return jnp.sum(jnp.where(valid, weight * jnp.exp(-logp) * terms(logp, logq), 0.0), -1)


def dense(targets: Targets, logits_BCV: jax.Array, T: jax.Array | float):
  """(logp, logq) over the student's rows; rows past either vocabulary have no probability."""
  assert targets.hidden_BTD is not None and targets.head_VD is not None
  logits = fused_head.logits(targets.hidden_BTD, targets.head_VD)
  teacher = fused_head.fit_rows(fused_head.soft_cap(logits, targets.soft_cap), logits_BCV)
  return jax.nn.log_softmax(teacher / T), jax.nn.log_softmax(logits_BCV / T)


def top_k(targets: Targets, logits_BCV: jax.Array, T: jax.Array | float, missing_mass: str):
  """(logp, logq) over k tokens, or k tokens and the rest; unused entries are -inf in both."""
  ids, logp = targets.ids_BTK, targets.logp_BTK
  assert ids is not None and logp is not None
  used = logp > -jnp.inf
  if missing_mass == "renormalise":
    z = jnp.take_along_axis(logits_BCV, ids, -1)
    both = (jnp.where(used, logp, -jnp.inf) / T, jnp.where(used, z, -jnp.inf) / T)
    return tuple(jax.nn.log_softmax(x, where=used, axis=-1) for x in both)
  logq = jnp.where(used, fused_head.logp_at(logits_BCV, ids), -jnp.inf)
  with_tail = lambda x: jnp.concatenate([x, _log_rest(x)], -1)
  return with_tail(logp), with_tail(logq)


def sampled(targets: Targets, logits_BCV: jax.Array, T: jax.Array | float):
  """(logp, logq, weight) at the sampled tokens, at temperature T; needs stored logp."""
  ids, weight, logp = targets.ids_BTK, targets.weight_BTK, targets.logp_BTK
  if ids is None or weight is None or logp is None:
    raise InputError("sampled targets hold no log-probabilities; record with records.logp=True")
  valid = weight > 0
  logp = jnp.where(valid, logp, 0.0)
  tilt = jnp.where(valid, weight * jnp.exp((1 / T - 1) * logp), 0.0)
  mass = jnp.sum(tilt, -1, keepdims=True)  # estimates sum_i p_i^(1/T)
  mass = jnp.where(mass > 0, mass, 1.0)  # a masked position has no entries
  return logp / T - jnp.log(mass), fused_head.logp_at(logits_BCV / T, ids), tilt / mass


def _sum(terms: Terms, logp: jax.Array, logq: jax.Array) -> jax.Array:
  """Over the outcomes that either side can have; the others are -inf in both."""
  valid = (logp > -jnp.inf) & (logq > -jnp.inf)
  logp, logq = (jnp.where(valid, x, NOTHING) for x in (logp, logq))
  return jnp.sum(jnp.where(valid, terms(logp, logq), 0.0), -1)


def _log_rest(logx: jax.Array) -> jax.Array:
  """log(1 - sum of the exponentials), kept where float32 can tell it from 0."""
  inside = jax.nn.logsumexp(logx, axis=-1, keepdims=True)
  return jnp.log(-jnp.expm1(jnp.minimum(inside, -LEAST_TAIL)))
