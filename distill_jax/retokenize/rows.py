"""Rows of an embedding or head for a new vocabulary, as means of the old rows.

A token's row is the mean of the old rows of the tokens that spell it. This is the start of FVT
(Gee et al., 2022, arXiv:2402.09977), which needs neither text nor training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from distill_jax.cross_tokenizer.roles import match_roles
from distill_jax.cross_tokenizer.vocabulary import TURN_ENDS, Vocabulary
from distill_jax.errors import bad_value

# What the row of a new token is made from.
KINDS = (
  "equal",  # the old token with the same bytes
  "role",  # the old special token with the same role
  "tokens",  # the tokens into which the old tokenizer cuts the bytes
  "bytes",  # the longest old tokens that spell the bytes, which alone are not a text
  "rest",  # the mean of all old rows
)
EQUAL, ROLE, TOKENS, BYTES, REST = range(len(KINDS))
BLOCK = 2**22  # elements of the old rows that are gathered at a time


@dataclasses.dataclass(frozen=True)
class Spelling:
  """The old tokens that each new token's row is the mean of.

  Attributes:
    ids: int64, the old tokens of all new tokens, one new token after the other.
    starts: int64 [V + 1], the place in `ids` of each new token's first old token. A token of the
      kind "rest" has none.
    kinds: int8 [V], indices of KINDS.
    old_size: the number of tokens of the old vocabulary.
  """

  ids: np.ndarray
  starts: np.ndarray
  kinds: np.ndarray
  old_size: int

  def counts(self) -> dict[str, int]:
    """Returns the number of new tokens of each kind."""
    return {name: int((self.kinds == kind).sum()) for kind, name in enumerate(KINDS)}


def special_tokens(new: Vocabulary, old: Vocabulary, given: Mapping[str, str]) -> dict[int, int]:
  """Returns the old token of each new special token that has the same role.

  The roles are the end of a text, the end of a turn (an end of a text if the old tokenizer has no
  such token), the beginning of a text, and padding.

  Args:
    new: the new vocabulary.
    old: the old vocabulary.
    given: further pairs of a new and an old token, as texts (retokenize.roles).

  Raises:
    InputError: a given token is not in its vocabulary.
  """
  found = match_roles(new, old, {}) if old.end is not None else {}
  turn_ends = {
    v: sorted(i for i in v.stops if v.tokenizer.piece(i) in TURN_ENDS) for v in (new, old)
  }
  if turn_ends[old]:
    found |= dict.fromkeys(turn_ends[new], turn_ends[old][0])
  return found | {_id(new, a, given): _id(old, b, given) for a, b in given.items()}


def _id(vocabulary: Vocabulary, token: str, given: Mapping[str, str]) -> int:
  if (i := vocabulary.tokenizer.token_id(token)) is None:
    expected = f"tokens of the two tokenizers, but {vocabulary.tokenizer.where} has no {token!r}"
    raise bad_value("retokenize.roles", dict(given), expected, "Correct it")
  return i


def spell(new: Vocabulary, old: Vocabulary, roles: Mapping[int, int]) -> Spelling:
  """Spells every token of a new vocabulary in tokens of the old one.

  Args:
    new: the new vocabulary.
    old: the old vocabulary.
    roles: old tokens by the new special tokens that have their roles.
  """
  ids: list[int] = []
  starts = np.zeros(new.size + 1, np.int64)
  kinds = np.empty(new.size, np.int8)
  for i, text in enumerate(new.bytes_V):
    found, kinds[i] = ([roles[i]], ROLE) if i in roles else _old_tokens(text, old)
    ids += found
    starts[i + 1] = len(ids)
  return Spelling(np.array(ids, np.int64), starts, kinds, old.size)


def _old_tokens(text: bytes | None, old: Vocabulary) -> tuple[list[int], int]:
  """Returns the old tokens that spell some bytes, and the kind."""
  if not text:
    return [], REST
  if (same := old.id_of.get(text)) is not None:
    return [same], EQUAL
  try:
    ids = list(old.encode_inner(text.decode()))
  except UnicodeDecodeError:  # a part of a character
    ids = []
  if ids and all(old.bytes_V[i] for i in ids) and old.spell(ids) == text:
    return ids, TOKENS
  pieces = _longest_pieces(text, old)
  return (pieces, BYTES) if pieces else ([], REST)


def _longest_pieces(text: bytes, old: Vocabulary) -> list[int]:
  """Returns the longest old tokens from left to right; [] if they do not spell the bytes."""
  ids, at = [], 0
  while at < len(text):
    ends = range(min(len(text), at + old.longest), at, -1)
    end = next((end for end in ends if text[at:end] in old.id_of), None)
    if end is None:
      return []
    ids.append(old.id_of[text[at:end]])
    at = end
  return ids


def new_rows(old_VD: np.ndarray, spelling: Spelling, rows: int) -> np.ndarray:
  """Returns an embedding or head for the new vocabulary, in the dtype of the old one.

  Means are computed in float32, in which a row of one old token is an exact copy. In addition to
  the two tables, BLOCK elements of the old rows are in memory.

  Args:
    old_VD: the old table; rows after the old vocabulary are padding and are not used.
    spelling: the old tokens of each new token.
    rows: the number of rows of the new table; those after the new vocabulary are padding.
  """
  D, size = old_VD.shape[1], len(spelling.kinds)
  step = max(1, BLOCK // D)
  new_VD = np.empty((rows, D), old_VD.dtype)
  new_VD[:] = _mean(old_VD[: spelling.old_size], step).astype(old_VD.dtype)
  tokens = np.flatnonzero(spelling.kinds != REST)
  first, n = spelling.starts[tokens], np.diff(spelling.starts)[tokens]
  assert size <= rows and (n > 0).all()
  # Blocks of consecutive tokens with at most `step` old rows, or one token with more.
  block = (spelling.starts[tokens + 1] - 1) // step
  for at in np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(block)) + 1):
    if len(at):
      low, high = first[at[0]], spelling.starts[tokens[at[-1]] + 1]
      gathered = old_VD[spelling.ids[low:high]].astype(np.float32)
      sums = np.add.reduceat(gathered, first[at] - low, axis=0)
      new_VD[tokens[at]] = (sums / n[at, None].astype(np.float32)).astype(old_VD.dtype)
  return new_VD


def _mean(x_VD: np.ndarray, step: int) -> np.ndarray:
  """Returns the mean of all rows, summed in float64."""
  blocks = (x_VD[i : i + step].astype(np.float64).sum(0) for i in range(0, len(x_VD), step))
  return sum(blocks) / len(x_VD)
