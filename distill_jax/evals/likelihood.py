"""The log-likelihood of continuations, and whether greedy decoding gives the same."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
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

MIN_LEN = 32  # rows are padded to one of few lengths, from this one on


class Pair(NamedTuple):
  """A text in tokens: a context of at least one, and at least one that is scored after it."""

  given: list[int]
  scored: list[int]


class Scored(NamedTuple):
  """The score of a pair.

  Attributes:
    logp: of all its scored tokens, in nats.
    greedy: whether each of them is the likeliest.
  """

  logp: float
  greedy: bool


class PairBatch(NamedTuple):
  """The rows of a batch of pairs.

  Attributes:
    number_B: of the pair; -1 for padding.
    inputs: the tokens of both parts but for the last one.
    positions_BC: the positions whose outputs predict the scored tokens …
    labels_BC: … and these tokens; -1 where there is none.
  """

  number_B: Any
  inputs: Inputs
  positions_BC: Any
  labels_BC: Any


def make_pair(tokenizer: Tokenizer, given: str, scored: str) -> Pair:
  """Tokenizes `given + scored`, and tells which tokens are scored.

  As in lm-evaluation-harness, so that numbers compare: the whole text is tokenized, after what
  the tokenizer puts first; spaces that `given` ends with belong to what is scored; and as many
  tokens are given as `given` has alone. An empty one is replaced by a text's beginning (or a
  document's end).
  """
  end = len(given.rstrip())
  given, scored = given[:end], given[end:] + scored
  n = len(with_beginning(tokenizer, tokenizer.encode(given)) if given else prefix(tokenizer))
  ids = tokenizer.encode(given + scored)
  whole = with_beginning(tokenizer, ids) if given else [*prefix(tokenizer), *ids]
  if len(whole) <= n:
    raise InputError("there is nothing to score: no token of the text is of its second part")
  return Pair(whole[:n], whole[n:])


def with_beginning(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
  """Adds what the tokenizer puts first, where a chat template has not written it."""
  first = tokenizer.begin
  return ids if ids[: len(first)] == first else [*first, *ids]


def prefix(tokenizer: Tokenizer) -> list[int]:
  """What a text without a context is scored after: the token that begins or ends a text.

  Raises:
    InputError: the tokenizer has neither.
  """
  if tokenizer.begin:
    return tokenizer.begin
  first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
  if first is None:
    raise InputError(
      f"{tokenizer.where} has no token that begins or ends a text, after which one that follows "
      "nothing could be scored; give every text a context"
    )
  return [first]


def padded_len(n: int, max_len: int) -> int:
  """The least of 32, 48, 64, 96, 128, … that is at least n; at most `max_len`."""
  power = 1 << max(n - 1, MIN_LEN - 1).bit_length()
  fits_between = n <= 3 * power // 4 and power > MIN_LEN
  return min(3 * power // 4 if fits_between else power, max_len)


def score(
  model: Model, batch: PairBatch, *, compute: ComputeConfig, chunk: int, vocab_size: int
) -> JsonObject:
  """Scores the rows of a batch: number int32 [B], logp float32 [B] in nats, greedy bool [B].

  The head reads only the positions that predict a label.
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
  return {"number": batch.number_B, "logp": logp_BC.sum(-1), "greedy": greedy_BC.all(-1)}


class Scorer:
  """Scores pairs with a model, `batch_size` rows at a time, on its mesh.

  Args:
    tokenizer: the model's; rows of the head past its tokens are padding.
    chunk: positions of each row whose logits exist at once.

  Attributes:
    max_len: tokens that the model reads.
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
    self._model, self._mesh, self._batch_size = loaded.model, mesh, batch_size
    self._score = jax.jit(
      functools.partial(
        score, compute=loaded.compute, chunk=chunk, vocab_size=tokenizer.vocab_size
      ),
      out_shardings=sharding.replicated(mesh),
    )

  def fits(self, pair: Pair) -> bool:
    """Whether the model can read a pair, but for the last token."""
    return len(pair.given) + len(pair.scored) - 1 <= self.max_len

  def __call__(self, pairs: Sequence[Pair]) -> list[Scored]:
    """Scores pairs that fit, in their order.

    Raises:
      FloatingPointError: a log-probability is not finite.
    """
    lengths = [padded_len(len(p.given) + len(p.scored) - 1, self.max_len) for p in pairs]
    order = sorted(range(len(pairs)), key=lambda i: (-lengths[i], -len(pairs[i].scored)))
    scored: list[Scored] = [Scored(0.0, False)] * len(pairs)
    batch_sharding = sharding.batch_sharding(self._mesh)
    with jax.set_mesh(self._mesh), Progress("score", len(pairs), "texts") as progress:
      for first in range(0, len(order), self._batch_size):
        numbers = order[first : first + self._batch_size]
        batch = self._batch({i: pairs[i] for i in numbers}, lengths[numbers[0]])
        results = jax.device_get(self._score(self._model, to_device(batch, batch_sharding)))
        for i, logp, greedy in zip(
          *(results[k] for k in ("number", "logp", "greedy")), strict=True
        ):
          if i >= 0:
            scored[i] = Scored(float(logp), bool(greedy))
        progress.add(len(numbers))
    for i, s in enumerate(scored):
      if not np.isfinite(s.logp):
        raise FloatingPointError(
          f"the log-probability of text {i} is {s.logp}; the model's weights are damaged, or too "
          "large for its dtype"
        )
    return scored

  def _batch(self, pairs: Mapping[int, Pair], T: int) -> PairBatch:
    """This process's rows of a batch of pairs by number; rows past them are padding."""
    B, C = self._batch_size, padded_len(max(len(p.scored) for p in pairs.values()), T)
    number_B = np.full(B, -1, np.int32)
    tokens_BT, segments_BT, position_BT = (np.zeros((B, T), np.int32) for _ in range(3))
    positions_BC, labels_BC = np.zeros((B, C), np.int32), np.full((B, C), -1, np.int32)
    position_BT[:] = np.arange(T)
    for row, (number, (given, scored)) in enumerate(pairs.items()):
      read = [*given, *scored][:-1]
      number_B[row] = number
      tokens_BT[row, : len(read)], segments_BT[row, : len(read)] = read, 1
      positions_BC[row, : len(scored)] = np.arange(len(given) - 1, len(read))
      labels_BC[row, : len(scored)] = scored
    arrays: Any = (tokens_BT, position_BT, segments_BT)  # of numpy, until to_device
    batch = PairBatch(number_B, Inputs(*arrays), positions_BC, labels_BC)
    return jax.tree.map(lambda x: x[jax.process_index() :: jax.process_count()], batch)
