"""The next token of each row: greedy, or drawn by temperature, top-k, top-p and min-p.

Nothing is sorted. Top-k and min-p are thresholds on logits. Top-p asks of a drawn token
whether the likelier ones hold less than p of the mass, and draws again where they do not:
at least p of the draws are kept, and those are distributed as the renormalised nucleus is.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from distill_jax.errors import InputError
from distill_jax.generation.options import GenerateOptions
from distill_jax.records import sampler


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is chosen, in this order: temperature, top-k, top-p, min-p.

  Attributes:
    temperature: 0 takes the likeliest token, and the others say nothing then.
    top_k: how many of the likeliest tokens are kept, equals of the last too; 0: all.
    top_p: the fewest likeliest tokens that hold this mass are kept (arXiv:1904.09751).
    min_p: tokens at least so likely, relative to the likeliest (arXiv:2407.01082).
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0

  def __post_init__(self):
    if not 0 <= self.temperature < math.inf:
      raise InputError(f"temperature is {self.temperature:g}; it is at least 0, which is greedy")
    if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
      raise InputError(
        f"top_k is {self.top_k}, top_p {self.top_p:g} and min_p {self.min_p:g}; they are at least "
        "0 (all), above 0 up to 1 (all), and from 0 (all) to 1"
      )

  @classmethod
  def of(cls, c: GenerateOptions) -> Sampling:
    return cls(c.temperature, c.top_k, c.top_p, c.min_p)


def choose(logits_BV: jax.Array, keys_B: jax.Array, compute: Sampling) -> jax.Array:
  """The next token of each row, int32 [B]; -inf is never chosen.

  Args:
    logits_BV: float32.
    keys_B: a key for each row, which alone decides it, beside its logits.
  """
  logits_BCV = logits_BV[:, None]
  if compute.temperature == 0:
    return sampler.argmax(logits_BCV)[:, 0]
  top_BCV, drawn_BCV = warp(logits_BCV, compute)

  def draw(n: int | jax.Array) -> jax.Array:
    u_BC = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, n), (1,)))(keys_B)
    return sampler.systematic(drawn_BCV, u_BC, 1)[:, 0]

  if compute.top_p == 1:
    return draw(0)[:, 0]
  total_BC = jnp.sum(top_BCV, -1)

  def again(carry):
    n, ids_BC, ok_BC = carry
    new_BC = draw(n)
    return (
      n + 1,
      jnp.where(ok_BC, ids_BC, new_BC),
      ok_BC | in_nucleus(top_BCV, total_BC, new_BC, compute.top_p),
    )

  ids_BC = jnp.zeros(logits_BV.shape[:1] + (1,), jnp.int32)
  start = jnp.int32(0), ids_BC, jnp.isnan(total_BC)  # of which no draw would ever be kept
  return jax.lax.while_loop(lambda carry: ~jnp.all(carry[2]), again, start)[1][:, 0]


def warp(logits_BCV: jax.Array, compute: Sampling) -> tuple[jax.Array, jax.Array]:
  """(likelihood relative to the likeliest of what top-k keeps, logits of what min-p keeps of it).

  Both at the temperature; what is not kept is 0 in the one and -inf in the other.
  """
  z_BCV = logits_BCV / compute.temperature
  if 0 < compute.top_k < z_BCV.shape[-1]:
    top_BCk, _ = sampler.top_k(z_BCV, compute.top_k)
    z_BCV = jnp.where(z_BCV >= top_BCk[..., -1:], z_BCV, -jnp.inf)
  peak_BC1 = jnp.max(z_BCV, -1, keepdims=True)
  e_BCV = jnp.exp(z_BCV - peak_BC1)
  if compute.min_p > 0:
    z_BCV = jnp.where(e_BCV >= compute.min_p, z_BCV, -jnp.inf)
  return e_BCV, z_BCV


def in_nucleus(e_BCV: jax.Array, total_BC: jax.Array, ids_BC: jax.Array, p: float) -> jax.Array:
  """Whether the tokens likelier than these hold less than p of the mass, bool [B, C]."""
  mine_BC1 = jnp.take_along_axis(e_BCV, ids_BC[..., None], -1)
  above_BC = jnp.sum(jnp.where(e_BCV > mine_BC1, e_BCV, 0), -1)
  return above_BC < p * total_BC
