"""The exact projection of a teacher's distributions to a student's vocabulary, on the devices.

It computes what `project.py` estimates from samples, from the teacher's whole distributions: one
chunk of student positions at a time, and of each the levels of its chain (`chains.py`) one after
the other. A level takes the logits of one teacher position, in the order of the tokens' bytes, so
that all tokens that lead to one student token are a few ranges of it, the pieces of a split. The
mass of a range is a difference of two cumulative sums. These are sums of integers, of 2^31 units
for the mass of the whole level, which float32 would round to 2^23: differences are exact, whatever
lies before the range, and the same on any mesh.

The largest arrays are [positions of a chunk, vocabulary]. Levels after the first are computed for
blocks of the positions that have them: of Python's documentation with the tokens of Qwen3 and Llama
3.1, 27% have a second level, 0.2% a third and none a fourth. The head then takes about 1.75 times
as long as for the teacher's own tokens.

In this module,

  X  student positions of a chunk
  V  the teacher's tokens in the order of their bytes, and rows of its head that are padding, last
  R  positions of a block
  S  the student's tokens
  P  the pieces of all splits
  L  levels of a chain
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from distill_jax.cross_tokenizer.chains import Splits
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.nn import mesh_in_use

UNITS = 2.0**31
BLOCK = 4096  # pieces that are looked up at once
BLOCKS = 4  # of the positions of a chunk, for levels after the first
SMALLEST = float(np.finfo(np.float32).tiny)  # probability whose logarithm is finite


class DenseTables(struct.PyTreeNode):
  """The tables of a pair of tokenizers on the devices.

  Attributes:
    order_V: int32, the teacher's tokens in the order of their bytes.
    phi_V: int32, the student token of each at a token boundary; the number of student tokens for
      none.
    open_V: bool, True where a longer student token begins with the bytes of one.
    first_S1: int32, the first piece of each split, and the number of pieces.
    start_P: int32, the first rank of each piece.
    end_P: int32, the rank after its last.
    token_P: int32, its student token.
    length_S: int32, the number of bytes of each student token.
  """

  order_V: np.ndarray | jax.Array
  phi_V: np.ndarray | jax.Array
  open_V: np.ndarray | jax.Array
  first_S1: np.ndarray | jax.Array
  start_P: np.ndarray | jax.Array
  end_P: np.ndarray | jax.Array
  token_P: np.ndarray | jax.Array
  length_S: np.ndarray | jax.Array

  @classmethod
  def of(cls, tables: PairTables, splits: Splits) -> Self:
    """Returns the tables of a pair, as numpy arrays."""
    phi_V = tables.phi_P[tables.offset_V[splits.order]]
    return cls(
      order_V=splits.order,
      phi_V=np.where(phi_V < 0, tables.student.size, phi_V).astype(np.int32),
      open_V=tables.state_V[splits.order] >= 0,
      first_S1=splits.first,
      start_P=np.append(splits.start, 0).astype(np.int32),  # indexing needs one piece
      end_P=np.append(splits.end, 0).astype(np.int32),
      token_P=np.append(splits.token, 0).astype(np.int32),
      length_S=tables.student.length_V.astype(np.int32),
    )

  def sort_head(self, head_VD: jax.Array) -> jax.Array:
    """Returns the rows of the teacher's head in the order of the tokens' bytes, padding last."""
    tokens = len(self.order_V)
    return jnp.concatenate([head_VD[self.order_V], head_VD[tokens:]])


class Links(struct.PyTreeNode):
  """The chains of student positions, int32 [..., L]; see chains.Chains for the meaning.

  Attributes:
    place: The position in the teacher's row of the token that the level's distribution predicts, so
      the distribution is that of the position before; 0 after the last level. Zeros in all fields
      are a position that is not trained on.
    real: See Chains.
    split: See Chains.
    base: See Chains.
    low: See Chains.
    high: See Chains.
  """

  place: jax.Array
  real: jax.Array
  split: jax.Array
  base: jax.Array
  low: jax.Array
  high: jax.Array


class Projected(NamedTuple):
  """The distributions of student positions.

  Attributes:
    p_XS: float32, the probabilities of the student's tokens.
    hard_X: bool, True where the label has probability 1, because the possible tokens have too
      little mass.
    lost_X: float32, the mass that reached no student token, before the rest was scaled to 1.
    unresolved_X: float32, the mass of the first level's tokens that a longer student token could
      have begun with. The distribution after them is not known, so phi gets it.
    opened_X: float32, the mass of the token in the text if the next distribution is read.
    beyond_X: float32, what student tokens that end after it get of that.
  """

  p_XS: jax.Array
  hard_X: jax.Array
  lost_X: jax.Array
  unresolved_X: jax.Array
  opened_X: jax.Array
  beyond_X: jax.Array


def project(
  logits: Callable[[jax.Array], jax.Array],
  hidden_LXD: jax.Array,
  links_LX: Links,
  labels_X: jax.Array,
  tables: DenseTables,
  min_mass: float,
) -> Projected:
  """Returns the distributions of some student positions.

  Args:
    logits: Returns the teacher's logits [R, V] for its hidden states [R, D], float32, in the order
      of `DenseTables.sort_head`; -inf in rows that are padding.
    hidden_LXD: The teacher's hidden states at the levels' positions.
    links_LX: The chains, with the level first.
    labels_X: int32, the student's labels.
    tables: The tables.
    min_mass: Positions inside a teacher token get their label as target where the tokens that are
      possible have less mass.
  """
  tables = jax.tree.map(jnp.asarray, tables)
  first = jax.tree.map(lambda x: x[0], links_LX)
  others_XV, real_X = _others(logits(hidden_LXD[0]), first.real)
  inside_X = first.split >= 0
  others_XV = jnp.where(_between(others_XV, first), others_XV, 0.0)
  mass_X = jnp.where(inside_X, real_X + jnp.sum(others_XV, -1), 1.0)
  scale_X = jnp.where(first.place > 0, 1 / jnp.maximum(mass_X, SMALLEST), 0.0)
  target_XS = _segment_sum(jnp.where(inside_X[:, None], 0.0, others_XV), tables)
  open_1V = tables.open_V[None]
  open_X = jnp.sum(jnp.where(open_1V, others_XV[:, : open_1V.shape[-1]], 0.0), -1)
  alone = first.replace(low=jnp.zeros_like(first.low), high=jnp.zeros_like(first.high))
  x_X = jnp.arange(len(labels_X))
  target_XS, _ = _split(target_XS, x_X, others_XV, scale_X, alone, labels_X, tables)

  def read(carry: tuple[jax.Array, ...], level: tuple[jax.Array, Links]):
    """Reads a level of the positions that have it, in blocks."""
    hidden_XD, link = level
    has_X = link.place > 0
    size, count = -(-len(x_X) // BLOCKS), jnp.sum(has_X)
    order = jnp.pad(jnp.argsort(~has_X), (0, -len(x_X) % size))

    def add(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      i, target_XS, left_X, beyond_X = state
      x_R = jax.lax.dynamic_slice_in_dim(order, i * size, size)
      is_read_R = i * size + jnp.arange(size) < count
      hidden_RD, link_R, labels_R = jax.tree.map(lambda x: x[x_R], (hidden_XD, link, labels_X))
      others_RV, real_R = _others(logits(hidden_RD), link_R.real)
      weight_R = jnp.where(is_read_R, left_X[x_R], 0.0)
      target_XS, past_R = _split(target_XS, x_R, others_RV, weight_R, link_R, labels_R, tables)
      left_X = left_X.at[x_R].multiply(jnp.where(is_read_R, real_R, 1.0))
      return i + 1, target_XS, left_X, beyond_X.at[x_R].add(past_R)

    blocks = _most(-(-count // size))
    begin = (jnp.zeros((), jnp.int32), *carry)
    return jax.lax.while_loop(lambda state: state[0] < blocks, add, begin)[1:], None

  rest = jax.tree.map(lambda x: x[1:], links_LX)
  begun_X = real_X * scale_X
  carry = target_XS, begun_X, jnp.zeros_like(begun_X)
  (target_XS, left_X, beyond_X), _ = jax.lax.scan(read, carry, (hidden_LXD[1:], rest))
  target_XS = target_XS.at[x_X, labels_X].add(jnp.maximum(left_X, SMALLEST))
  total_X = jnp.sum(target_XS, -1)
  hard_X = (first.place <= 0) | (mass_X < min_mass)
  label_XS = jax.nn.one_hot(labels_X, target_XS.shape[-1], dtype=jnp.float32)
  p_XS = jnp.where(hard_X[:, None], label_XS, target_XS / total_X[:, None])
  goes_on_X, longer_X = rest.place[0] > 0, rest.base[0] != labels_X
  masses = (
    jnp.maximum(1 - total_X, 0.0),
    jnp.where(inside_X, 0.0, open_X),
    jnp.where(goes_on_X, begun_X, 0.0),
    beyond_X + jnp.where(goes_on_X & longer_X, left_X, 0.0),
  )
  return Projected(p_XS, hard_X, *(jnp.where(hard_X, 0.0, x) for x in masses))


def _most(n: jax.Array) -> jax.Array:
  """Returns the maximum over the devices, so that they all run a loop as often.

  The logits, and what the partitioner makes of a sharded vocabulary, are collectives in it.
  """
  axes = mesh_in_use.manual_axes()
  return jax.lax.pmax(n, axes) if axes else n


def _others(logits_XV: jax.Array, real_X: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the probabilities of the tokens that are not in the text, and of the one that is."""
  p_XV = jax.nn.softmax(logits_XV)
  is_real = jnp.arange(p_XV.shape[-1])[None] == real_X[:, None]
  at_real_X = jnp.take_along_axis(p_XV, real_X[:, None], -1)[:, 0]
  return jnp.where(is_real, 0.0, p_XV), at_real_X


def _between(x_XV: jax.Array, link: Links) -> jax.Array:
  rank_1V = jnp.arange(x_XV.shape[-1])[None]
  return (rank_1V >= link.low[:, None]) & (rank_1V < link.high[:, None])


def _segment_sum(p_XV: jax.Array, tables: DenseTables) -> jax.Array:
  """Returns the mass of each student token at a token boundary, [X, S]."""
  tokens, students = len(tables.phi_V), len(tables.length_S)
  zero_SX = jnp.zeros((students, len(p_XV)), jnp.float32)
  return zero_SX.at[tables.phi_V].add(p_XV[:, :tokens].T, mode="drop").T


def _split(
  target_XS: jax.Array,
  x_R: jax.Array,
  others_RV: jax.Array,
  weight_R: jax.Array,
  link: Links,
  labels_R: jax.Array,
  tables: DenseTables,
) -> tuple[jax.Array, jax.Array]:
  """Adds a weight times the mass of a level's other tokens to the student tokens that they lead to.

  Rows of the other arrays are the positions x_R. The pieces of all of them are one list, of which
  BLOCK are looked up at once. So the work is that of the pieces there are; a state has a few on
  average, and up to thousands.

  Returns:
    The sums [X, S], and what the pieces and the range of the label got, [R].
  """
  students = len(tables.length_S)
  mass_R = jnp.sum(others_RV, -1)
  share_RV = others_RV / jnp.maximum(mass_R, SMALLEST)[:, None] * UNITS
  ends_RV = jnp.cumsum((share_RV + 0.5).astype(jnp.uint32), -1, dtype=jnp.uint32)
  total_R = ends_RV[:, -1]
  unit_R = weight_R * mass_R / jnp.maximum(total_R, 1).astype(jnp.float32)

  def before(r: jax.Array, rank: jax.Array) -> jax.Array:
    """Returns the units of the tokens before a rank."""
    return jnp.where(rank > 0, ends_RV[r, jnp.maximum(rank - 1, 0)], 0)

  has = (link.split >= 0) & (weight_R > 0)
  first_R = tables.first_S1[jnp.maximum(link.split, 0)]
  pieces_R = jnp.where(has, tables.first_S1[jnp.maximum(link.split, 0) + 1] - first_R, 0)
  ends_R = jnp.cumsum(pieces_R)
  count, block = ends_R[-1], min(BLOCK, 64 * len(labels_R))
  most = _most(count)
  length_R = tables.length_S[labels_R]

  def add(carry):
    """Adds the mass of some pieces. Those that are shorter than the label keep what it leaves."""
    at, target_XS, kept_R, label_R = carry
    n = at + jnp.arange(block, dtype=jnp.int32)
    r = jnp.minimum(jnp.searchsorted(ends_R, n, side="right"), len(ends_R) - 1).astype(jnp.int32)
    piece = jnp.where(n < count, first_R[r] + n - ends_R[r] + pieces_R[r], 0)
    start, end, token = (table[piece] for table in (tables.start_P, tables.end_P, tables.token_P))
    mass = before(r, end) - before(r, start)
    low, high = link.low[r], link.high[r]
    inner = before(r, jnp.clip(end, low, high)) - before(r, jnp.clip(start, low, high))
    longer = tables.length_S[token] >= length_R[r]
    mass = jnp.where(n < count, jnp.where(longer, mass, mass - inner), 0)
    inner = jnp.where((n < count) & longer, inner, 0)
    target_XS = target_XS.at[x_R[r], token].add(mass.astype(jnp.float32) * unit_R[r])
    return at + block, target_XS, kept_R.at[r].add(mass), label_R.at[r].add(-inner)

  r_R = jnp.arange(len(labels_R))
  label_R = before(r_R, link.high) - before(r_R, link.low)
  carry = (jnp.zeros((), jnp.int32), target_XS, jnp.zeros_like(total_R), label_R)
  _, target_XS, kept_R, label_R = jax.lax.while_loop(lambda c: c[0] < most, add, carry)
  target_XS = target_XS.at[x_R, labels_R].add(label_R.astype(jnp.float32) * unit_R)
  base_R = jnp.where(link.base < 0, students, link.base)
  past_R = kept_R + label_R
  rest_R = (total_R - past_R).astype(jnp.float32) * unit_R
  target_XS = target_XS.at[x_R, base_R].add(rest_R, mode="drop")
  return target_XS, past_R.astype(jnp.float32) * unit_R
