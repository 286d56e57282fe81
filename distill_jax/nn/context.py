"""Attention over positions that are spread over the mesh axis `context`.

A sequence of T positions is divided into 2C chunks for C devices. Outside of the decoder's layers,
device i holds chunks 2i and 2i + 1, i.e. positions in their order. Inside, it holds chunks i and
2C - 1 - i, the zig-zag order: under a causal mask the first chunk has few keys and the last has
many, and each pair has the same number. The order is changed once before the layers and once after
them: each device sends its share of [B, T, D] once.

All layers are per position but attention, for which every device gathers the keys and values of
its sequences, and computes its own queries. It receives (C - 1) / C of [B, T, G, h] twice per
layer. A ring would overlap this with the products, but would call C kernels of a C-th of the size:
for 70B at 131,072 tokens on 16 devices, a layer gathers 0.5 GB in about 5 ms, while its
products take 70 ms. The gathered keys and values of one layer exist at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from distill_jax.errors import InputError
from distill_jax.nn import attention, sharding
from distill_jax.nn.sharding import SEQ
from distill_jax.types import Tree

# (gathered arrays, weights) -> keys [B, T, G, h] and values [B, T, G, w].
KeysAndValues = Callable[..., tuple[jax.Array, jax.Array]]


def devices() -> int:
  """Returns the number of devices that positions are spread over; 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape.get(SEQ, 1)


def to_zigzag(tree: Tree, axes: str, rules: sharding.Rules) -> Tree:
  """Returns arrays with their positions in zig-zag order; unchanged without a context axis.

  Args:
    tree: the arrays, each with these axes.
    axes: the logical axes, e.g. "batch seq embed".
    rules: the rules of the model.

  Raises:
    InputError: T is not a multiple of 2C.
  """
  return _reorder(tree, axes, rules, to_zigzag=True)


def from_zigzag(tree: Tree, axes: str, rules: sharding.Rules) -> Tree:
  """Returns arrays with their positions in order again: the inverse of `to_zigzag`."""
  return _reorder(tree, axes, rules, to_zigzag=False)


def attend(
  q_BTHh: jax.Array,
  to_gather: Sequence[jax.Array],
  segments_BT: jax.Array,
  window: attention.Window,
  scale: float,
  kernel: str,
  rules: sharding.Rules,
  *,
  gathered_axes: str = "batch seq kv_heads head_dim",
  expand: KeysAndValues = lambda k_BTGh, v_BTGh: (k_BTGh, v_BTGh),
  weights: Sequence[jax.Array] = (),
  weight_axes: Sequence[str] = (),
) -> jax.Array:
  """Computes `attention.attention` for positions in zig-zag order.

  Args:
    q_BTHh: queries.
    to_gather: the arrays from which keys and values are computed, e.g. keys and values.
    segments_BT: see `attention.attention`, as for the next four arguments.
    window: the window.
    scale: the factor of the scores.
    kernel: the kernel.
    rules: the rules of the model.
    gathered_axes: the logical axes of each array in `to_gather`.
    expand: (the gathered arrays, the weights) -> keys and values. It runs on each device, for the
      heads of that device.
    weights: weights that `expand` uses.
    weight_axes: the logical axes of each weight.

  Returns:
    [B, T, H, width of values], in zig-zag order.
  """
  sizes, at = attention.one_of(window)
  spec = functools.partial(_spec, rules)
  heads, rows = spec("batch seq heads head_dim"), spec("batch seq")
  kernel = attention.choose_kernel(kernel, q_BTHh)
  if spec("batch seq kv_heads head_dim") != heads or heads[3]:
    raise InputError(
      "With a context axis, a device needs the keys of its queries, but the rules shard queries by "
      f"{heads}. Shard 'heads' and 'kv_heads' over the same mesh axes, and do not shard 'head_dim'."
    )

  def on_device(q_BQHh, to_gather, segments_BQ, at, weights):
    """Attends from the queries of a device, in zig-zag order, to all keys, in their order."""
    *gathered, segments_BK = [_gather(x) for x in (*to_gather, segments_BQ)]
    k_BKGh, v_BKGh = expand(*gathered, *weights)
    index_Q = _query_index(q_BQHh.shape[1])
    run = functools.partial(attention.on_a_device(kernel), sizes=sizes, scale=scale)
    arrays = q_BQHh, k_BKGh, v_BKGh, segments_BQ, segments_BK, index_Q, at
    return run(*arrays, chunk=len(index_Q) // 2)

  in_specs = (
    heads,
    [spec(gathered_axes)] * len(to_gather),
    rows,
    PartitionSpec(),
    [spec(axes) for axes in weight_axes],
  )
  return jax.shard_map(on_device, in_specs=in_specs, out_specs=heads, check_vma=False)(
    q_BTHh, list(to_gather), segments_BT, at, list(weights)
  )


def _spec(rules: sharding.Rules, axes: str) -> PartitionSpec:
  return rules.spec(tuple(axes.split()), "compute")


def _gather(x_BQ: jax.Array) -> jax.Array:
  """Returns the positions of all devices, [B, T, ...], in their order."""
  B, Q = x_BQ.shape[:2]
  x_B2t = x_BQ.reshape(B, 2, Q // 2, *x_BQ.shape[2:])
  x_CB2t = jax.lax.all_gather(x_B2t, SEQ)
  # The first chunks of the devices are in order, the second ones in reverse order.
  x_nBt = jnp.concatenate([x_CB2t[:, :, 0], x_CB2t[::-1, :, 1]])
  return jnp.moveaxis(x_nBt, 0, 1).reshape(B, -1, *x_BQ.shape[2:])


def _query_index(Q: int) -> jax.Array:
  """Returns the index of each of a device's positions in its row, int32 [Q]."""
  device, C = jax.lax.axis_index(SEQ), jax.lax.axis_size(SEQ)
  chunks_2 = jnp.stack([device, 2 * C - 1 - device]).astype(jnp.int32)
  return (chunks_2[:, None] * (Q // 2) + jnp.arange(Q // 2, dtype=jnp.int32)[None]).reshape(-1)


def _reorder(tree: Tree, axes: str, rules: sharding.Rules, *, to_zigzag: bool) -> Tree:
  if (C := devices()) == 1:
    return tree
  at, spec = axes.split().index("seq"), _spec(rules, axes)
  if spec[at] != SEQ:
    raise InputError(
      f"The rules shard 'seq' over {spec[at]!r}; expected {SEQ!r} on a mesh with a {SEQ} axis. "
      "Remove the rule for 'seq' from the model."
    )
  for x in jax.tree.leaves(tree):
    if x.shape[at] % (2 * C):
      raise InputError(
        f"A sequence has {x.shape[at]} positions; expected a multiple of {2 * C}, two chunks for "
        f"each of {C} devices of mesh.context. Change the sequence length or mesh.context."
      )
  run = functools.partial(_exchange, axis=at, C=C, to_zigzag=to_zigzag)

  def reorder(x: jax.Array) -> jax.Array:
    return jax.shard_map(run, in_specs=(spec,), out_specs=spec, check_vma=False)(x)

  return jax.tree.map(reorder, tree)


def _exchange(x: jax.Array, axis: int, C: int, to_zigzag: bool) -> jax.Array:
  """Exchanges the two chunks of positions of each device.

  In order, device i holds an even chunk and an odd one. In zig-zag order a device with an even
  number holds the even one of its chunks first. Even chunks, and odd ones, go from every device to
  another.
  """
  # The device that holds a chunk in zig-zag order.
  of_chunk = [min(chunk, 2 * C - 1 - chunk) for chunk in range(2 * C)]
  odd_device = jax.lax.axis_index(SEQ) % 2 == 1

  def swap_on_odd_devices(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.where(odd_device, b, a), jnp.where(odd_device, a, b)

  first, second = jnp.split(x, 2, axis)
  halves = (first, second) if to_zigzag else swap_on_odd_devices(first, second)
  sent = []
  for parity, half in enumerate(halves):
    pairs = [(i, of_chunk[2 * i + parity]) for i in range(C)]
    if not to_zigzag:
      pairs = [(there, here) for here, there in pairs]
    sent.append(jax.lax.ppermute(half, SEQ, pairs))
  first, second = sent
  return jnp.concatenate(swap_on_odd_devices(first, second) if to_zigzag else sent, axis)
