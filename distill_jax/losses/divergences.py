"""Divergences between teacher p and student q, from log-probabilities on the same outcomes.

Each is (logp, logq) -> terms, elementwise over the last axis, float32; their sum over all
outcomes is the divergence in nats. Terms of a KL carry `b - a`, which sums to 0 and makes
each of them non-negative: sums of them do not lose their digits near 0, as a plain
sum of a (log a - log b) does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from distill_jax.errors import InputError
from distill_jax.types import Terms


@jax.custom_jvp
def forward_kl(logp: jax.Array, logq: jax.Array) -> jax.Array:
  """KL(p || q) (arXiv:1503.02531)."""
  return _kl(logp, logq)


# By logq alone, and without the `b - a` of _kl, whose sum is constant: what autodiff would
# make of the terms keeps several more arrays of the vocabulary's size.
forward_kl.defjvps(None, lambda dlogq, _, logp, logq: -jnp.exp(logp) * dlogq)


def reverse_kl(logp: jax.Array, logq: jax.Array) -> jax.Array:
  """KL(q || p) (MiniLLM, arXiv:2306.08543)."""
  return _kl(logq, logp)


def jensen_shannon(logp: jax.Array, logq: jax.Array, beta: float = 0.5) -> jax.Array:
  """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, arXiv:2306.13649).

  Divided by beta it tends to KL(p || q) for beta to 0, and by 1 - beta to KL(q || p) for beta
  to 1; at 0 and 1 themselves those are returned.
  """
  if beta in (0, 1):
    return forward_kl(logp, logq) if beta == 0 else reverse_kl(logp, logq)
  logm = _mix(logp, logq, beta)
  return beta * _kl(logp, logm) + (1 - beta) * _kl(logq, logm)


def skew_kl(logp: jax.Array, logq: jax.Array, alpha: float = 0.1) -> jax.Array:
  """KL(p || alpha p + (1 - alpha) q) (DistiLLM, arXiv:2402.03898)."""
  return _kl(logp, _mix(logp, logq, alpha))


def skew_reverse_kl(logp: jax.Array, logq: jax.Array, alpha: float = 0.1) -> jax.Array:
  """KL(q || alpha q + (1 - alpha) p) (DistiLLM, arXiv:2402.03898)."""
  return _kl(logq, _mix(logq, logp, alpha))


def adaptive_kl(logp: jax.Array, logq: jax.Array, head_mass: float = 0.5) -> jax.Array:
  """Forward and reverse KL, weighed by where p and q differ (AKL, arXiv:2404.02657).

  The head is the teacher's likeliest outcomes up to `head_mass`. Forward KL has the head's
  share of sum |p - q|, reverse KL the tail's. The shares carry no gradient.
  """
  p, gap = jnp.exp(logp), jnp.abs(jnp.exp(logp) - jnp.exp(logq))
  order = jnp.argsort(-logp, axis=-1)
  sorted_p = jnp.take_along_axis(p, order, -1)
  in_head = jnp.cumsum(sorted_p, -1) - sorted_p < head_mass  # the mass before an outcome
  head_gap = jnp.sum(jnp.where(in_head, jnp.take_along_axis(gap, order, -1), 0), -1, keepdims=True)
  whole_gap = jnp.sum(gap, -1, keepdims=True)
  share = jnp.where(whole_gap > 0, head_gap / jnp.where(whole_gap > 0, whole_gap, 1), 0.5)
  share = jax.lax.stop_gradient(share)
  return share * _kl(logp, logq) + (1 - share) * _kl(logq, logp)


def alpha_beta(
  logp: jax.Array, logq: jax.Array, alpha: float = 0.2, beta: float = 0.7
) -> jax.Array:
  """The alpha-beta divergence (ABKD, arXiv:2505.04560, equation 6).

  -1/(alpha beta) sum [p^alpha q^beta - alpha/(alpha+beta) p^(alpha+beta)
  - beta/(alpha+beta) q^(alpha+beta)]; towards (1, 0) forward and (0, 1) reverse KL.
  """
  total = alpha + beta
  if 0 in (alpha, beta, total):
    raise InputError(
      f"alpha_beta has parameters ({alpha}, {beta}); neither they nor their sum can be 0: the "
      "limits are forward_kl and reverse_kl"
    )
  mixed = jnp.exp(alpha * logp + beta * logq)
  return (alpha / total * jnp.exp(total * logp) + beta / total * jnp.exp(total * logq) - mixed) / (
    alpha * beta
  )


def total_variation(logp: jax.Array, logq: jax.Array) -> jax.Array:
  """Half of sum |p - q|."""
  return 0.5 * jnp.abs(jnp.exp(logp) - jnp.exp(logq))


ALL: dict[str, Callable[..., jax.Array]] = {
  "forward_kl": forward_kl,
  "reverse_kl": reverse_kl,
  "jensen_shannon": jensen_shannon,
  "skew_kl": skew_kl,
  "skew_reverse_kl": skew_reverse_kl,
  "adaptive_kl": adaptive_kl,
  "alpha_beta": alpha_beta,
  "total_variation": total_variation,
}


def named(name: str, parameters: Mapping[str, float] | None = None) -> Terms:
  """Returns a divergence by name, with its parameters by name or at their defaults.

  Raises:
    InputError: there is no such divergence, it has no such parameter, or the value is out of range.
  """
  parameters = dict(parameters or {})
  if name not in ALL:
    raise InputError(f"there is no divergence {name!r}; there are {', '.join(ALL)}")
  takes = list(inspect.signature(ALL[name]).parameters)[2:]
  if not set(parameters) <= set(takes):
    expected = " and ".join(takes) or "no parameters"
    raise InputError(f"{name} takes {expected} and was given {parameters}")
  if name != "alpha_beta" and any(not 0 <= x <= 1 for x in parameters.values()):
    raise InputError(f"{name} has parameters {parameters}; each lies from 0 to 1")
  if name == "alpha_beta":
    alpha_beta(jnp.zeros(1), jnp.zeros(1), **parameters)  # refuses what the formula cannot take
  return functools.partial(ALL[name], **parameters)


def _kl(loga: jax.Array, logb: jax.Array) -> jax.Array:
  """a (log a - log b) + b - a, at least 0."""
  d = loga - logb
  near = jnp.clip(d, -0.5, 0.5)  # where expm1 keeps the digits that b - a would cancel
  a = jnp.exp(loga)
  return jnp.where(d == near, a * (near + jnp.expm1(-near)), a * d + jnp.exp(logb) - a)


def _mix(loga: jax.Array, logb: jax.Array, alpha: float) -> jax.Array:
  """log(alpha a + (1 - alpha) b)."""
  if alpha in (0, 1):
    return logb if alpha == 0 else loga
  return jnp.logaddexp(loga + jnp.log(alpha), logb + jnp.log1p(-alpha))
