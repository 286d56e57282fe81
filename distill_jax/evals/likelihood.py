"""Log-likelihoods of continuations, for multiple-choice benchmarks and lm-evaluation-harness."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.hub.tokenizer import check_vocabulary
from distill_jax.models import loading
from distill_jax.nn import sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.records import sampler
from distill_jax.records.collate import to_device
from distill_jax.runtime.progress import Progress
from distill_jax.types import Inputs, JsonObject, Model, Output

MIN_LEN = 32  # minimum length to which rows are padded


class Pair(NamedTuple):
  """A tokenized text: a context of at least one token, and at least one token to score after it."""

  given: list[int]
  scored: list[int]


class Scored(NamedTuple):
  """The score of a pair.

  Attributes:
    logp: The log-probability of all scored tokens, in nats.
    greedy: True if each scored token is the most likely token at its position.
  """

  logp: float
  greedy: bool


class PairBatch(NamedTuple):
  """A batch of pairs.

  Attributes:
    inputs: The tokens of both parts, except for the last token.
    positions_BC: int32, the positions whose outputs predict the scored tokens.
    labels_BC: int32, the scored tokens; -1 for padding.
  """

  inputs: Inputs
  positions_BC: Any
  labels_BC: Any


def make_pair(tokenizer: Tokenizer, given: str, scored: str) -> Pair:
  """Tokenizes the text `given + scored` and splits its tokens into context and scored tokens.

  The rules are those of lm-evaluation-harness, so that results are comparable. The whole text is
  tokenized, with the tokens that the tokenizer puts first. White space at the end of `given` is
  part of the scored text. The number of context tokens is that of `given` alone. An empty `given`
  is replaced by the tokens of `prefix`.

  Raises:
    InputError: If no token belongs to the scored text, or the tokenizer has no prefix for an empty
      context.
  """
  end = len(given.rstrip())
  given, scored = given[:end], given[end:] + scored
  n = len(with_beginning(tokenizer, tokenizer.encode(given)) if given else prefix(tokenizer))
  ids = tokenizer.encode(given + scored)
  whole = with_beginning(tokenizer, ids) if given else [*prefix(tokenizer), *ids]
  if len(whole) <= n:
    raise InputError("The continuation adds no tokens to its context, so it cannot be scored.")
  return Pair(whole[:n], whole[n:])


def with_beginning(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
  """Returns token ids with the tokenizer's first tokens (`Tokenizer.begin`), added if missing."""
  first = tokenizer.begin
  return ids if ids[: len(first)] == first else [*first, *ids]


def prefix(tokenizer: Tokenizer) -> list[int]:
  """Returns the context of a text without context: the token that begins or ends a text.

  Raises:
    InputError: If the tokenizer has neither.
  """
  if tokenizer.begin:
    return tokenizer.begin
  first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
  if first is None:
    raise InputError(
      f"{tokenizer.where} has no token that begins or ends a text, so a text without context "
      "cannot be scored. Give every text a context."
    )
  return [first]


def padded_len(n: int, max_len: int) -> int:
  """Returns the smallest length of 32, 48, 64, 96, 128, … that is at least n, up to `max_len`."""
  power = 1 << max(n - 1, MIN_LEN - 1).bit_length()
  fits_between = n <= 3 * power // 4 and power > MIN_LEN
  return min(3 * power // 4 if fits_between else power, max_len)


def score(
  model: Model, batch: PairBatch, *, compute: ComputeConfig, chunk: int, vocab_size: int
) -> JsonObject:
  """Scores a batch of pairs. The head is computed only at positions that predict a scored token.

  Args:
    model: The model.
    batch: The pairs.
    compute: The compute settings.
    chunk: The number of positions per row whose logits are in memory at once.
    vocab_size: The number of tokens; further rows of the head are padding.

  Returns:
    logp: float32 [B], the log-probability of the scored tokens in nats.
    greedy: bool [B], see `Scored`.
  """
  out: Output = model(batch.inputs, compute)
  hidden_BCD = jnp.take_along_axis(out.hidden_BTD, batch.positions_BC[..., None], axis=1)
  summary = sampler.summarise(
    hidden_BCD,
    out.head_VD,
    jnp.maximum(batch.labels_BC, 0),
    None,
    sampler.SamplerSpec(1, "topk", vocab_size=vocab_size),
    chunk=chunk,
    soft_cap=out.soft_cap,
  )
  no_label_BC = batch.labels_BC < 0
  logp_BC = jnp.where(no_label_BC, 0.0, summary["label_logp"])
  greedy_BC = no_label_BC | (summary["argmax"] == batch.labels_BC)
  return {"logp": logp_BC.sum(-1), "greedy": greedy_BC.all(-1)}


@functools.lru_cache(maxsize=8)
def _compiled(
  compute: ComputeConfig, mesh: jax.sharding.Mesh, chunk: int, vocab_size: int
) -> Callable[[Model, PairBatch], JsonObject]:
  """Returns `score`, which is compiled once for the student of all evaluations in training."""
  fn = functools.partial(score, compute=compute, chunk=chunk, vocab_size=vocab_size)
  return jax.jit(fn, out_shardings=sharding.replicated(mesh))


def fits(pair: Pair, max_len: int) -> bool:
  """Returns True if a pair without its last token is at most as long as `max_len`."""
  return len(pair.given) + len(pair.scored) - 1 <= max_len


class Scorer:
  """Scores pairs with a model.

  Args:
    loaded: The model.
    mesh: The devices.
    tokenizer: The model's tokenizer. Rows of the head beyond its tokens are padding.
    batch_size: The number of pairs per batch.
    chunk: The number of positions per row whose logits are in memory at once.

  Attributes:
    max_len: The model's maximum sequence length.

  Raises:
    InputError: If the batch size does not divide over the devices, or the vocabulary is too large.
  """

  def __init__(
    self,
    loaded: loading.LoadedModel,
    mesh: jax.sharding.Mesh,
    tokenizer: Tokenizer,
    batch_size: int,
    chunk: int,
  ):
    sharding.check_batch("evaluate.batch_size", batch_size, mesh)
    check_vocabulary(tokenizer.vocab_size, loaded.text_config.vocab_size, tokenizer.where)
    self.max_len: int = loaded.text_config.max_position_embeddings
    self._model, self._mesh, self._rows = loaded.model, mesh, sharding.rows(mesh, batch_size)
    self._score = _compiled(loaded.compute, mesh, chunk, tokenizer.vocab_size)

  def fits(self, pair: Pair) -> bool:
    """Returns True if a pair without its last token fits into the model's maximum length."""
    return fits(pair, self.max_len)

  def __call__(self, pairs: Sequence[Pair]) -> list[Scored]:
    """Scores pairs that fit and returns the scores in the same order.

    Raises:
      FloatingPointError: If a log-probability is not finite.
    """
    lengths = [padded_len(len(p.given) + len(p.scored) - 1, self.max_len) for p in pairs]
    order = sorted(range(len(pairs)), key=lambda i: (-lengths[i], -len(pairs[i].scored)))
    scored: list[Scored] = [Scored(0.0, False)] * len(pairs)
    with jax.set_mesh(self._mesh), Progress("score", len(pairs), "texts") as progress:
      for first in range(0, len(order), self._rows.size):
        numbers = order[first : first + self._rows.size]
        batch = self._batch([pairs[i] for i in numbers], lengths[numbers[0]])
        results = jax.device_get(self._score(self._model, to_device(batch, self._rows)))
        for row, i in enumerate(numbers):
          scored[i] = Scored(float(results["logp"][row]), bool(results["greedy"][row]))
        progress.add(len(numbers))
    for i, s in enumerate(scored):
      if not np.isfinite(s.logp):
        raise FloatingPointError(
          f"The log-probability of text {i} is {s.logp}. The model's weights are damaged, or too "
          "large for its dtype."
        )
    return scored

  def _batch(self, pairs: Sequence[Pair], T: int) -> PairBatch:
    """Returns this process's rows of a batch of these pairs. Further rows are padding."""
    B, C = self._rows.size, padded_len(max(len(p.scored) for p in pairs), T)
    tokens_BT, segments_BT, position_BT = (np.zeros((B, T), np.int32) for _ in range(3))
    positions_BC, labels_BC = np.zeros((B, C), np.int32), np.full((B, C), -1, np.int32)
    position_BT[:] = np.arange(T)
    for row, (given, scored) in enumerate(pairs):
      read = [*given, *scored][:-1]
      tokens_BT[row, : len(read)], segments_BT[row, : len(read)] = read, 1
      positions_BC[row, : len(scored)] = np.arange(len(given) - 1, len(read))
      labels_BC[row, : len(scored)] = scored
    arrays: Any = (tokens_BT, position_BT, segments_BT)  # numpy arrays until to_device
    batch = PairBatch(Inputs(*arrays), positions_BC, labels_BC)
    return jax.tree.map(lambda x: x[self._rows.held], batch)
