"""Reduction of a teacher's logits to targets, on the device, one chunk of positions at a time.

`selection.py` selects the tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from distill_jax.errors import bad_value, check_choice
from distill_jax.nn import chunks, fused_head, mesh_in_use, sharding
from distill_jax.nn.sharding import MeshAxes
from distill_jax.records import selection
from distill_jax.records.fields import ARGMAX, ENTROPY, IDS, LABEL_LOGP, LOGP
from distill_jax.records.options import RecordsOptions

KINDS = ("sampled", "topk", "dense", "labels")


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
  """The targets to compute from the logits of a position.

  Attributes:
    n: Number of points or entries per position; not used for "dense" and "labels".
    kind: "sampled" (n points), "topk" (the n most probable tokens), "dense" (all tokens) or
      "labels" (none, only the log-probability of the label and the entropy).
    logp: True to add the exact log-probabilities of the ids for "sampled".
    temperature: All outputs describe softmax(logits / temperature).
    nucleus: Probability mass at which the entries of "topk" are cut; entries after it get logp
      -inf.
    vocab_size: Number of tokens. Further rows of the head are padding, with probability 0. None if
      no row is padding.
  """

  n: int = 1
  kind: str = "sampled"
  logp: bool = False
  temperature: float = 1.0
  nucleus: float = 1.0
  vocab_size: int | None = None

  @classmethod
  def of(cls, options: RecordsOptions, vocab_size: int) -> SamplerSpec:
    """Returns the spec for the options of `records` and a number of tokens or classes."""
    c = options
    return cls(c.n, c.kind, c.logp, c.temperature, c.nucleus, vocab_size)

  def check(self, rows: int, with_offsets: bool) -> SamplerSpec:
    """Returns the spec with its sizes filled in.

    Args:
      rows: Number of rows of the head.
      with_offsets: True if sampling offsets are given.

    Raises:
      InputError: The kind is unknown, offsets are missing, or a size is out of range.
    """
    vocab_size = rows if self.vocab_size is None else self.vocab_size
    n = vocab_size if self.kind == "dense" else self.n
    check_choice("kind", self.kind, KINDS, "Correct it")
    if self.kind == "sampled" and not with_offsets:
      expected = "a uniform offset per position for kind 'sampled'"
      raise bad_value("u_BT", None, expected, "Pass offsets in [0, 1)")
    if not 0 < vocab_size <= rows:
      expected = f"from 1 to {rows}, the number of rows of the head"
      raise bad_value("vocab_size", vocab_size, expected, "Correct it")
    if self.kind != "labels" and (n < 1 or (self.kind != "sampled" and n > vocab_size)):
      limit = "" if self.kind == "sampled" else f" and at most {vocab_size}, the vocabulary"
      raise bad_value("n", n, f"at least 1{limit}", "Correct it")
    return dataclasses.replace(self, n=n, vocab_size=vocab_size)


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
  seq_axis: str | None = None,
  vocab_axis: MeshAxes = sharding.VOCAB,
) -> dict[str, jax.Array]:
  """Returns the targets of a teacher's outputs, without computing all [B, T, V] logits at once.

  Under a mesh, B is sharded over `batch_axes`, T over `seq_axis` and V over `vocab_axis`. The sizes
  of the axes must divide B, T and V.

  Args:
    hidden_BTD: Hidden states after the final norm.
    head_VD: The unembedding: logits = hidden @ head.T, in the head's dtype with float32 sums.
    labels_BT: int32 labels, whose log-probabilities are returned; any id at positions without a
      label.
    u_BT: float32 offsets in [0, 1) for kind "sampled"; None for others.
    spec: The targets to compute.
    chunk: Number of positions whose logits are in memory at once. It need not divide T.
    soft_cap: Soft cap of the logits, applied before the temperature.
    batch_axes: Names of the mesh axes of the batch.
    seq_axis: Name of the mesh axis of positions; None if they are not sharded.
    vocab_axis: Names of the mesh axes of the vocabulary.

  Returns:
    "ids", int32 [B, T, n] (nondecreasing for "sampled", else the most probable one first); "logp",
    float32 [B, T, n] (for "sampled" only if spec.logp is set); "entropy" and "label_logp", float32
    [B, T], in nats; and "argmax", int32 [B, T]. For "labels", only "entropy" and "label_logp".

  Raises:
    InputError: The kind is unknown, u_BT is missing, or a size is out of range.
  """
  spec = spec.check(head_VD.shape[0], u_BT is not None)
  if u_BT is None:
    u_BT = jnp.zeros(labels_BT.shape, jnp.float32)

  scan = functools.partial(_scan_heads, spec=spec, chunk=chunk, soft_cap=soft_cap)
  with jax.named_scope("summarise"):
    if mesh_in_use.no_mesh():
      return scan(hidden_BTD, head_VD, labels_BT, u_BT)
    mesh_in_use.divide(hidden_BTD.shape[0], batch_axes, "batch_axes", "The batch")
    mesh_in_use.divide(hidden_BTD.shape[1], seq_axis, "seq_axis", "The sequence")
    mesh_in_use.divide(head_VD.shape[0], vocab_axis, "vocab_axis", "The head")
    positions, vocab = PartitionSpec(batch_axes, seq_axis), PartitionSpec(vocab_axis)
    return jax.shard_map(
      functools.partial(scan, axis=vocab_axis),
      in_specs=(positions, vocab, positions, positions),
      out_specs=positions,
      check_vma=False,
    )(hidden_BTD, head_VD, labels_BT, u_BT)


def _scan_heads(
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  labels_BT: jax.Array,
  u_BT: jax.Array,
  spec: SamplerSpec,
  chunk: int,
  soft_cap: float | None,
  axis: MeshAxes = None,
) -> dict[str, jax.Array]:
  """Returns the output of `summarise` for one device's positions and rows of the head.

  Args:
    hidden_BTD: See `summarise`, as for the other arguments.
    axis: Mesh axes over which V is sharded, inside shard_map.
  """

  def of_chunk(
    hidden_BCD: jax.Array, labels_BC: jax.Array, u_BC: jax.Array
  ) -> dict[str, jax.Array]:
    logits_BCV = fused_head.logits(hidden_BCD.astype(head_VD.dtype), head_VD)
    logits_BCV = fused_head.soft_cap(logits_BCV, soft_cap)
    return of_shard(logits_BCV, labels_BC, u_BC, spec, axis)

  return _scan(of_chunk, chunk, hidden_BTD, labels_BT, u_BT)


def _scan(
  of_chunk: Callable[..., dict[str, jax.Array]], chunk: int, *arrays: jax.Array
) -> dict[str, jax.Array]:
  """Returns the outputs of a function of arrays [B, C, ...], as arrays [B, T, ...]."""
  pieces = [chunks.split(x, chunk) for x in arrays]
  _, out = jax.lax.scan(lambda _, xs: (None, of_chunk(*xs)), None, pieces)
  return jax.tree.map(lambda x: chunks.join(x, arrays[0].shape[1]), out)


def of_logits(
  logits_BCV: jax.Array,
  labels_BC: jax.Array,
  u_BC: jax.Array,
  spec: SamplerSpec,
  *,
  batch_axes: tuple[str, ...] = sharding.BATCH,
  vocab_axis: MeshAxes = sharding.VOCAB,
) -> dict[str, jax.Array]:
  """Returns the output of `summarise`, given logits.

  Args:
    logits_BCV: float32 logits, after the soft cap and before the temperature.
    labels_BC: int32 labels; see `summarise`.
    u_BC: float32 offsets in [0, 1).
    spec: The targets to compute.
    batch_axes: Names of the mesh axes of the batch.
    vocab_axis: Names of the mesh axes of the vocabulary.

  Raises:
    InputError: The kind is unknown, or a size is out of range.
  """
  spec = spec.check(logits_BCV.shape[-1], with_offsets=True)
  if mesh_in_use.no_mesh():
    return of_shard(logits_BCV, labels_BC, u_BC, spec)
  mesh_in_use.divide(logits_BCV.shape[0], batch_axes, "batch_axes", "The batch")
  mesh_in_use.divide(logits_BCV.shape[-1], vocab_axis, "vocab_axis", "The logits")
  rows, vocab = PartitionSpec(batch_axes), PartitionSpec(batch_axes, None, vocab_axis)
  return jax.shard_map(
    functools.partial(of_shard, spec=spec, axis=vocab_axis),
    in_specs=(vocab, rows, rows),
    out_specs=rows,
    check_vma=False,
  )(logits_BCV, labels_BC, u_BC)


def summarise_logits(
  logits_BTV: jax.Array,
  labels_BT: jax.Array,
  u_BT: jax.Array,
  spec: SamplerSpec,
  *,
  chunk: int,
  batch_axes: tuple[str, ...] = sharding.BATCH,
  vocab_axis: MeshAxes = sharding.VOCAB,
) -> dict[str, jax.Array]:
  """Returns the output of `summarise`, given all logits.

  Args:
    logits_BTV: The teacher's logits, after the soft cap and before the temperature.
    labels_BT: See `summarise`.
    u_BT: See `summarise`.
    spec: See `summarise`.
    chunk: Number of positions that are processed at once.
    batch_axes: See `summarise`.
    vocab_axis: See `summarise`.
  """

  def of_chunk(
    logits_BCV: jax.Array, labels_BC: jax.Array, u_BC: jax.Array
  ) -> dict[str, jax.Array]:
    return of_logits(
      logits_BCV.astype(jnp.float32),
      labels_BC,
      u_BC,
      spec,
      batch_axes=batch_axes,
      vocab_axis=vocab_axis,
    )

  return _scan(of_chunk, chunk, logits_BTV, labels_BT, u_BT)


def of_shard(
  logits_BCV: jax.Array,
  labels_BC: jax.Array,
  u_BC: jax.Array,
  spec: SamplerSpec,
  axis: MeshAxes = None,
) -> dict[str, jax.Array]:
  """Returns the output of `summarise` for one chunk's logits of this shard of the vocabulary."""
  dist = _Distribution.of(logits_BCV, spec, axis)
  out = {
    ENTROPY.name: dist.entropy_BC(),
    LABEL_LOGP.name: dist.logp(labels_BC[..., None])[..., 0],
  }
  if spec.kind == "labels":
    return out
  out[ARGMAX.name] = dist.argmax_BC
  return out | (_sampled_ids(dist, u_BC, spec) if spec.kind == "sampled" else _topk_ids(dist, spec))


def _sampled_ids(dist: _Distribution, u_BC: jax.Array, spec: SamplerSpec) -> dict[str, jax.Array]:
  ids_BCN = selection.points(dist.e_BCV, u_BC, spec.n, dist.axis)
  return {IDS.name: ids_BCN} | ({LOGP.name: dist.logp(ids_BCN)} if spec.logp else {})


def _topk_ids(dist: _Distribution, spec: SamplerSpec) -> dict[str, jax.Array]:
  top_BCN, ids_BCN = selection.top_k(dist.z_BCV, spec.n, axis=dist.axis)
  logp_BCN = top_BCN - dist.log_mass_BC[..., None]
  if spec.kind == "topk" and spec.nucleus < 1:
    p_BCN = jnp.exp(logp_BCN)
    inside_BCN = jnp.cumsum(p_BCN, -1) - p_BCN < spec.nucleus  # compares the mass before an entry
    logp_BCN = jnp.where(inside_BCN, logp_BCN, -jnp.inf)
  return {IDS.name: ids_BCN, LOGP.name: logp_BCN}


class _Distribution(NamedTuple):
  """The softmax of one chunk's logits, for this shard of the vocabulary.

  Attributes:
    z_BCV: Logits minus the largest one of all shards.
    e_BCV: exp(z).
    mass_BC: Sum of e over all shards.
    log_mass_BC: Logarithm of mass_BC.
    argmax_BC: int32 global id of the largest logit.
    first: Global id of the first row of this shard.
    axis: Mesh axes over which V is sharded, inside shard_map.
  """

  z_BCV: jax.Array
  e_BCV: jax.Array
  mass_BC: jax.Array
  log_mass_BC: jax.Array
  argmax_BC: jax.Array
  first: jax.Array | int
  axis: MeshAxes

  @classmethod
  def of(cls, logits_BCV: jax.Array, spec: SamplerSpec, axis: MeshAxes) -> _Distribution:
    scale = 1.0 / spec.temperature
    logits_BCV = logits_BCV * scale if scale != 1.0 else logits_BCV
    width = logits_BCV.shape[-1]
    first = 0 if axis is None else jax.lax.axis_index(axis) * width
    ids_11V = first + jnp.arange(width, dtype=jnp.int32)[None, None]
    rows = width * (1 if axis is None else jax.lax.axis_size(axis))
    if spec.vocab_size is not None and spec.vocab_size < rows:
      logits_BCV = jnp.where(ids_11V < spec.vocab_size, logits_BCV, -jnp.inf)
    peak_BC, argmax_BC = selection.peak_and_argmax(logits_BCV, axis)
    z_BCV = logits_BCV - peak_BC[..., None]
    e_BCV = jnp.exp(z_BCV)
    mass_BC = selection.sum_over_shards(jnp.sum(selection.groups(e_BCV, 0.0), (-1, -2)), axis)
    return cls(z_BCV, e_BCV, mass_BC, jnp.log(mass_BC), argmax_BC, first, axis)

  def entropy_BC(self) -> jax.Array:
    dot_BC = jnp.sum(jnp.where(self.e_BCV > 0, self.e_BCV * self.z_BCV, 0.0), -1)
    return self.log_mass_BC - selection.sum_over_shards(dot_BC, self.axis) / self.mass_BC

  def logp(self, ids_BCN: jax.Array) -> jax.Array:
    """Returns the log-probabilities of global ids."""
    width = self.z_BCV.shape[-1]
    mine_BCN = (ids_BCN >= self.first) & (ids_BCN < self.first + width)
    local_BCN = jnp.where(mine_BCN, ids_BCN - self.first, 0)
    z_BCN = jnp.take_along_axis(self.z_BCV, local_BCN, -1)
    return (
      selection.sum_over_shards(jnp.where(mine_BCN, z_BCN, 0.0), self.axis)
      - self.log_mass_BC[..., None]
    )
