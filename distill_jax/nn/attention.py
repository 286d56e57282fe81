"""Causal attention within packed segments, by the best kernel for the device.

The kernels are splash attention (Pallas) on TPU, cuDNN's flash attention on GPU, and XLA's matrix
products elsewhere. The first two never store the [T, T] scores. Splash attention and cuDNN's packed
layout visit only the blocks of pairs within segments. All take queries and keys of different
lengths (splash.attention).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from distill_jax.errors import InputError, bad_value, check_choice
from distill_jax.nn import cudnn, dense, sharding
from distill_jax.nn.products import recomputed

KERNELS = ("auto", "xla", "splash", "cudnn", "cudnn_packed")
GPU = ("gpu", "cuda")
RUNS_ON = {"splash": ("tpu",), "cudnn": GPU, "cudnn_packed": GPU}


class OneOf(NamedTuple):
  """The window of a layer in a scan over layers with different windows."""

  sizes: tuple[int | None, ...]
  at: jax.Array  # index into `sizes`, an int32 scalar, which may be traced


Window = int | None | OneOf


def one_of(window: Window) -> OneOf:
  """Returns a window as a `OneOf`, with one size if it is the same for all layers."""
  return window if isinstance(window, OneOf) else OneOf((window,), jnp.int32(0))


def attention(
  q_BTHh: jax.Array,
  k_BTGh: jax.Array,
  v_BTGh: jax.Array,
  segments_BT: jax.Array,
  window: Window = None,
  scale: float | None = None,
  kernel: str = "auto",
  rules: sharding.Rules = sharding.Rules(),  # noqa: B008
) -> jax.Array:
  """Computes causal attention within segments, with grouped query heads.

  Every position attends to itself, padding included, so no row of the softmax is empty. Values may
  be narrower than keys.

  Args:
    q_BTHh: queries, float32, bfloat16 or float16.
    k_BTGh: keys, in the same dtype. H is a multiple of G.
    v_BTGh: values, in the same dtype.
    segments_BT: int32, the number of each position's segment. The positions of a segment are
      consecutive.
    window: the number of positions that a position attends to, itself included; None for all
      positions up to its own.
    scale: the factor of the scores, by default 1/sqrt(h).
    kernel: one of KERNELS; "auto" selects the best one for the devices of the mesh in use, except
      "cudnn_packed", which has not run on a GPU yet.
    rules: the sharding of sequences and heads, used by all kernels except "xla".

  Returns:
    [B, T, H, width of values], in the dtype of the queries.

  Raises:
    InputError: the kernel is unknown, or does not support these arrays or devices.
  """
  kernel = choose_kernel(kernel, q_BTHh)
  scale = q_BTHh.shape[-1] ** -0.5 if scale is None else scale
  sizes, at = one_of(window)
  T = segments_BT.shape[1]
  index_T = jnp.arange(T, dtype=jnp.int32)
  arrays = q_BTHh, k_BTGh, v_BTGh, segments_BT, segments_BT, index_T, at
  run = functools.partial(on_a_device(kernel), sizes=sizes, scale=scale, chunk=T)
  if kernel == "xla" or jax.sharding.get_abstract_mesh().empty:
    return run(*arrays)
  heads, kv_heads = (
    rules.spec(("batch", "seq", name, "head_dim"), "compute") for name in ("heads", "kv_heads")
  )
  if heads != kv_heads or heads[1] not in (None, sharding.SEQ) or heads[3]:
    raise InputError(
      f"{kernel} attention runs on a device's own sequences and heads, but the rules shard queries "
      f"by {heads} and keys by {kv_heads}. Shard 'heads' and 'kv_heads' over the same mesh axes, "
      "do not shard 'seq' and 'head_dim', or set attention to 'xla'."
    )
  rows, whole = rules.spec(("batch", "seq"), "compute"), PartitionSpec()
  # The kernels do not declare over which mesh axes their results vary. Without communication
  # between devices there is nothing to check.
  specs = heads, heads, heads, rows, rows, whole, whole
  return jax.shard_map(run, in_specs=specs, out_specs=heads, check_vma=False)(*arrays)


def on_a_device(kernel: str) -> Callable[..., jax.Array]:
  """Returns the function of a kernel, for the queries of one device and the keys they attend to.

  All of them have the arguments that splash.attention documents, up to `chunk`.
  """
  if kernel == "splash":
    from distill_jax.nn import splash  # imports Pallas, which other devices do not need

    return splash.attention
  functions: dict[str, Callable[..., jax.Array]] = {
    "xla": dense.attention,
    "cudnn": functools.partial(dense.attention, implementation="cudnn"),
    "cudnn_packed": cudnn.attention,
  }
  return functions[kernel]


def full(
  q_BTHh: jax.Array,
  k_BSGh: jax.Array,
  v_BSGh: jax.Array,
  valid_BS: jax.Array | None = None,
  causal: bool = False,
  scale: float | None = None,
  bias_BHTS: jax.Array | None = None,
) -> jax.Array:
  """Computes attention of T positions to all S positions of a source, for encoders.

  The source may be the same sequence (self-attention).

  Args:
    q_BTHh: queries.
    k_BSGh: keys.
    v_BSGh: values.
    valid_BS: bool, True at positions that are not padding; None for no padding. A row without a
      valid position has a finite result.
    causal: whether a position attends only to itself and those before it.
    scale: the factor of the scores, by default 1/sqrt(h).
    bias_BHTS: float32, added to the scores; any of its axes may have size 1.

  Returns:
    [B, T, H, h].
  """
  mask_B1TS = None if valid_BS is None else valid_BS[:, None, None, :]
  attend = functools.partial(jax.nn.dot_product_attention, scale=scale, is_causal=causal)
  return recomputed(attend, q_BTHh, k_BSGh, v_BSGh, bias_BHTS, mask_B1TS)


def cached(
  q_BTHh: jax.Array,
  read: Callable[[int], tuple[jax.Array, jax.Array]],
  sizes: Sequence[int],
  positions_BT: jax.Array,
  window: Window,
  scale: float,
) -> jax.Array:
  """Computes attention of T positions to the slots of a cache, which are stored in blocks.

  Slot z of a row holds its position z. A position attends to the slots up to its own; the other
  slots may hold any finite numbers. Scores and softmax are float32. Keys have the layout that the
  first product reads: with a few queries a row this is six times faster on a CPU than [B, Z, G, h].

  Only blocks to which some row attends are read, with the running softmax of arXiv:2112.05682. To
  a row, a block to which it does not attend makes no difference, bit for bit.

  Args:
    q_BTHh: queries.
    read: returns the keys [B, G, h, Z] and values [B, G, Z, width] of a block, given its number.
    sizes: the number of slots of each block.
    positions_BT: int32, the position of each query.
    window: as in `attention`.
    scale: the factor of the scores.

  Returns:
    [B, T, H, width of values], in the dtype of the values.
  """
  k, v = jax.eval_shape(lambda: read(0))
  (B, T, H, h), G = q_BTHh.shape, k.shape[1]
  Q, (windows, at) = H // G, one_of(window)
  q_BGQTh = q_BTHh.reshape(B, T, G, Q, h).transpose(0, 2, 3, 1, 4)
  dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
  reach = jnp.asarray([w or sum(sizes) for w in windows])[at]

  def add_block(n: int, first: int, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Adds a block to the largest score, the sum of exp(score - largest), and that of values."""
    peak_BGQT, total_BGQT, a_BGQTh = sums
    k_BGhZ, v_BGZh = read(n)
    age_BTZ = positions_BT[..., None] - (first + jnp.arange(sizes[n], dtype=jnp.int32))[None, None]
    seen_BTZ = age_BTZ >= 0 if windows == (None,) else (age_BTZ >= 0) & (age_BTZ < reach)
    scores_BGQTZ = dot(q_BGQTh.reshape(B, G, Q * T, h), k_BGhZ).reshape(B, G, Q, T, -1) * scale
    scores_BGQTZ = jnp.where(seen_BTZ[:, None, None], scores_BGQTZ, -jnp.inf)
    new_peak_BGQT = jnp.maximum(peak_BGQT, jnp.max(scores_BGQTZ, -1))
    p_BGQTZ = jnp.exp(scores_BGQTZ - new_peak_BGQT[..., None])
    kept_BGQT = jnp.exp(peak_BGQT - new_peak_BGQT)
    new_BGQTh = dot(p_BGQTZ.astype(v_BGZh.dtype).reshape(B, G, Q * T, -1), v_BGZh)
    return (
      new_peak_BGQT,
      total_BGQT * kept_BGQT + jnp.sum(p_BGQTZ, -1),
      a_BGQTh * kept_BGQT[..., None] + new_BGQTh.reshape(a_BGQTh.shape),
    )

  lowest = float(jnp.finfo(jnp.float32).min)  # not -inf, whose difference to itself is NaN
  zeros = jnp.zeros((B, G, Q, T)), jnp.zeros((B, G, Q, T, v.shape[-1]))
  sums: tuple[jax.Array, ...] = (jnp.full((B, G, Q, T), lowest), *zeros)
  oldest = 0 if windows == (None,) else jnp.min(positions_BT) - reach + 1
  newest, first = jnp.max(positions_BT), 0
  for n, size in enumerate(sizes):
    add = functools.partial(add_block, n, first)
    attended = (first <= newest) & (oldest < first + size)
    sums = jax.lax.cond(attended, add, lambda sums: sums, sums) if len(sizes) > 1 else add(sums)
    first += size
  _, total_BGQT, a_BGQTh = sums
  a_BGQTh = (a_BGQTh / total_BGQT[..., None]).astype(v.dtype)
  return a_BGQTh.transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1)


def write_slots(
  cache: jax.Array, x_BT: jax.Array, slots_BT: jax.Array, slot_axis: int
) -> jax.Array:
  """Returns a cache with T new positions [B, T, ...] written to their slots along `slot_axis`.

  Positions whose slot is out of range are dropped.
  """

  def write_row(old: jax.Array, new_T: jax.Array, slots_T: jax.Array) -> jax.Array:
    at = (slice(None),) * (slot_axis - 1) + (slots_T,)
    return old.at[at].set(jnp.moveaxis(new_T, 0, slot_axis - 1), mode="drop")

  return jax.vmap(write_row)(cache, x_BT, slots_BT)


def choose_kernel(kernel: str, q_BTHh: jax.Array) -> str:
  """Returns the kernel to use: `kernel`, or for "auto" the best for these devices and shapes.

  Raises:
    InputError: the kernel is unknown, or does not support these queries or devices.
  """
  check_choice("attention", kernel, KERNELS, "Choose one")
  platform_name, unsupported = platform(), cudnn_limitation(q_BTHh)
  if kernel == "auto":
    if platform_name in GPU:
      return "xla" if unsupported else "cudnn"
    return "splash" if platform_name in RUNS_ON["splash"] else "xla"
  if kernel != "xla" and platform_name not in RUNS_ON[kernel]:
    needs = f"a kernel that runs on {platform_name}, while this one runs on {RUNS_ON[kernel][0]}"
    raise bad_value("attention", kernel, needs, "Set it to 'auto'")
  if kernel in ("cudnn", "cudnn_packed") and unsupported:
    raise bad_value("attention", kernel, f"another kernel, since {unsupported}", "Set it to 'auto'")
  return kernel


def platform() -> str:
  """Returns the platform of the mesh in use, or of jax's default devices without a mesh.

  The devices of the mesh need not exist on this machine.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def cudnn_limitation(q_BTHh: jax.Array) -> str:
  """Returns why cuDNN's flash attention does not support these queries; "" if it does."""
  _, T, _, h = q_BTHh.shape
  if q_BTHh.dtype not in (jnp.bfloat16, jnp.float16):
    return f"cuDNN needs bfloat16 or float16 and the compute dtype is {q_BTHh.dtype}"
  major = cudnn.capability()
  max_width = 256 if major >= 9 else 128 if major == 8 else 0
  if h % 8 or h > max_width:
    return f"on this GPU it needs head widths that are multiples of 8 up to {max_width}, not {h}"
  return f"it needs an even number of positions and sequences have {T}" if T % 2 else ""
