"""Decoding of encoder-decoders: greedy or by beams, one compiled program a batch.

All targets of a batch begin with the same tokens, so that they are at one position at a time.
Rows know nothing of each other: what becomes of one does not depend on its company.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from distill_jax.errors import InputError
from distill_jax.models import Seq2SeqCache as Cache
from distill_jax.nn import fused_head
from distill_jax.nn.layers import ComputeConfig

NEVER = -1e9  # a score that no text has


@dataclasses.dataclass(frozen=True)
class Search:
  """How a target is looked for. Static and hashable.

  Attributes:
    prompt: what every target begins with, the model's decoder_start_token_id first.
    eos, pad: what ends a target, and what fills the rest.
    max_new_tokens: of a target, after the prompt.
    beams: 1 is greedy.
    length_penalty: a text's log-probability is divided by its length to this power.
    suppress, suppress_first: tokens that are never said, and those that are not said first.
  """

  prompt: tuple[int, ...]
  eos: int
  pad: int
  max_new_tokens: int
  beams: int = 1
  length_penalty: float = 1.0
  suppress: tuple[int, ...] = ()
  suppress_first: tuple[int, ...] = ()

  def __post_init__(self):
    if self.beams < 1 or self.max_new_tokens < 1 or not self.prompt:
      raise InputError(
        f"beams is {self.beams}, max_new_tokens {self.max_new_tokens} and the prompt has "
        f"{len(self.prompt)} tokens; each is at least 1"
      )

  @property
  def size(self) -> int:
    """Positions of a target."""
    return len(self.prompt) + self.max_new_tokens


def search(
  model: Any, source: Any, compute: ComputeConfig, spec: Search
) -> tuple[jax.Array, jax.Array]:
  """What the model says of each source.

  Args:
    source: of B rows, as the family reads it.

  Returns:
    int32 [B, max_new_tokens], without the prompt, eos at the end of what ended, and pad after
    it; and float32 [B], its log-probability (with beams: divided by its length as said).
  """
  cache = model.init_cache(source, spec.beams, spec.size, compute)
  rows = cache.k_LRTHh.shape[1]

  def read(cache, xs):
    token, position = xs
    return model.decode_step(jnp.full(rows, token), position, cache, compute)[1], None

  prompt = jnp.asarray(spec.prompt, jnp.int32)
  cache, _ = jax.lax.scan(read, cache, (prompt[:-1], jnp.arange(len(prompt) - 1)))
  return (_greedy if spec.beams == 1 else _beams)(model, cache, compute, spec)


def _log_probabilities(model, tokens_R, n, cache, compute: ComputeConfig, spec: Search):
  """(float32 [R, V] of the next token after `n` new ones, the cache)."""
  out, cache = model.decode_step(tokens_R, len(spec.prompt) - 1 + n, cache, compute)
  z_RV = fused_head.soft_cap(fused_head.logits(out.hidden_BTD, out.head_VD), out.soft_cap)[:, 0]
  logp_RV = jax.nn.log_softmax(z_RV)
  never = lambda logp, ids: logp.at[:, jnp.asarray(ids, jnp.int32)].set(-jnp.inf)
  if spec.suppress:
    logp_RV = never(logp_RV, spec.suppress)
  if spec.suppress_first:
    logp_RV = jnp.where(n == 0, never(logp_RV, spec.suppress_first), logp_RV)
  return logp_RV, cache


def _greedy(
  model, cache: Cache, compute: ComputeConfig, spec: Search
) -> tuple[jax.Array, jax.Array]:
  B = cache.k_LRTHh.shape[1]

  def more(carry):
    n, _, _, _, ended_B, _ = carry
    return (n < spec.max_new_tokens) & ~jnp.all(ended_B)

  def step(carry):
    n, last_B, said_BN, score_B, ended_B, cache = carry
    logp_BV, cache = _log_probabilities(model, last_B, n, cache, compute, spec)
    new_B = jnp.argmax(logp_BV, -1).astype(jnp.int32)
    logp_B = jnp.take_along_axis(logp_BV, new_B[:, None], 1)[:, 0]
    new_B = jnp.where(ended_B, spec.pad, new_B)
    score_B += jnp.where(ended_B, 0.0, logp_B)
    said_BN = said_BN.at[:, n].set(new_B)
    return n + 1, new_B, said_BN, score_B, ended_B | (new_B == spec.eos), cache

  start = (
    jnp.int32(0),
    jnp.full(B, spec.prompt[-1], jnp.int32),
    jnp.full((B, spec.max_new_tokens), spec.pad, jnp.int32),
    jnp.zeros(B),
    jnp.zeros(B, bool),
    cache,
  )
  _, _, said_BN, score_B, _, _ = jax.lax.while_loop(more, step, start)
  return said_BN, score_B


class Beams(struct.PyTreeNode):
  """K texts a row that go on, the best first, and the K best that have ended."""

  n: jax.Array
  said_BKN: jax.Array
  score_BK: jax.Array  # log-probabilities
  ended_BKN: jax.Array
  ended_score_BK: jax.Array  # by length
  has_ended_BK: jax.Array
  open_B: jax.Array  # a text that goes on may yet be better
  last_BK: jax.Array
  cache: Cache


def _beams(
  model, cache: Cache, compute: ComputeConfig, spec: Search
) -> tuple[jax.Array, jax.Array]:
  """Beam search as transformers has it (early_stopping=False)."""
  K, N = spec.beams, spec.max_new_tokens
  B = cache.k_LRTHh.shape[1] // K
  nothing = jnp.full((B, K, N), spec.pad, jnp.int32)
  never_BK = jnp.full((B, K), NEVER)
  start = Beams(
    jnp.int32(0),
    nothing,
    never_BK.at[:, 0].set(0.0),
    nothing,
    never_BK,
    jnp.zeros((B, K), bool),
    jnp.ones(B, bool),
    jnp.full((B, K), spec.prompt[-1], jnp.int32),
    cache,
  )
  more = lambda s: (s.n < N) & jnp.any(s.open_B)
  end = jax.lax.while_loop(more, lambda s: _beam_step(model, s, compute, spec), start)
  return end.ended_BKN[:, 0], end.ended_score_BK[:, 0]


def _beam_step(model, s: Beams, compute: ComputeConfig, spec: Search) -> Beams:
  (B, K), N = s.score_BK.shape, spec.max_new_tokens
  logp_RV, cache = _log_probabilities(model, s.last_BK.reshape(-1), s.n, s.cache, compute, spec)
  V = logp_RV.shape[-1]
  total = s.score_BK[..., None] + logp_RV.reshape(B, K, V)
  # Twice as many as go on: all K of them may have ended.
  score_BC, flat_BC = jax.lax.top_k(total.reshape(B, K * V), 2 * K)
  parent_BC, token_BC = flat_BC // V, (flat_BC % V).astype(jnp.int32)
  said_BCN = _take(s.said_BKN, parent_BC).at[:, :, s.n].set(token_BC)
  ends_BC = (token_BC == spec.eos) | (s.n + 1 == N)
  go_on_score, chosen_BK = jax.lax.top_k(score_BC + ends_BC * NEVER, K)

  # Of the ended, those among the best K count, unless nothing better was to be hoped for.
  counts_BC = ends_BC & (jnp.arange(2 * K) < K)[None]
  length = (s.n + 1).astype(jnp.float32)
  by_length = score_BC / length**spec.length_penalty
  by_length += NEVER * (~s.open_B[:, None] | ~counts_BC)
  join = lambda a, b: jnp.concatenate([a, b], 1)
  ended_score, best_BK = jax.lax.top_k(join(s.ended_score_BK, by_length), K)
  has_ended_BK = _take(join(s.has_ended_BK, counts_BC), best_BK)
  worst_BK = jnp.where(has_ended_BK, jnp.min(ended_score, 1, keepdims=True), NEVER)
  hope_B1 = go_on_score[:, :1] / length**spec.length_penalty
  rows = (jnp.arange(B)[:, None] * K + _take(parent_BC, chosen_BK)).reshape(-1)
  return Beams(
    n=s.n + 1,
    said_BKN=_take(said_BCN, chosen_BK),
    score_BK=go_on_score,
    ended_BKN=_take(join(s.ended_BKN, said_BCN), best_BK),
    ended_score_BK=ended_score,
    has_ended_BK=has_ended_BK,
    open_B=s.open_B & jnp.any(hope_B1 > worst_BK, -1),
    last_BK=_take(token_BC, chosen_BK),
    cache=cache.replace(k_LRTHh=cache.k_LRTHh[:, rows], v_LRTHh=cache.v_LRTHh[:, rows]),
  )


def _take(x_BC: jax.Array, at_BK: jax.Array) -> jax.Array:
  """Rows [B, K, ...] of [B, C, ...]."""
  return jax.vmap(lambda x_C, at_K: x_C[at_K])(x_BC, at_BK)
