"""Divergences between the teacher p and the student q, from log-probabilities.

Each function takes log-probabilities of the same outcomes and returns float32 terms, elementwise
over the last axis. The sum of the terms over all outcomes is the divergence in nats.

The terms of a KL divergence include `b - a`. It sums to 0 and makes every term non-negative, so
that the sum stays accurate near 0, where a plain sum of a (log a - log b) cancels.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from distill_jax.errors import bad_value, check_choice
from distill_jax.types import Terms


@jax.custom_jvp
def forward_kl(logp: jax.Array, logq: jax.Array) -> jax.Array:
  """Returns the terms of KL(p || q) (arXiv:1503.02531)."""
  return _kl(logp, logq)


# The derivative in logq only, without that of the `b - a` in _kl, whose sum is constant. Autodiff
# would keep several more arrays of the size of the vocabulary.
forward_kl.defjvps(None, lambda dlogq, _, logp, logq: -jnp.exp(logp) * dlogq)


def reverse_kl(logp: jax.Array, logq: jax.Array) -> jax.Array:
  """Returns the terms of KL(q || p) (MiniLLM, arXiv:2306.08543)."""
  return _kl(logq, logp)


def jensen_shannon(logp: jax.Array, logq: jax.Array, beta: float = 0.5) -> jax.Array:
  """Returns the terms of the generalised Jensen-Shannon divergence (GKD, arXiv:2306.13649).

  It is beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q. Divided by beta it
  tends to KL(p || q) as beta tends to 0; divided by 1 - beta it tends to KL(q || p) as beta tends
  to 1. For beta equal to 0 or 1 these limits are returned.
  """
  if beta in (0, 1):
    return forward_kl(logp, logq) if beta == 0 else reverse_kl(logp, logq)
  logm = _mix(logp, logq, beta)
  return beta * _kl(logp, logm) + (1 - beta) * _kl(logq, logm)


def skew_kl(logp: jax.Array, logq: jax.Array, alpha: float = 0.1) -> jax.Array:
  """Returns the terms of KL(p || alpha p + (1 - alpha) q) (DistiLLM, arXiv:2402.03898)."""
  return _kl(logp, _mix(logp, logq, alpha))


def skew_reverse_kl(logp: jax.Array, logq: jax.Array, alpha: float = 0.1) -> jax.Array:
  """Returns the terms of KL(q || alpha q + (1 - alpha) p) (DistiLLM, arXiv:2402.03898)."""
  return _kl(logq, _mix(logq, logp, alpha))


def adaptive_kl(logp: jax.Array, logq: jax.Array, head_mass: float = 0.5) -> jax.Array:
  """Returns the terms of adaptive KL, a mixture of forward and reverse KL (arXiv:2404.02657).

  The head of the distribution is the teacher's most probable outcomes up to a mass of
  `head_mass`. Forward KL is weighted by the head's share of sum |p - q|, reverse KL by the
  tail's share. The shares are treated as constants in the gradient.
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
  """Returns the terms of the alpha-beta divergence (ABKD, arXiv:2505.04560, equation 6).

  It is -1/(alpha beta) sum [p^alpha q^beta - alpha/(alpha+beta) p^(alpha+beta)
  - beta/(alpha+beta) q^(alpha+beta)]. It tends to forward KL as (alpha, beta) tends to (1, 0), and
  to reverse KL as it tends to (0, 1).

  Raises:
    InputError: alpha, beta or their sum is 0.
  """
  total = alpha + beta
  if 0 in (alpha, beta, total):
    raise bad_value(
      "(alpha, beta)",
      (alpha, beta),
      "two numbers that are not 0 and whose sum is not 0",
      "Use forward_kl or reverse_kl for the limits",
    )
  mixed = jnp.exp(alpha * logp + beta * logq)
  return (alpha / total * jnp.exp(total * logp) + beta / total * jnp.exp(total * logq) - mixed) / (
    alpha * beta
  )


def total_variation(logp: jax.Array, logq: jax.Array) -> jax.Array:
  """Returns the terms of the total variation distance, half of sum |p - q|."""
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
  """Returns a divergence with its parameters.

  Args:
    name: A key of ALL.
    parameters: Values of its parameters, by name. Missing ones have their defaults.

  Raises:
    InputError: The name or a parameter is unknown, or a value is out of range.
  """
  parameters = dict(parameters or {})
  check_choice("divergence", name, ALL, "Correct the name")
  known = list(inspect.signature(ALL[name]).parameters)[2:]
  if unknown := [key for key in parameters if key not in known]:
    raise bad_value(
      "parameters",
      parameters,
      f"only {' and '.join(known)}" if known else f"none for {name}",
      f"Remove {unknown[0]!r}",
    )
  if name == "alpha_beta":
    alpha_beta(jnp.zeros(1), jnp.zeros(1), **parameters)  # checks the values
  elif any(not 0 <= x <= 1 for x in parameters.values()):
    raise bad_value("parameters", parameters, "numbers from 0 to 1", "Correct the values")
  return functools.partial(ALL[name], **parameters)


def _kl(loga: jax.Array, logb: jax.Array) -> jax.Array:
  """Returns a (log a - log b) + b - a, which is at least 0."""
  d = loga - logb
  near = jnp.clip(d, -0.5, 0.5)  # where expm1 avoids the cancellation of b - a
  a = jnp.exp(loga)
  return jnp.where(d == near, a * (near + jnp.expm1(-near)), a * d + jnp.exp(logb) - a)


def _mix(loga: jax.Array, logb: jax.Array, alpha: float) -> jax.Array:
  """Returns log(alpha a + (1 - alpha) b)."""
  if alpha in (0, 1):
    return logb if alpha == 0 else loga
  return jnp.logaddexp(loga + jnp.log(alpha), logb + jnp.log1p(-alpha))
