"""What a teacher's logits are cut down to, on the device, a chunk of positions at a time.

Systematic sampling in token-id order: with N points and one uniform offset u a position,
point j is (u + j)/N, and the token stored for it is the one whose interval of the
cumulative sum of p contains it. Its count over N is an unbiased estimate of p, off by less
than 1/N for every token (Madow 1949). No sort, no top-k.

The cumulative sum is never taken over the whole vocabulary. It is taken over the sums of
blocks of 256 tokens, then over 16 sums of 16 inside the block of each point, then over 16
tokens: what is touched once an id is V/256 + 32 numbers a point instead of V.

Over a vocabulary sharded on a mesh axis, each shard knows the mass before it
from one all-gather of a float a shard and position; the shard that holds a point's token
names it and one all-reduce of N integers a position tells the rest.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from distill_jax.errors import InputError
from distill_jax.nn import fused_head, sharding
from distill_jax.records.options import RecordsOptions

FINE, BLOCK = 16, 256  # BLOCK = FINE * FINE
TOP_BLOCK = 64
KINDS = ("sampled", "topk", "dense")


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
  """What the logits of a position are reduced to.

  Attributes:
    kind: "sampled" (n points), "topk" (the n likeliest) or "dense" (all).
    n: points or entries a position; not used for "dense".
    logp: for "sampled", true log-probabilities of the ids as well.
    temperature: every output describes softmax(logits / temperature).
    nucleus: for "topk", entries past the fewest that hold this mass get logp -inf.
    vocab_size: rows of the head from here on are padding: no mass, never an id; None: no
      row is.
  """

  n: int = 1
  kind: str = "sampled"
  logp: bool = False
  temperature: float = 1.0
  nucleus: float = 1.0
  vocab_size: int | None = None

  @classmethod
  def of(cls, options: RecordsOptions, vocab_size: int) -> SamplerSpec:
    """What `records` of a config asks for, of so many classes."""
    c = options
    return cls(c.n, c.kind, c.logp, c.temperature, c.nucleus, vocab_size)

  def check(self, rows: int, with_offsets: bool) -> SamplerSpec:
    """Returns the spec for a head of so many rows, its sizes filled in.

    Raises:
      InputError: the kind is unknown, offsets are missing, or n is over the vocabulary.
    """
    vocab_size = rows if self.vocab_size is None else self.vocab_size
    n = vocab_size if self.kind == "dense" else self.n
    if self.kind not in KINDS:
      raise InputError(f"records kind {self.kind!r} has no sampler; the kinds here are {KINDS}")
    if self.kind == "sampled" and not with_offsets:
      raise InputError("kind 'sampled' found no u_BT; give one uniform offset a position")
    if n < 1 or (self.kind != "sampled" and n > vocab_size) or not 0 < vocab_size <= rows:
      raise InputError(
        f"n={n} and vocab_size={vocab_size} over a head of {rows} rows: n is from 1 (to the "
        "vocabulary for topk), vocab_size from 1 to the rows"
      )
    return dataclasses.replace(self, n=n, vocab_size=vocab_size)


def systematic(
  logits_BCV: jax.Array, u_BC: jax.Array, n: int, *, axis: str | None = None
) -> jax.Array:
  """The tokens of n equally spaced points of the cumulative sum of softmax(logits).

  Args:
    logits_BCV: float32; -inf is a token that is never drawn.
    u_BC: float32 offsets in [0, 1).
    n: points a position.
    axis: inside shard_map, the mesh axis that V is sharded over.

  Returns:
    int32 [B, C, n] ids, nondecreasing along n. An id without mass is never returned.
  """
  peak_BC = _max(jnp.max(logits_BCV, -1), axis)
  return _points(jnp.exp(logits_BCV - peak_BC[..., None]), u_BC, n, axis)


def top_k(logits_BCV: jax.Array, k: int, *, axis: str | None = None) -> tuple[jax.Array, jax.Array]:
  """The k largest logits and their ids: float32 and int32 [B, C, k], largest first."""
  width = logits_BCV.shape[-1]
  top, ids = _local_top_k(logits_BCV, min(k, width))
  if axis is not None:
    ids = ids + jax.lax.axis_index(axis) * width
    top, ids = (jax.lax.all_gather(x, axis, axis=2, tiled=True) for x in (top, ids))
    top, at = jax.lax.top_k(top, k)
    ids = jnp.take_along_axis(ids, at, -1)
  return top, ids.astype(jnp.int32)


def _local_top_k(x_BCV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """`lax.top_k`, ties and all: the k largest lie in the k blocks of the largest maxima."""
  width = x_BCV.shape[-1]
  if width < 4 * k * TOP_BLOCK:
    return jax.lax.top_k(x_BCV, k)
  x_BCV = jnp.pad(x_BCV, ((0, 0), (0, 0), (0, -width % TOP_BLOCK)), constant_values=-jnp.inf)
  x_BCbt = x_BCV.reshape(*x_BCV.shape[:2], -1, TOP_BLOCK)
  _, blocks_BCk = jax.lax.top_k(jnp.max(x_BCbt, -1), k)
  blocks_BCk = jnp.sort(blocks_BCk, -1)  # of equal logits the lowest id is taken
  few_BCkt = _rows(x_BCbt, blocks_BCk)
  top, at = jax.lax.top_k(few_BCkt.reshape(*few_BCkt.shape[:2], -1), k)
  block = jnp.take_along_axis(blocks_BCk, at // TOP_BLOCK, -1)
  return top, block * TOP_BLOCK + at % TOP_BLOCK


def summarise(
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  labels_BT: jax.Array,
  u_BT: jax.Array | None,
  spec: SamplerSpec,
  *,
  chunk: int,
  soft_cap: float | None = None,
  batch_axes: tuple[str, ...] = sharding.BATCH,
  vocab_axis: str = "tensor",
) -> dict[str, jax.Array]:
  """What is recorded of a teacher, without ever holding [B, T, V] logits.

  Under a mesh B is sharded over `batch_axes` and V over `vocab_axis`, which they must divide.

  Args:
    hidden_BTD: after the final norm.
    head_VD: logits = hidden @ head.T, in the head's dtype with float32 sums.
    labels_BT: int32 ids whose log-probability is recorded (any id where there is none).
    u_BT: float32 offsets in [0, 1), for kind "sampled".
    spec: what is recorded.
    chunk: positions whose logits exist at once; need not divide T.
    soft_cap: of the logits, before the temperature.
    batch_axes, vocab_axis: names of the mesh's axes.

  Returns:
    ids int32 [B, T, n] (nondecreasing if sampled, likeliest first otherwise), logp float32
    [B, T, n] (not of "sampled" unless asked for), entropy and label_logp float32 [B, T] in
    nats, argmax int32 [B, T].

  Raises:
    InputError: the kind is unknown, u_BT is missing, or n is over the vocabulary (topk).
  """
  spec = spec.check(head_VD.shape[0], u_BT is not None)
  T = hidden_BTD.shape[1]
  chunk = min(chunk, T)
  if u_BT is None:
    u_BT = jnp.zeros(labels_BT.shape, jnp.float32)

  def scan(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    labels_BT: jax.Array,
    u_BT: jax.Array,
    axis: str | None = None,
  ) -> dict[str, jax.Array]:
    def body(_: None, chunks: tuple[jax.Array, ...]) -> tuple[None, dict[str, jax.Array]]:
      hidden_BCD, labels_BC, u_BC = chunks
      logits_BCV = jnp.einsum(
        "BCD,VD->BCV",
        hidden_BCD.astype(head_VD.dtype),
        head_VD,
        preferred_element_type=jnp.float32,
      )
      logits_BCV = fused_head.soft_cap(logits_BCV, soft_cap)
      return None, _of_logits(logits_BCV, labels_BC, u_BC, spec, axis)

    chunks = jax.tree.map(lambda x: _split(x, chunk), (hidden_BTD, labels_BT, u_BT))
    _, out = jax.lax.scan(body, None, chunks)
    return jax.tree.map(lambda x: _join(x)[:, :T], out)

  with jax.named_scope("summarise"):
    if jax.sharding.get_abstract_mesh().empty:
      return scan(hidden_BTD, head_VD, labels_BT, u_BT)
    batch, vocab = PartitionSpec(batch_axes), PartitionSpec(vocab_axis)
    return jax.shard_map(
      functools.partial(scan, axis=vocab_axis),
      in_specs=(batch, vocab, batch, batch),
      out_specs=batch,
      check_vma=False,
    )(hidden_BTD, head_VD, labels_BT, u_BT)


def of_logits(
  logits_BCV: jax.Array,
  labels_BC: jax.Array,
  u_BC: jax.Array,
  spec: SamplerSpec,
  *,
  batch_axes: tuple[str, ...] = sharding.BATCH,
  vocab_axis: str = "tensor",
) -> dict[str, jax.Array]:
  """`summarise` of logits that are there already, float32 [B, C, V], capped but not scaled."""
  spec = spec.check(logits_BCV.shape[-1], with_offsets=True)
  if jax.sharding.get_abstract_mesh().empty:
    return _of_logits(logits_BCV, labels_BC, u_BC, spec, None)
  rows, vocab = PartitionSpec(batch_axes), PartitionSpec(batch_axes, None, vocab_axis)
  return jax.shard_map(
    functools.partial(_of_logits, spec=spec, axis=vocab_axis),
    in_specs=(vocab, rows, rows),
    out_specs=rows,
    check_vma=False,
  )(logits_BCV, labels_BC, u_BC)


def _of_logits(
  logits_BCV: jax.Array,
  labels_BC: jax.Array,
  u_BC: jax.Array,
  spec: SamplerSpec,
  axis: str | None,
) -> dict[str, jax.Array]:
  """What is recorded of the logits of one chunk, of this shard of the vocabulary."""
  dist = _Distribution.of(logits_BCV, spec, axis)
  out = {
    "entropy": dist.entropy_BC(),
    "label_logp": dist.logp(labels_BC[..., None])[..., 0],
    "argmax": dist.argmax_BC,
  }
  return out | (_sampled_ids(dist, u_BC, spec) if spec.kind == "sampled" else _topk_ids(dist, spec))


def _sampled_ids(dist: _Distribution, u_BC: jax.Array, spec: SamplerSpec) -> dict[str, jax.Array]:
  ids_BCN = _points(dist.e_BCV, u_BC, spec.n, dist.axis)
  return {"ids": ids_BCN} | ({"logp": dist.logp(ids_BCN)} if spec.logp else {})


def _topk_ids(dist: _Distribution, spec: SamplerSpec) -> dict[str, jax.Array]:
  top_BCN, ids_BCN = top_k(dist.z_BCV, spec.n, axis=dist.axis)
  logp_BCN = top_BCN - dist.log_mass_BC[..., None]
  if spec.kind == "topk" and spec.nucleus < 1:
    p_BCN = jnp.exp(logp_BCN)
    inside_BCN = jnp.cumsum(p_BCN, -1) - p_BCN < spec.nucleus  # the mass before an entry
    logp_BCN = jnp.where(inside_BCN, logp_BCN, -jnp.inf)
  return {"ids": ids_BCN, "logp": logp_BCN}


class _Distribution(NamedTuple):
  """softmax of the logits of one chunk, of this shard of the vocabulary.

  Attributes:
    z_BCV: logits less the largest one of all shards.
    e_BCV: exp(z).
    mass_BC: the sum of e over all shards, and its logarithm.
    argmax_BC: int32 global id.
    first: global id of this shard's first row.
    axis: the mesh axis that V is sharded over, inside shard_map.
  """

  z_BCV: jax.Array
  e_BCV: jax.Array
  mass_BC: jax.Array
  log_mass_BC: jax.Array
  argmax_BC: jax.Array
  first: jax.Array | int
  axis: str | None

  @classmethod
  def of(cls, logits_BCV: jax.Array, spec: SamplerSpec, axis: str | None) -> _Distribution:
    scale = 1.0 / spec.temperature
    logits_BCV = logits_BCV * scale if scale != 1.0 else logits_BCV
    width = logits_BCV.shape[-1]
    first = 0 if axis is None else jax.lax.axis_index(axis) * width
    ids_11V = first + jnp.arange(width, dtype=jnp.int32)[None, None]
    rows = width * (1 if axis is None else jax.lax.axis_size(axis))
    if spec.vocab_size is not None and spec.vocab_size < rows:
      logits_BCV = jnp.where(ids_11V < spec.vocab_size, logits_BCV, -jnp.inf)
    peak_BC, argmax_BC = _argmax(logits_BCV, axis)
    z_BCV = logits_BCV - peak_BC[..., None]
    e_BCV = jnp.exp(z_BCV)
    mass_BC = _sum(jnp.sum(_groups(e_BCV, 0.0), (-1, -2)), axis)
    return cls(z_BCV, e_BCV, mass_BC, jnp.log(mass_BC), argmax_BC, first, axis)

  def entropy_BC(self) -> jax.Array:
    dot_BC = jnp.sum(jnp.where(self.e_BCV > 0, self.e_BCV * self.z_BCV, 0.0), -1)
    return self.log_mass_BC - _sum(dot_BC, self.axis) / self.mass_BC

  def logp(self, ids_BCN: jax.Array) -> jax.Array:
    """Log-probabilities of global ids."""
    width = self.z_BCV.shape[-1]
    mine_BCN = (ids_BCN >= self.first) & (ids_BCN < self.first + width)
    local_BCN = jnp.where(mine_BCN, ids_BCN - self.first, 0)
    z_BCN = jnp.take_along_axis(self.z_BCV, local_BCN, -1)
    return _sum(jnp.where(mine_BCN, z_BCN, 0.0), self.axis) - self.log_mass_BC[..., None]


def argmax(logits_BCV: jax.Array) -> jax.Array:
  """The likeliest tokens, the first of equals: int32 [B, C]."""
  return _argmax(logits_BCV, None)[1]


def _argmax(logits_BCV: jax.Array, axis: str | None) -> tuple[jax.Array, jax.Array]:
  """The largest logit and the lowest of the ids that have it, in one pass over V.

  jnp.argmax is ten times slower on a CPU than a maximum, so: maxima of groups, then the
  first group with the largest, then the first place in it.
  """
  x_BCgf = _groups(logits_BCV, -jnp.inf)
  top_BCg = jnp.max(x_BCgf, -1)
  peak_BC = _max(jnp.max(top_BCg, -1), axis)
  first_equal = lambda x: jnp.argmax(x == peak_BC[..., None], -1).astype(jnp.int32)
  group_BC = first_equal(top_BCg)
  id_BC = group_BC * FINE + first_equal(_rows(x_BCgf, group_BC[..., None])[..., 0, :])
  if axis is not None:
    id_BC = id_BC + jax.lax.axis_index(axis) * logits_BCV.shape[-1]
    mine = jnp.max(top_BCg, -1) == peak_BC
    id_BC = jax.lax.pmin(jnp.where(mine, id_BC, jnp.iinfo(jnp.int32).max), axis)
  return peak_BC, id_BC


def _groups(x_BCV: jax.Array, fill: float) -> jax.Array:
  """[B, C, V / FINE, FINE], padded to whole blocks."""
  pad = ((0, 0), (0, 0), (0, -x_BCV.shape[-1] % BLOCK))
  x = jnp.pad(x_BCV, pad, constant_values=fill)
  return x.reshape(*x.shape[:2], -1, FINE)


def _points(e_BCV: jax.Array, u_BC: jax.Array, n: int, axis: str | None) -> jax.Array:
  """`systematic`, on unnormalised probabilities."""
  width = e_BCV.shape[-1]
  e_BCgf = _groups(e_BCV, 0.0)  # g: groups of FINE tokens
  group_BCg = jnp.sum(e_BCgf, -1)
  group_BCbf = group_BCg.reshape(*group_BCg.shape[:2], -1, FINE)
  block_BCb = jnp.cumsum(jnp.sum(group_BCbf, -1), -1)

  shard: Any = 0
  shards = 1
  before_BC, mass_BC = jnp.zeros_like(block_BCb[..., -1]), block_BCb[..., -1]
  if axis is not None:
    shard, shards = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    ends_BCs = jnp.cumsum(jax.lax.all_gather(mass_BC, axis, axis=2), -1)
    mass_BC = ends_BCs[..., -1]
    before_BC = jnp.where(shard > 0, ends_BCs[..., shard - 1], 0.0)
  j_11N = jnp.arange(n, dtype=jnp.float32)[None, None]
  x_BCN = (u_BC[..., None] + j_11N) / n * mass_BC[..., None]
  if shards > 1:
    owner_BCN, _ = _locate(ends_BCs[:, :, None, :], x_BCN)
  x_BCN = jnp.maximum(x_BCN - before_BC[..., None], 0.0)

  b_BCN, x_BCN = _locate(block_BCb[:, :, None, :], x_BCN)
  g_BCN, x_BCN = _locate(jnp.cumsum(_rows(group_BCbf, b_BCN), -1), x_BCN)
  g_BCN = b_BCN * FINE + g_BCN
  f_BCN, _ = _locate(jnp.cumsum(_rows(e_BCgf, g_BCN), -1), x_BCN)
  ids_BCN = (shard * width + g_BCN * FINE + f_BCN).astype(jnp.int32)
  if shards > 1:
    ids_BCN = jax.lax.psum(jnp.where(owner_BCN == shard, ids_BCN, 0), axis)
  return ids_BCN


def _locate(ends: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The interval that holds x, of those that end at `ends` [..., M], and how far in.

  An end equal to the last one is not passed: rounding may put x past the whole, and what
  follows the last mass is empty.
  """
  passed = (ends <= x[..., None]) & (ends < ends[..., -1:])
  start = jnp.max(jnp.where(passed, ends, 0.0), -1)  # ends are nondecreasing
  return jnp.sum(passed, -1, dtype=jnp.int32), x - start


def _rows(table_BCrf: jax.Array, rows_BCN: jax.Array) -> jax.Array:
  return jnp.take_along_axis(table_BCrf, rows_BCN[..., None], 2)


def _max(x: jax.Array, axis: str | None) -> jax.Array:
  return x if axis is None else jax.lax.pmax(x, axis)


def _sum(x: jax.Array, axis: str | None) -> jax.Array:
  return x if axis is None else jax.lax.psum(x, axis)


def _split(x_BT: jax.Array, chunk: int) -> jax.Array:
  """[B, T, ...] to [chunks, B, chunk, ...], zeros after the end."""
  pad = [(0, 0)] * x_BT.ndim
  pad[1] = (0, -x_BT.shape[1] % chunk)
  x = jnp.pad(x_BT, pad)
  return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _join(x_nBC: jax.Array) -> jax.Array:
  x = jnp.moveaxis(x_nBC, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])
