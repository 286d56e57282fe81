"""Causal attention within packed segments: one function, and the kernel that fits the device.

Splash attention (Pallas) on TPU, cuDNN's flash attention on GPU, XLA's own products
elsewhere: the two first never hold the [T, T] scores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as pallas
from jax.sharding import PartitionSpec

from distill_jax.errors import InputError
from distill_jax.nn import sharding

KERNELS = ("auto", "xla", "splash", "cudnn")
RUNS_ON = {"splash": ("tpu",), "cudnn": ("gpu", "cuda")}
LANES = 128  # of a TPU: splash attention's blocks are multiples of so many positions
BLOCKS = (512, 256, LANES)


class OneOf(NamedTuple):
  """The window of a layer that is one of several kinds in one scan."""

  sizes: tuple[int | None, ...]
  at: jax.Array  # which of them, int32, perhaps traced


Window = int | None | OneOf


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
  """Causal attention within segments, grouped heads. Returns [B, T, H, width of values].

  A position always sees itself, padding too, so no row of the softmax is empty. Values may
  be narrower than keys.

  Args:
    segments_BT: int32; positions of a segment are consecutive.
    window: how many positions, itself among them, a position sees; None: all before it.
    scale: of the scores; 1/sqrt(h) by default.
    kernel: one of KERNELS; "auto" is the best for the devices of the mesh in use.
    rules: say which sequences and heads a device has, if the kernel is not XLA's.

  Raises:
    InputError: the kernel is unknown, or it cannot do this on these devices.
  """
  kernel = choose_kernel(kernel, q_BTHh)
  scale = q_BTHh.shape[-1] ** -0.5 if scale is None else scale
  sizes, at = window if isinstance(window, OneOf) else OneOf((window,), jnp.int32(0))
  arrays = q_BTHh, k_BTGh, v_BTGh, segments_BT, at
  if kernel == "xla":
    return dense(*arrays, sizes, scale, "xla")
  if kernel == "splash":
    run = functools.partial(splash, sizes=sizes, scale=scale)
  else:
    run = functools.partial(dense, sizes=sizes, scale=scale, implementation="cudnn")
  if jax.sharding.get_abstract_mesh().empty:
    return run(*arrays)
  heads, kv_heads = (
    rules.spec(("batch", "seq", name, "head_dim"), "compute") for name in ("heads", "kv_heads")
  )
  if heads != kv_heads or heads[1] or heads[3]:
    raise InputError(
      f"{kernel} attention runs on a device's own sequences and heads, and the rules compute "
      f"queries by {heads} and keys by {kv_heads}; spread 'heads' and 'kv_heads' "
      "alike, 'seq' and 'head_dim' not at all, or take attention 'xla'"
    )
  rows = rules.spec(("batch", "seq"), "compute")
  # The kernels do not say what varies over which axis. No device sends anything, so the
  # check has nothing to find.
  return jax.shard_map(
    run, in_specs=(heads, heads, heads, rows, PartitionSpec()), out_specs=heads, check_vma=False
  )(*arrays)


def full(
  q_BTHh: jax.Array,
  k_BSGh: jax.Array,
  v_BSGh: jax.Array,
  valid_BS: jax.Array | None = None,
  causal: bool = False,
  scale: float | None = None,
  bias_BHTS: jax.Array | None = None,
) -> jax.Array:
  """Attention of T positions to all S of a source (its own, perhaps): of encoders.

  Args:
    valid_BS: bool, the positions that are no padding; None: all. A row that has none of them
      comes out finite.
    causal: a position sees those before it and itself.
    bias_BHTS: added to the scores, float32; any of its axes may be 1.

  Returns: [B, T, H, h].
  """
  mask_B1TS = None if valid_BS is None else valid_BS[:, None, None, :]
  return jax.nn.dot_product_attention(
    q_BTHh, k_BSGh, v_BSGh, bias=bias_BHTS, mask=mask_B1TS, scale=scale, is_causal=causal
  )


def cached(
  q_BTHh: jax.Array,
  k_BGhZ: jax.Array,
  v_BGZh: jax.Array,
  positions_BT: jax.Array,
  window: Window,
  scale: float,
) -> jax.Array:
  """Attention of T positions to the Z slots of a cache. Returns [B, T, H, width of values].

  A row's slot z holds its position z; a position sees slots up to its own, whatever the
  others hold (finite numbers). Scores and softmax are float32. Keys lie as the first product
  reads them: for a few queries a row that is six times faster on a CPU than [B, Z, G, h].
  """
  (B, T, H, h), (_, G, _, Z) = q_BTHh.shape, k_BGhZ.shape
  sizes, at = window if isinstance(window, OneOf) else OneOf((window,), jnp.int32(0))
  slots_11Z = jnp.arange(Z, dtype=jnp.int32)[None, None]
  seen_BTZ = slots_11Z <= positions_BT[..., None]
  if sizes != (None,):
    seen_BTZ &= positions_BT[..., None] - slots_11Z < jnp.asarray([w or Z for w in sizes])[at]
  Q = H // G
  q_BGQTh = q_BTHh.reshape(B, T, G, Q, h).transpose(0, 2, 3, 1, 4)
  dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
  scores_BGQTZ = dot(q_BGQTh.reshape(B, G, Q * T, h), k_BGhZ).reshape(B, G, Q, T, Z) * scale
  scores_BGQTZ = jnp.where(seen_BTZ[:, None, None], scores_BGQTZ, -jnp.inf)
  p_BGQTZ = jax.nn.softmax(scores_BGQTZ, -1).astype(v_BGZh.dtype)
  a_BGQTh = dot(p_BGQTZ.reshape(B, G, Q * T, Z), v_BGZh).reshape(B, G, Q, T, -1)
  return a_BGQTh.transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1).astype(v_BGZh.dtype)


def write_slots(
  cache: jax.Array, x_BT: jax.Array, slots_BT: jax.Array, slot_axis: int
) -> jax.Array:
  """A cache with T new positions a row [B, T, ...] in their slots along `slot_axis`.

  A slot that is not there takes nothing.
  """

  def write_row(old: jax.Array, new_T: jax.Array, slots_T: jax.Array) -> jax.Array:
    at = (slice(None),) * (slot_axis - 1) + (slots_T,)
    return old.at[at].set(jnp.moveaxis(new_T, 0, slot_axis - 1), mode="drop")

  return jax.vmap(write_row)(cache, x_BT, slots_BT)


def choose_kernel(kernel: str, q_BTHh: jax.Array) -> str:
  """The kernel by its name, or, for "auto", the best that these devices and shapes have."""
  if kernel not in KERNELS:
    raise InputError(f"attention is {kernel!r}; it can be one of {KERNELS}")
  platform_name, why_not = platform(), cudnn_cannot(q_BTHh)
  if kernel == "auto":
    fits = {"splash": True, "cudnn": not why_not}
    return next((k for k, on in RUNS_ON.items() if platform_name in on and fits[k]), "xla")
  if kernel != "xla" and platform_name not in RUNS_ON[kernel]:
    raise InputError(
      f"attention is {kernel!r}, which runs on {RUNS_ON[kernel][0]}, and the devices are "
      f"{platform_name}; set it to 'auto'"
    )
  if kernel == "cudnn" and why_not:
    raise InputError(f"attention is 'cudnn' and {why_not}; set it to 'auto'")
  return kernel


def platform() -> str:
  """Of the mesh in use, which may be of devices that are not here; else of jax's default."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def cudnn_cannot(q_BTHh: jax.Array) -> str:
  """Why cuDNN's flash attention cannot have these queries; "" if it can."""
  _, T, _, h = q_BTHh.shape
  if q_BTHh.dtype not in (jnp.bfloat16, jnp.float16):
    return f"the compute dtype is {q_BTHh.dtype}, where it does bfloat16 and float16"
  major = getattr(jax.devices()[0], "compute_capability", "9.0").split(".")[0]
  max_width = {"8": 128}.get(major, 0 if major in ("5", "6", "7") else 256)
  if h % 8 or h > max_width:
    return f"heads are {h} wide, where this GPU's are multiples of 8 up to {max_width}"
  return f"sequences have {T} positions, where it wants an even number" if T % 2 else ""


def dense(
  q_BTHh: jax.Array,
  k_BTGh: jax.Array,
  v_BTGh: jax.Array,
  segments_BT: jax.Array,
  at: jax.Array,
  sizes: tuple[int | None, ...],
  scale: float,
  implementation: Literal["xla", "cudnn"],
) -> jax.Array:
  """`attention` by a mask [B, T, T]. cuDNN adds it to the scores, its only way to segments
  that jax offers; its own sliding window does not go with that, so the window is in it too."""
  T, width = segments_BT.shape[1], v_BTGh.shape[-1]
  mask_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
  if sizes != (None,):
    window, t = jnp.asarray([w or T for w in sizes])[at], jnp.arange(T)
    mask_BTS &= (t[:, None] - t[None, :] < window)[None]
  if missing := q_BTHh.shape[-1] - width:  # jax has values as wide as keys
    v_BTGh = jnp.pad(v_BTGh, ((0, 0), (0, 0), (0, 0), (0, missing)))
  a_BTHh = jax.nn.dot_product_attention(
    q_BTHh,
    k_BTGh,
    v_BTGh,
    mask=mask_BTS[:, None],
    scale=scale,
    is_causal=True,
    implementation=implementation,
  )
  return a_BTHh[..., :width]


def splash(
  q_BTHh: jax.Array,
  k_BTGh: jax.Array,
  v_BTGh: jax.Array,
  segments_BT: jax.Array,
  at: jax.Array,
  sizes: tuple[int | None, ...],
  scale: float,
  interpret: bool = False,
) -> jax.Array:
  """`attention` by Pallas. Its masks are static, so each window is a kernel of its own.

  The kernel has no scale: queries are scaled in float32 and rounded once more.
  """
  T = segments_BT.shape[1]
  padding = -T % LANES  # positions behind the last one, which none sees

  def padded_heads(x_BTHh: jax.Array) -> jax.Array:
    return jnp.pad(x_BTHh.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))

  q_BTHh = (q_BTHh.astype(jnp.float32) * scale).astype(q_BTHh.dtype)
  segments_BT = jnp.pad(segments_BT, ((0, 0), (0, padding)))

  def kernel_of(window: int | None) -> Callable[..., jax.Array]:
    kernel = jax.vmap(_splash_kernel(T + padding, window, interpret))
    return lambda q, k, v, s: kernel(q, k, v, pallas.SegmentIds(s, s))

  branches = [kernel_of(window) for window in sizes]  # with one of them, no switch is made
  q_k_v = (padded_heads(x) for x in (q_BTHh, k_BTGh, v_BTGh))
  a_BHTh = jax.lax.switch(at, branches, *q_k_v, segments_BT)
  return a_BHTh[:, :, :T].swapaxes(1, 2)


def _splash_kernel(T: int, window: int | None, interpret: bool) -> Callable[..., jax.Array]:
  """For any number of heads: they all have the one mask, which Pallas caches."""
  if window is None or window >= T:
    mask: pallas.CausalMask | pallas.LocalMask = pallas.CausalMask((T, T))
  else:
    mask = pallas.LocalMask((T, T), (window - 1, 0), 0)
  block = next(b for b in BLOCKS if T % b == 0)
  blocks = pallas.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  return pallas.make_splash_mha(
    pallas.MultiHeadMask([mask]),
    block_sizes=blocks,
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
