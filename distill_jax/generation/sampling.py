"""Choosing the next token of each row: greedy, or with temperature, top-k, top-p and min-p.

Nothing is sorted. Top-k and min-p are thresholds on logits. Top-p is rejection sampling: a drawn
token is accepted if the tokens that are more likely than it have less than p of the probability
mass, and drawn again otherwise. At least p of the draws are accepted, and accepted tokens have the
renormalised distribution of the nucleus.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from distill_jax.errors import InputError, bad_value
from distill_jax.records import selection


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Sampling settings, applied in this order: temperature, top-k, top-p, min-p.

  Attributes:
    temperature: The temperature. 0: greedy decoding, whatever the other settings are.
    top_k: The number of most likely tokens to keep, and ties with the last of them. 0: all.
    top_p: The probability mass to keep: the smallest set of most likely tokens with at least this
      mass (arXiv:1904.09751). 1: all.
    min_p: The minimum probability relative to the most likely token (arXiv:2407.01082). 0: all.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0

  def __post_init__(self):
    for name, value, is_valid, expected in (
      ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or more"),
      ("top_k", self.top_k, self.top_k >= 0, "0 (all) or more"),
      ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0, up to 1 (all)"),
      ("min_p", self.min_p, 0 <= self.min_p <= 1, "0 (all) to 1"),
    ):
      if not is_valid:
        raise bad_value(name, value, expected, "Correct it")

  @classmethod
  def from_section(
    cls, section: str, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
  ) -> Sampling:
    """Returns the sampling settings of a config section.

    Args:
      section: The name of the section, for messages.
      temperature: See the class.
      top_k: See the class.
      top_p: See the class.
      min_p: See the class.
    """
    try:
      return cls(temperature, top_k, top_p, min_p)
    except InputError as e:
      raise InputError(f"{section}.{e}") from e


def choose(logits_BV: jax.Array, keys_B: jax.Array, spec: Sampling) -> jax.Array:
  """Chooses the next token of each row.

  Args:
    logits_BV: float32. Tokens with a logit of -inf are never chosen.
    keys_B: A random key for each row. The choice depends only on the key and the row's logits.
    spec: The sampling settings.

  Returns:
    int32 [B].
  """
  logits_BCV = logits_BV[:, None]
  if spec.temperature == 0:
    return selection.argmax(logits_BCV)[:, 0]
  top_BCV, drawn_BCV = warp(logits_BCV, spec)

  def draw(n: int | jax.Array) -> jax.Array:
    u_BC = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, n), (1,)))(keys_B)
    return selection.systematic(drawn_BCV, u_BC, 1)[:, 0]

  if spec.top_p == 1:
    return draw(0)[:, 0]
  total_BC = jnp.sum(top_BCV, -1)

  def is_unfinished(carry):
    _, _, accepted_BC = carry
    return ~jnp.all(accepted_BC)

  def draw_again(carry):
    n, ids_BC, accepted_BC = carry
    new_BC = draw(n)
    return (
      n + 1,
      jnp.where(accepted_BC, ids_BC, new_BC),
      accepted_BC | in_nucleus(top_BCV, total_BC, new_BC, spec.top_p),
    )

  ids_BC = jnp.zeros(logits_BV.shape[:1] + (1,), jnp.int32)
  start = jnp.int32(0), ids_BC, jnp.isnan(total_BC)  # with NaN, no draw would ever be accepted
  _, ids_BC, _ = jax.lax.while_loop(is_unfinished, draw_again, start)
  return ids_BC[:, 0]


def warp(logits_BCV: jax.Array, spec: Sampling) -> tuple[jax.Array, jax.Array]:
  """Applies temperature, top-k and min-p to logits.

  Args:
    logits_BCV: float32.
    spec: The sampling settings.

  Returns:
    The probabilities of the tokens that top-k keeps, relative to the most likely token (0 for other
    tokens), and the logits with temperature of those that min-p keeps as well (-inf for others);
    both float32 [B, C, V].
  """
  z_BCV = logits_BCV / spec.temperature
  if 0 < spec.top_k < z_BCV.shape[-1]:
    top_BCK, _ = selection.top_k(z_BCV, spec.top_k)
    z_BCV = jnp.where(z_BCV >= top_BCK[..., -1:], z_BCV, -jnp.inf)
  peak_BC1 = jnp.max(z_BCV, -1, keepdims=True)
  e_BCV = jnp.exp(z_BCV - peak_BC1)
  if spec.min_p > 0:
    z_BCV = jnp.where(e_BCV >= spec.min_p, z_BCV, -jnp.inf)
  return e_BCV, z_BCV


def in_nucleus(e_BCV: jax.Array, total_BC: jax.Array, ids_BC: jax.Array, p: float) -> jax.Array:
  """Tests whether tokens are in the nucleus: more likely tokens have less than p of the mass.

  Args:
    e_BCV: Unnormalised probabilities.
    total_BC: Their sum.
    ids_BC: The tokens to test.
    p: The probability mass of the nucleus.

  Returns:
    bool [B, C].
  """
  own_BC1 = jnp.take_along_axis(e_BCV, ids_BC[..., None], -1)
  above_BC = jnp.sum(jnp.where(e_BCV > own_BC1, e_BCV, 0), -1)
  return above_BC < p * total_BC
