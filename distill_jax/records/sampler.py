"""Reduces a teacher's logits to what is recorded, on the device, a chunk of positions at a time.

`selection.py` says which tokens are kept.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from distill_jax.errors import InputError
from distill_jax.nn import chunks, fused_head, mesh_in_use, sharding
from distill_jax.nn.sharding import MeshAxes
from distill_jax.records import selection
from distill_jax.records.fields import ARGMAX, ENTROPY, IDS, LABEL_LOGP, LOGP
from distill_jax.records.options import RecordsOptions

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
  vocab_axis: MeshAxes = sharding.VOCAB,
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
  if u_BT is None:
    u_BT = jnp.zeros(labels_BT.shape, jnp.float32)

  scan = functools.partial(_scan_chunks, spec=spec, chunk=chunk, soft_cap=soft_cap)
  with jax.named_scope("summarise"):
    if mesh_in_use.no_mesh():
      return scan(hidden_BTD, head_VD, labels_BT, u_BT)
    mesh_in_use.divide(hidden_BTD.shape[0], batch_axes, "batch_axes", "The batch")
    mesh_in_use.divide(head_VD.shape[0], vocab_axis, "vocab_axis", "The head")
    batch, vocab = PartitionSpec(batch_axes), PartitionSpec(vocab_axis)
    return jax.shard_map(
      functools.partial(scan, axis=vocab_axis),
      in_specs=(batch, vocab, batch, batch),
      out_specs=batch,
      check_vma=False,
    )(hidden_BTD, head_VD, labels_BT, u_BT)


def _scan_chunks(
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  labels_BT: jax.Array,
  u_BT: jax.Array,
  spec: SamplerSpec,
  chunk: int,
  soft_cap: float | None,
  axis: MeshAxes = None,
) -> dict[str, jax.Array]:
  """`summarise` of one device's sequences and its rows of the head.

  Args:
    axis: the mesh axis that V is sharded over, inside shard_map.
  """

  def summarise_chunk(carry: None, xs: tuple[jax.Array, ...]) -> tuple[None, dict[str, jax.Array]]:
    hidden_BCD, labels_BC, u_BC = xs
    logits_BCV = jnp.einsum(
      "BCD,VD->BCV",
      hidden_BCD.astype(head_VD.dtype),
      head_VD,
      preferred_element_type=jnp.float32,
    )
    logits_BCV = fused_head.soft_cap(logits_BCV, soft_cap)
    return carry, _of_logits(logits_BCV, labels_BC, u_BC, spec, axis)

  xs = jax.tree.map(lambda x: chunks.split(x, chunk), (hidden_BTD, labels_BT, u_BT))
  _, out = jax.lax.scan(summarise_chunk, None, xs)
  return jax.tree.map(lambda x: chunks.join(x, hidden_BTD.shape[1]), out)


def of_logits(
  logits_BCV: jax.Array,
  labels_BC: jax.Array,
  u_BC: jax.Array,
  spec: SamplerSpec,
  *,
  batch_axes: tuple[str, ...] = sharding.BATCH,
  vocab_axis: MeshAxes = sharding.VOCAB,
) -> dict[str, jax.Array]:
  """`summarise` of logits that are there already, float32 [B, C, V], capped but not scaled."""
  spec = spec.check(logits_BCV.shape[-1], with_offsets=True)
  if mesh_in_use.no_mesh():
    return _of_logits(logits_BCV, labels_BC, u_BC, spec, None)
  mesh_in_use.divide(logits_BCV.shape[0], batch_axes, "batch_axes", "The batch")
  mesh_in_use.divide(logits_BCV.shape[-1], vocab_axis, "vocab_axis", "The logits")
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
  axis: MeshAxes,
) -> dict[str, jax.Array]:
  """What is recorded of the logits of one chunk, of this shard of the vocabulary."""
  dist = _Distribution.of(logits_BCV, spec, axis)
  out = {
    ENTROPY.name: dist.entropy_BC(),
    LABEL_LOGP.name: dist.logp(labels_BC[..., None])[..., 0],
    ARGMAX.name: dist.argmax_BC,
  }
  return out | (_sampled_ids(dist, u_BC, spec) if spec.kind == "sampled" else _topk_ids(dist, spec))


def _sampled_ids(dist: _Distribution, u_BC: jax.Array, spec: SamplerSpec) -> dict[str, jax.Array]:
  ids_BCN = selection.points(dist.e_BCV, u_BC, spec.n, dist.axis)
  return {IDS.name: ids_BCN} | ({LOGP.name: dist.logp(ids_BCN)} if spec.logp else {})


def _topk_ids(dist: _Distribution, spec: SamplerSpec) -> dict[str, jax.Array]:
  top_BCN, ids_BCN = selection.top_k(dist.z_BCV, spec.n, axis=dist.axis)
  logp_BCN = top_BCN - dist.log_mass_BC[..., None]
  if spec.kind == "topk" and spec.nucleus < 1:
    p_BCN = jnp.exp(logp_BCN)
    inside_BCN = jnp.cumsum(p_BCN, -1) - p_BCN < spec.nucleus  # the mass before an entry
    logp_BCN = jnp.where(inside_BCN, logp_BCN, -jnp.inf)
  return {IDS.name: ids_BCN, LOGP.name: logp_BCN}


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
    """Log-probabilities of global ids."""
    width = self.z_BCV.shape[-1]
    mine_BCN = (ids_BCN >= self.first) & (ids_BCN < self.first + width)
    local_BCN = jnp.where(mine_BCN, ids_BCN - self.first, 0)
    z_BCN = jnp.take_along_axis(self.z_BCV, local_BCN, -1)
    return (
      selection.sum_over_shards(jnp.where(mine_BCN, z_BCN, 0.0), self.axis)
      - self.log_mass_BC[..., None]
    )
