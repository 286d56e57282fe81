"""Greedy and beam-search decoding of encoder-decoders, in one compiled program per batch.

All targets of a batch begin with the same tokens, so that all rows are at the same position. The
result of a row does not depend on the other rows.

Axes, in addition to those of types.py: J, the beams of a row; K, the 2J most likely continuations
of a row; T, the new tokens of a target.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from distill_jax.errors import bad_value
from distill_jax.models import Seq2SeqCache as Cache
from distill_jax.models import Seq2SeqModel
from distill_jax.nn import fused_head
from distill_jax.nn.layers import ComputeConfig
from distill_jax.types import Inputs, Sounds

NEVER = -1e9  # a score below that of any text


@dataclasses.dataclass(frozen=True)
class Search:
  """Settings of greedy or beam-search decoding. Static and hashable.

  Attributes:
    prompt: The tokens that every target begins with; the first is the model's
      decoder_start_token_id.
    eos: The token that ends a target.
    pad: The token after the end of a target.
    max_new_tokens: The maximum number of tokens after the prompt.
    beams: The number of beams; 1 for greedy decoding.
    length_penalty: The exponent p: a text's score is its log-probability / length^p.
    suppress: Tokens that are never generated.
    suppress_first: Tokens that are not generated as the first token.
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
    for key in ("beams", "max_new_tokens"):
      if (value := getattr(self, key)) < 1:
        raise bad_value(key, value, "a positive integer", "Increase it")
    if not self.prompt:
      raise bad_value("prompt", self.prompt, "at least one token", "Add the start token")

  @property
  def size(self) -> int:
    """The maximum number of positions of a target."""
    return len(self.prompt) + self.max_new_tokens


def search(
  model: Seq2SeqModel, source: Inputs | Sounds, compute: ComputeConfig, spec: Search
) -> tuple[jax.Array, jax.Array]:
  """Decodes a target for each source.

  Args:
    model: An encoder-decoder.
    source: The inputs of the encoder, with B rows.
    compute: The compute settings.
    spec: The decoding settings.

  Returns:
    The tokens after the prompt, int32 [B, max_new_tokens], with pad after eos; and their
    log-probabilities, float32 [B], with length penalty if there are beams.
  """
  cache = model.init_cache(source, spec.beams, spec.size, compute)
  rows = cache.k_LXZHh.shape[1]

  def read(cache, token_and_position):
    token, position = token_and_position
    return model.decode_step(jnp.full(rows, token), position, cache, compute)[1], None

  prompt = jnp.asarray(spec.prompt, jnp.int32)
  cache, _ = jax.lax.scan(read, cache, (prompt[:-1], jnp.arange(len(prompt) - 1)))
  return (_greedy if spec.beams == 1 else _beams)(model, cache, compute, spec)


def _next_logp(
  model: Seq2SeqModel,
  tokens_B: jax.Array,
  n: jax.Array,
  cache: Cache,
  compute: ComputeConfig,
  spec: Search,
) -> tuple[jax.Array, Cache]:
  """Returns the log-probabilities of the token after `n` new ones, float32 [B, V], and the cache.

  The rows B are those of the cache: J rows for each source.
  """
  out, cache = model.decode_step(tokens_B, len(spec.prompt) - 1 + n, cache, compute)
  logits_B1V = fused_head.soft_cap(fused_head.logits(out.hidden_BTD, out.head_VD), out.soft_cap)
  logp_BV = jax.nn.log_softmax(logits_B1V[:, 0])
  if spec.suppress:
    logp_BV = _suppressed(logp_BV, spec.suppress)
  if spec.suppress_first:
    logp_BV = jnp.where(n == 0, _suppressed(logp_BV, spec.suppress_first), logp_BV)
  return logp_BV, cache


def _suppressed(logp_BV: jax.Array, tokens: tuple[int, ...]) -> jax.Array:
  return logp_BV.at[:, jnp.asarray(tokens, jnp.int32)].set(-jnp.inf)


class Greedy(struct.PyTreeNode):
  """The state of greedy decoding: each row's `n` new tokens and their log-probability."""

  n: jax.Array
  tokens_BT: jax.Array
  score_B: jax.Array
  last_B: jax.Array
  ended_B: jax.Array
  cache: Cache


def _greedy(
  model: Seq2SeqModel, cache: Cache, compute: ComputeConfig, spec: Search
) -> tuple[jax.Array, jax.Array]:
  B = cache.k_LXZHh.shape[1]
  start = Greedy(
    n=jnp.int32(0),
    tokens_BT=jnp.full((B, spec.max_new_tokens), spec.pad, jnp.int32),
    score_B=jnp.zeros(B),
    last_B=jnp.full(B, spec.prompt[-1], jnp.int32),
    ended_B=jnp.zeros(B, bool),
    cache=cache,
  )

  def has_unfinished_sequences(s: Greedy) -> jax.Array:
    return (s.n < spec.max_new_tokens) & ~jnp.all(s.ended_B)

  def step(s: Greedy) -> Greedy:
    logp_BV, cache = _next_logp(model, s.last_B, s.n, s.cache, compute, spec)
    best_B = jnp.argmax(logp_BV, -1).astype(jnp.int32)
    logp_B = jnp.take_along_axis(logp_BV, best_B[:, None], 1)[:, 0]
    new_B = jnp.where(s.ended_B, spec.pad, best_B)
    return Greedy(
      n=s.n + 1,
      tokens_BT=s.tokens_BT.at[:, s.n].set(new_B),
      score_B=s.score_B + jnp.where(s.ended_B, 0.0, logp_B),
      last_B=new_B,
      ended_B=s.ended_B | (new_B == spec.eos),
      cache=cache,
    )

  end = jax.lax.while_loop(has_unfinished_sequences, step, start)
  return end.tokens_BT, end.score_B


class Beams(struct.PyTreeNode):
  """The state of beam search: each row's J best running texts and J best finished ones."""

  n: jax.Array
  tokens_BJT: jax.Array
  score_BJ: jax.Array  # log-probabilities, in descending order
  finished_BJT: jax.Array
  finished_score_BJ: jax.Array  # with length penalty; NEVER without a finished text
  is_finished_BJ: jax.Array
  open_B: jax.Array  # True if a running text may still beat a finished one
  last_BJ: jax.Array
  cache: Cache


class Continuations(NamedTuple):
  """The K most likely texts with one more token, best first."""

  tokens_BKT: jax.Array
  score_BK: jax.Array
  last_BK: jax.Array
  parent_BK: jax.Array  # index of the continued beam
  ends_BK: jax.Array


def _beams(
  model: Seq2SeqModel, cache: Cache, compute: ComputeConfig, spec: Search
) -> tuple[jax.Array, jax.Array]:
  """Runs the beam search of transformers' GenerationMixin._beam_search (early_stopping=False)."""
  J, T = spec.beams, spec.max_new_tokens
  B = cache.k_LXZHh.shape[1] // J
  empty_BJT = jnp.full((B, J, T), spec.pad, jnp.int32)
  never_BJ = jnp.full((B, J), NEVER)
  start = Beams(
    n=jnp.int32(0),
    tokens_BJT=empty_BJT,
    score_BJ=never_BJ.at[:, 0].set(0.0),  # initially, all beams are the same text
    finished_BJT=empty_BJT,
    finished_score_BJ=never_BJ,
    is_finished_BJ=jnp.zeros((B, J), bool),
    open_B=jnp.ones(B, bool),
    last_BJ=jnp.full((B, J), spec.prompt[-1], jnp.int32),
    cache=cache,
  )

  def has_unfinished_sequences(s: Beams) -> jax.Array:
    return (s.n < T) & jnp.any(s.open_B)

  def step(s: Beams) -> Beams:
    return _beam_step(model, s, compute, spec)

  end = jax.lax.while_loop(has_unfinished_sequences, step, start)
  return end.finished_BJT[:, 0], end.finished_score_BJ[:, 0]


def _beam_step(model: Seq2SeqModel, s: Beams, compute: ComputeConfig, spec: Search) -> Beams:
  """Adds one token to every running text. The functions have the names of transformers'."""
  logp_BV, cache = _next_logp(model, s.last_BJ.reshape(-1), s.n, s.cache, compute, spec)
  logp_BJV = logp_BV.reshape(*s.score_BJ.shape, -1)
  continuations = _get_top_k_continuations(s, logp_BJV, spec)
  s = _get_running_beams_for_next_iteration(s, continuations, cache)
  s = _update_finished_beams(s, continuations, spec)
  return s.replace(open_B=s.open_B & _check_early_stop_heuristic(s, spec))


def _get_top_k_continuations(s: Beams, logp_BJV: jax.Array, spec: Search) -> Continuations:
  """Returns the 2J most likely texts with one more token; up to J of them may have ended."""
  B, J, V = logp_BJV.shape
  total_BJV = s.score_BJ[..., None] + logp_BJV
  score_BK, index_BK = jax.lax.top_k(total_BJV.reshape(B, J * V), 2 * J)
  parent_BK, token_BK = index_BK // V, (index_BK % V).astype(jnp.int32)
  return Continuations(
    tokens_BKT=_take(s.tokens_BJT, parent_BK).at[:, :, s.n].set(token_BK),
    score_BK=score_BK,
    last_BK=token_BK,
    parent_BK=parent_BK,
    ends_BK=(token_BK == spec.eos) | (s.n + 1 == spec.max_new_tokens),
  )


def _get_running_beams_for_next_iteration(s: Beams, c: Continuations, cache: Cache) -> Beams:
  """Continues with the J best texts that have not ended, and their parents' rows of the cache."""
  B, J = s.score_BJ.shape
  score_BJ, chosen_BJ = jax.lax.top_k(jnp.where(c.ends_BK, NEVER, c.score_BK), J)
  rows = (jnp.arange(B)[:, None] * J + _take(c.parent_BK, chosen_BJ)).reshape(-1)
  return s.replace(
    n=s.n + 1,
    tokens_BJT=_take(c.tokens_BKT, chosen_BJ),
    score_BJ=score_BJ,
    last_BJ=_take(c.last_BK, chosen_BJ),
    cache=cache.replace(k_LXZHh=cache.k_LXZHh[:, rows], v_LXZHh=cache.v_LXZHh[:, rows]),
  )


def _update_finished_beams(s: Beams, c: Continuations, spec: Search) -> Beams:
  """Keeps the J best finished texts, old and new.

  A text that has just ended is added if it is among the J best continuations of an open row.
  """
  J = s.score_BJ.shape[1]
  ended_BK = c.ends_BK & (jnp.arange(2 * J) < J)[None]
  new_score_BK = c.score_BK / s.n.astype(jnp.float32) ** spec.length_penalty
  new_score_BK = jnp.where(s.open_B[:, None] & ended_BK, new_score_BK, NEVER)
  score, best_BJ = jax.lax.top_k(jnp.concatenate([s.finished_score_BJ, new_score_BK], 1), J)
  texts = jnp.concatenate([s.finished_BJT, c.tokens_BKT], 1)
  is_finished = jnp.concatenate([s.is_finished_BJ, ended_BK], 1)
  return s.replace(
    finished_BJT=_take(texts, best_BJ),
    finished_score_BJ=score,
    is_finished_BJ=_take(is_finished, best_BJ),
  )


def _check_early_stop_heuristic(s: Beams, spec: Search) -> jax.Array:
  """Returns True for rows whose best running text beats the worst finished one, bool [B]."""
  best_B1 = s.score_BJ[:, :1] / s.n.astype(jnp.float32) ** spec.length_penalty
  worst_B1 = jnp.min(s.finished_score_BJ, 1, keepdims=True)
  worst_BJ = jnp.where(s.is_finished_BJ, worst_B1, NEVER)
  return jnp.any(best_B1 > worst_BJ, -1)


def _take(x_BK: jax.Array, index_BJ: jax.Array) -> jax.Array:
  """Returns x[b, index[b, j]] for all b and j, [B, J, ...]."""
  return jax.vmap(lambda x_K, index_J: x_K[index_J])(x_BK, index_BJ)
