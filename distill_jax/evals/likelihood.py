"""How likely a model finds what follows a text, and whether greedy decoding says the same."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.models import loading
from distill_jax.nn import sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.records import sampler
from distill_jax.records.collate import to_device
from distill_jax.runtime.progress import Progress
from distill_jax.types import Inputs, Output

SHORTEST = 32  # rows are filled up to one of few lengths, from this one on


class Pair(NamedTuple):
  """A text in tokens: what is given, at least one, and what is scored, at least one."""

  given: list[int]
  scored: list[int]


class Scored(NamedTuple):
  logp: float  # nats, in all
  greedy: bool  # each token is the likeliest


class Rows(NamedTuple):
  """Rows of a batch; `at_BC` are the positions that say the labels, which are -1 where none is."""

  number_B: Any  # of the pair
  inputs: Any
  at_BC: Any
  labels_BC: Any


def pair(tokenizer: Tokenizer, given: str, scored: str) -> Pair:
  """The tokens of `given + scored`, and which of them are scored.

  As in lm-evaluation-harness, so that numbers compare: the whole text is cut into tokens, after
  what the tokenizer puts first; spaces that `given` ends with belong to what is scored; and as
  many tokens are given as `given` has alone. Where nothing is, a text's beginning (or a
  document's end) is.
  """
  end = len(given.rstrip())
  given, scored = given[:end], given[end:] + scored
  n = len(begun(tokenizer, tokenizer.encode(given)) if given else prefix(tokenizer))
  ids = tokenizer.encode(given + scored)
  whole = begun(tokenizer, ids) if given else [*prefix(tokenizer), *ids]
  if len(whole) <= n:
    raise InputError("there is nothing to score: no token of the text is of its second part")
  return Pair(whole[:n], whole[n:])


def begun(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
  """With what the tokenizer puts first, where a chat template has not written it."""
  first = tokenizer.begin
  return ids if ids[: len(first)] == first else [*first, *ids]


def prefix(tokenizer: Tokenizer) -> list[int]:
  """What a text that follows nothing is scored after: its beginning, else another's end.

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


def length(n: int, longest: int) -> int:
  """The least of 32, 48, 64, 96, 128, … that is at least n; or `longest`."""
  power = 1 << max(n - 1, SHORTEST - 1).bit_length()
  return min(3 * power // 4 if n <= 3 * power // 4 and power > SHORTEST else power, longest)


def score(
  model: Any, rows: Rows, *, compute: ComputeConfig, chunk: int, vocab_size: int
) -> dict[str, Any]:
  """Of each row: number int32 [B], logp float32 [B] in nats, greedy bool [B].

  The head reads only the positions that say a label.
  """
  out: Output = model(rows.inputs, compute)
  hidden_BCD = jnp.take_along_axis(out.hidden_BTD, rows.at_BC[..., None], axis=1)
  said = sampler.summarise(
    hidden_BCD,
    out.head_VD,
    jnp.maximum(rows.labels_BC, 0),
    None,
    n=1,
    kind="topk",
    chunk=chunk,
    vocab_size=vocab_size,
    soft_cap=out.soft_cap,
  )
  none_BC = rows.labels_BC < 0
  logp_BC = jnp.where(none_BC, 0.0, said["label_logp"])
  greedy_BC = none_BC | (said["argmax"] == rows.labels_BC)
  return {"number": rows.number_B, "logp": logp_BC.sum(-1), "greedy": greedy_BC.all(-1)}


class Scorer:
  """Scores pairs with a model, `batch_size` rows at a time, on its mesh.

  Args:
    tokenizer: the model's; rows of the head past its tokens are padding.
    chunk: positions of each row whose logits exist at once.
  """

  def __init__(
    self,
    built: loading.LoadedModel,
    mesh: jax.sharding.Mesh,
    tokenizer: Tokenizer,
    batch_size: int,
    chunk: int,
  ):
    sharding.check_batch("evaluate.batch_size", batch_size, mesh)
    rows, vocab_size = built.config.vocab_size, tokenizer.vocab_size
    if vocab_size > rows:
      raise InputError(
        f"{tokenizer.where} has {vocab_size} tokens and the model's embedding {rows} rows; take "
        "the tokenizer that belongs to these weights"
      )
    self.longest: int = built.config.max_position_embeddings
    self._model, self._mesh, self._size = built.model, mesh, batch_size
    self._score = jax.jit(
      functools.partial(score, compute=built.compute, chunk=chunk, vocab_size=vocab_size),
      out_shardings=sharding.replicated(mesh),
    )

  def reads(self, of: Pair) -> bool:
    """Whether the model reads all that it has to: all but the last token."""
    return len(of.given) + len(of.scored) - 1 <= self.longest

  def __call__(self, pairs: Sequence[Pair]) -> list[Scored]:
    """In the order of the pairs, all of which the model `reads`.

    Raises:
      FloatingPointError: a log-probability is no number.
    """
    cut = lambda i: length(len(pairs[i].given) + len(pairs[i].scored) - 1, self.longest)
    order = sorted(range(len(pairs)), key=lambda i: (-cut(i), -len(pairs[i].scored)))
    scored: list[Scored] = [Scored(0.0, False)] * len(pairs)
    where = sharding.batch_sharding(self._mesh)
    with jax.set_mesh(self._mesh), Progress("score", len(pairs), "texts") as progress:
      for first in range(0, len(order), self._size):
        some = order[first : first + self._size]
        rows = self._rows([(i, pairs[i]) for i in some], cut(some[0]))
        said = jax.device_get(self._score(self._model, to_device(rows, where)))
        for i, logp, greedy in zip(said["number"], said["logp"], said["greedy"], strict=True):
          if i >= 0:
            scored[i] = Scored(float(logp), bool(greedy))
        progress.add(len(some))
    for i, s in enumerate(scored):
      if not np.isfinite(s.logp):
        raise FloatingPointError(
          f"the log-probability of text {i} is {s.logp}; the model's weights are damaged, or too "
          "large for its dtype"
        )
    return scored

  def _rows(self, some: list[tuple[int, Pair]], T: int) -> Rows:
    """This process's rows of a batch, those that are left over empty."""
    B, C = self._size, length(max(len(p.scored) for _, p in some), T)
    number_B = np.full(B, -1, np.int32)
    tokens_BT, segments_BT, positions_BT = (np.zeros((B, T), np.int32) for _ in range(3))
    at_BC, labels_BC = np.zeros((B, C), np.int32), np.full((B, C), -1, np.int32)
    positions_BT[:] = np.arange(T)
    for row, (i, (given, scored)) in enumerate(some):
      read = [*given, *scored][:-1]
      number_B[row] = i
      tokens_BT[row, : len(read)], segments_BT[row, : len(read)] = read, 1
      at_BC[row, : len(scored)] = np.arange(len(given) - 1, len(read))
      labels_BC[row, : len(scored)] = scored
    read_BT: Any = (tokens_BT, positions_BT, segments_BT)  # numpy until to_device
    rows = Rows(number_B, Inputs(*read_BT), at_BC, labels_BC)
    return jax.tree.map(lambda x: x[jax.process_index() :: jax.process_count()], rows)
