"""What a teacher's logits are cut down to, on the device, a chunk of positions at a time.

Systematic sampling in token-id order: with N points and one uniform offset u a position,
point j is (u + j)/N, and the token stored for it is the one whose interval of the
cumulative sum of p contains it. Its count over N is an unbiased estimate of p, off by less
than 1/N for every token (Madow 1949). No sort, no top-k.

The cumulative sum is never taken over the whole vocabulary. It is taken over the sums of
blocks of 256 tokens, then over 16 sums of 16 inside the block of each point, then over 16
tokens: what is touched once an id is V/256 + 32 numbers a point instead of V.

Over a vocabulary sharded on the mesh axis `tensor`, each shard knows the mass before it
from one all-gather of a float a shard and position; the shard that holds a point's token
names it and one all-reduce of N integers a position tells the rest.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from distill_jax.errors import InputError
from distill_jax.nn import fused_head, sharding

FINE, BLOCK = 16, 256  # BLOCK = FINE * FINE
TOP_BLOCK = 64
KINDS = ("sampled", "topk")


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
  *,
  n: int,
  chunk: int,
  vocab_size: int | None = None,
  kind: str = "sampled",
  logp: bool = False,
  temperature: float = 1.0,
  nucleus: float = 1.0,
  soft_cap: float | None = None,
) -> dict[str, jax.Array]:
  """What is recorded of a teacher, without ever holding [B, T, V] logits.

  Under a mesh with axes (data, fsdp, tensor) B is sharded over data and fsdp and V over
  tensor, which they must divide.

  Args:
    hidden_BTD: after the final norm.
    head_VD: logits = hidden @ head.T, in the head's dtype with float32 sums.
    labels_BT: int32 ids whose log-probability is recorded (any id where there is none).
    u_BT: float32 offsets in [0, 1), for kind "sampled".
    n: points (kind "sampled") or entries (kind "topk") a position.
    chunk: positions whose logits exist at once; need not divide T.
    vocab_size: rows of the head from here on are padding: no mass, never an id.
    kind: "sampled" or "topk".
    logp: for "sampled", true log-probabilities of the ids as well.
    temperature: every output describes softmax(logits / temperature).
    soft_cap: of the logits, before the temperature.
    nucleus: for "topk", entries past the fewest that hold this mass get logp -inf.

  Returns:
    ids int32 [B, T, n] (nondecreasing if sampled, likeliest first if topk), logp float32
    [B, T, n] (topk, or asked for), entropy and label_logp float32 [B, T] in nats, argmax
    int32 [B, T].

  Raises:
    InputError: the kind is unknown, u_BT is missing, or n is over the vocabulary (topk).
  """
  rows = head_VD.shape[0]
  vocab_size = rows if vocab_size is None else vocab_size
  if kind not in KINDS:
    raise InputError(f"records kind {kind!r} has no sampler; the kinds here are {KINDS}")
  if kind == "sampled" and u_BT is None:
    raise InputError("kind 'sampled' found no u_BT; give one uniform offset a position")
  if n < 1 or (kind == "topk" and n > vocab_size) or not 0 < vocab_size <= rows:
    raise InputError(
      f"n={n} and vocab_size={vocab_size} over a head of {rows} rows: n is from 1 (to the "
      "vocabulary for topk), vocab_size from 1 to the rows"
    )
  T = hidden_BTD.shape[1]
  chunk = min(chunk, T)
  if u_BT is None:
    u_BT = jnp.zeros(labels_BT.shape, jnp.float32)
  one = functools.partial(
    _chunk,
    n=n,
    vocab_size=vocab_size,
    kind=kind,
    logp=logp or kind == "topk",
    cap=soft_cap,
    scale=1.0 / temperature,
    nucleus=nucleus,
  )

  def scan(hidden_BTD, head_VD, labels_BT, u_BT, axis=None):
    split = lambda x: _split(x, chunk)
    body = lambda _, x: (None, one(x[0], head_VD, x[1], x[2], axis=axis))
    _, out = jax.lax.scan(body, None, jax.tree.map(split, (hidden_BTD, labels_BT, u_BT)))
    return jax.tree.map(lambda x: _join(x)[:, :T], out)

  with jax.named_scope("summarise"):
    if jax.sharding.get_abstract_mesh().empty:
      return scan(hidden_BTD, head_VD, labels_BT, u_BT)
    batch, vocab = PartitionSpec(sharding.BATCH), PartitionSpec("tensor")
    return jax.shard_map(
      functools.partial(scan, axis="tensor"),
      in_specs=(batch, vocab, batch, batch),
      out_specs=batch,
      check_vma=False,
    )(hidden_BTD, head_VD, labels_BT, u_BT)


def of_logits(
  logits_BCV: jax.Array, labels_BC: jax.Array, u_BC: jax.Array, **options: Any
) -> dict[str, jax.Array]:
  """`summarise` of logits that are there already, float32 [B, C, V], capped but not scaled.

  Args:
    how: n, kind, logp, temperature, nucleus, vocab_size: all of them, as `summarise` has them.
  """
  one: Any = functools.partial(_of_logits, scale=1.0 / options.pop("temperature"), **options)
  if jax.sharding.get_abstract_mesh().empty:
    return one(logits_BCV, labels_BC, u_BC, axis=None)
  rows, vocab = PartitionSpec(sharding.BATCH), PartitionSpec(sharding.BATCH, None, "tensor")
  return jax.shard_map(
    functools.partial(one, axis="tensor"),
    in_specs=(vocab, rows, rows),
    out_specs=rows,
    check_vma=False,
  )(logits_BCV, labels_BC, u_BC)


def _chunk(hidden_BCD, head_VD, labels_BC, u_BC, *, cap, **options) -> dict[str, Any]:
  logits_BCV = jnp.einsum(
    "BCD,VD->BCV", hidden_BCD.astype(head_VD.dtype), head_VD, preferred_element_type=jnp.float32
  )
  return _of_logits(fused_head.soft_cap(logits_BCV, cap), labels_BC, u_BC, **options)


def _of_logits(
  logits_BCV, labels_BC, u_BC, *, n, vocab_size, kind, logp, scale, nucleus, axis
) -> dict[str, Any]:
  logits_BCV = logits_BCV * scale if scale != 1.0 else logits_BCV
  width = logits_BCV.shape[-1]
  first = 0 if axis is None else jax.lax.axis_index(axis) * width
  ids_11V = first + jnp.arange(width, dtype=jnp.int32)[None, None]
  if vocab_size < width * (1 if axis is None else jax.lax.axis_size(axis)):
    logits_BCV = jnp.where(ids_11V < vocab_size, logits_BCV, -jnp.inf)
  peak_BC, argmax_BC = _argmax(logits_BCV, axis)
  z_BCV = logits_BCV - peak_BC[..., None]
  e_BCV = jnp.exp(z_BCV)
  mass_BC = _sum(jnp.sum(_groups(e_BCV, 0.0), (-1, -2)), axis)
  log_mass_BC = jnp.log(mass_BC)
  dot_BC = _sum(jnp.sum(jnp.where(e_BCV > 0, e_BCV * z_BCV, 0.0), -1), axis)

  def pick(ids_BCN):  # log p of global ids
    mine = (ids_BCN >= first) & (ids_BCN < first + width)
    z_BCN = jnp.take_along_axis(z_BCV, jnp.where(mine, ids_BCN - first, 0), -1)
    return _sum(jnp.where(mine, z_BCN, 0.0), axis) - log_mass_BC[..., None]

  out = {
    "entropy": log_mass_BC - dot_BC / mass_BC,
    "label_logp": pick(labels_BC[..., None])[..., 0],
    "argmax": argmax_BC,
  }
  if kind == "sampled":
    out["ids"] = _points(e_BCV, u_BC, n, axis)
    if logp:
      out["logp"] = pick(out["ids"])
  else:
    top_BCN, out["ids"] = top_k(z_BCV, n, axis=axis)
    logp_BCN = top_BCN - log_mass_BC[..., None]
    p_BCN = jnp.exp(logp_BCN)
    inside = jnp.cumsum(p_BCN, -1) - p_BCN < nucleus  # the mass before an entry
    out["logp"] = logp_BCN if nucleus >= 1 else jnp.where(inside, logp_BCN, -jnp.inf)
  return out


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
