"""Measures the importance of a model's parts on calibration text, and its loss without layers.

One forward pass, a scan over layers as in training, computes how much each part of a layer adds to
the residual stream. It returns only sums over positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.models import DecoderBlock, DecoderModel, Experts
from distill_jax.nn import fused_head, layers, params, sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.runtime import distributed
from distill_jax.types import Batch, Inputs, JsonObject, Mean

Importance = dict[str, dict[str, np.ndarray]]  # by stack and statistic; see `importance`
LossFn = Callable[[DecoderModel, Batch, np.ndarray], Mean]  # (model, batch, mask [L] of layers)
ROOT_MEAN_SQUARES = ("heads", "mlp", "expert_mlp")
Sums = dict[str, JsonObject]  # by stack ("" for the rest of the model) and statistic


def importance(
  model: DecoderModel,
  batches: Sequence[Batch],
  compute: ComputeConfig,
  within_experts: bool,
  on_batch: Callable[[int], object] = lambda positions: None,
) -> Importance:
  """Returns means over all positions, float64, by stack of layers and statistic.

  The statistics of a stack, whose first axis is its layers, are:
    influence [L]: 1 - cosine of a layer's input and output (ShortGPT, arXiv:2403.03853).
    heads [L, H], mlp [L, F], expert_mlp [L, E, F]: the root mean square of a head's or channel's
      contribution to the residual. Minitron (arXiv:2407.14679) uses the size of the activation.
      Here it is multiplied by the norm of the weights that read it, so that channels that nothing
      reads also score zero.
    experts [L, E]: the mean weight from the router.
    NAME.energy [L, D] for each norm: the mean square of each channel of its input, divided by the
      mean square of the whole vector. Its average over channels is 1.
  The statistic norm.energy [D] of the final norm is in the entry "".

  Args:
    model: the model.
    batches: the calibration text.
    compute: the settings of the computation.
    within_experts: whether to measure expert_mlp, for which every expert processes every position.
    on_batch: called after each batch with its number of positions.
  """
  watch = jax.jit(functools.partial(_sums, compute=compute, within_experts=within_experts))
  total: Any = None
  for batch in batches:
    sums = watch(model, batch.inputs)
    sums = jax.tree.map(lambda x: distributed.to_host(x).astype(np.float64), sums)
    total = sums if total is None else jax.tree.map(np.add, total, sums)
    on_batch(batch.mask_BT.size)
  count = total[""].pop("positions")
  return {
    stack: {
      name: np.sqrt(x / count) if name in ROOT_MEAN_SQUARES else x / count
      for name, x in named.items()
    }
    for stack, named in total.items()
  }


def _sums(
  model: DecoderModel, inputs: Inputs, *, compute: ComputeConfig, within_experts: bool
) -> Sums:
  x_BTD, _ = model.embed_tokens(inputs.tokens_BT, compute)
  position_inputs, valid_BT = model.position_inputs(inputs), inputs.segments_BT > 0
  sums: Sums = {}
  first = 0
  for name, _, n in model.layer_stacks(model.config):

    def body(x_BTD, layer_and_number):
      layer, i = layer_and_number
      block = compute.cast_and_gather(params.unstack(layer))
      angles, window = position_inputs(i)
      attend = functools.partial(
        block.attend_heads,
        angles=angles,
        window=window,
        segments_BT=inputs.segments_BT,
        compute=compute,
      )
      z_BTD, layer_sums = _layer(block, x_BTD, attend, valid_BT, compute, within_experts)
      return sharding.constrain(z_BTD, "batch seq embed", compute.rules), layer_sums

    numbers = np.arange(first, first + n, dtype=np.int32)
    x_BTD, sums[name] = jax.lax.scan(body, x_BTD, (getattr(model, name), numbers))
    first += n
  c = model.config
  sums[""] = {
    "norm.energy": _energy(x_BTD, valid_BT, c.rms_norm_eps),
    "positions": jnp.sum(valid_BT, dtype=jnp.float32),
  }
  return sums


def _layer(
  block: DecoderBlock,
  x_BTD: jax.Array,
  attend: Callable[[jax.Array], jax.Array],
  valid_BT: jax.Array,
  compute: ComputeConfig,
  within_experts: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns one layer's output, and its statistics summed over positions."""
  c = block.config
  a_BTHh = attend(x_BTD)
  mid_BTD = x_BTD + block.project_heads(a_BTHh)
  out_BTD = mid_BTD + block.feed_forward(mid_BTD, compute.rules)
  y_BTD = block.norm(mid_BTD, block.mlp_norm)
  norm_inputs = {"attn_norm": x_BTD, "mlp_norm": mid_BTD}
  if block.attn_post_norm is not None:  # outputs are normed before they are added
    norm_inputs["attn_post_norm"] = DecoderBlock.project_heads(block, a_BTHh)
    norm_inputs["mlp_post_norm"] = DecoderBlock.feed_forward(block, mid_BTD, compute.rules)
  sums = {
    "influence": _sum(1 - _cosine(x_BTD, out_BTD), valid_BT),
    "heads": _sum(_head_energy(a_BTHh, block.o[...]), valid_BT),
  }
  sums |= {f"{k}.energy": _energy(x, valid_BT, c.rms_norm_eps) for k, x in norm_inputs.items()}
  if block.HAS_DENSE_MLP:
    h_BTF = _gated(y_BTD, block.gate[...], block.up[...], block.activation)
    sums["mlp"] = _sum(h_BTF**2, valid_BT) * _energy_of_rows(block.down[...])
  if block.experts is not None:
    sums |= _experts(block, block.experts, y_BTD, valid_BT, within_experts)
  return out_BTD, sums


def _experts(
  block: DecoderBlock, experts: Experts, y_BTD: jax.Array, valid_BT: jax.Array, within: bool
) -> dict[str, jax.Array]:
  """Returns the use of each expert, and with `within` also the energy of each of its channels."""
  ids_BTK, weight_BTK = block.route(y_BTD)
  E = experts.router.shape[-1]
  weight_BTE = jnp.sum(jax.nn.one_hot(ids_BTK, E) * weight_BTK[..., None], 2)
  sums = {"experts": _sum(weight_BTE, valid_BT)}
  if within:

    def channels(expert):
      gate, up, down, weight_BT = expert
      h_BTF = _gated(y_BTD, gate, up, jax.nn.silu) * weight_BT[..., None]
      return _sum(h_BTF**2, valid_BT) * _energy_of_rows(down)

    weights = experts.gate[...], experts.up[...], experts.down[...]
    sums["expert_mlp"] = jax.lax.map(channels, (*weights, jnp.moveaxis(weight_BTE, -1, 0)))
  return sums


def _gated(x_BTD, gate_DF, up_DF, activation) -> jax.Array:
  return activation(x_BTD @ gate_DF) * (x_BTD @ up_DF)


def _sum(x_BT: jax.Array, valid_BT: jax.Array) -> jax.Array:
  """Sums [B, T, ...] to [...] over positions that are not padding, in float32."""
  valid_BT = valid_BT.reshape(*valid_BT.shape, *[1] * (x_BT.ndim - 2))
  return jnp.sum(jnp.where(valid_BT, x_BT.astype(jnp.float32), 0), (0, 1))


def _cosine(a_BTD: jax.Array, b_BTD: jax.Array) -> jax.Array:
  a_BTD, b_BTD = a_BTD.astype(jnp.float32), b_BTD.astype(jnp.float32)
  norms = jnp.linalg.norm(a_BTD, axis=-1) * jnp.linalg.norm(b_BTD, axis=-1)
  return jnp.sum(a_BTD * b_BTD, -1) / jnp.maximum(norms, 1e-30)


def _head_energy(a_BTHh: jax.Array, o_HhD: jax.Array) -> jax.Array:
  """Returns the squared norm of each head's contribution, [B, T, H], from the Gram matrix."""
  gram_Hhh = jnp.einsum("HhD,HkD->Hhk", o_HhD, o_HhD, preferred_element_type=jnp.float32)
  a_BTHh = a_BTHh.astype(jnp.float32)
  return jnp.maximum(jnp.einsum("BTHh,Hhk,BTHk->BTH", a_BTHh, gram_Hhh, a_BTHh), 0)


def _energy_of_rows(down_FD: jax.Array) -> jax.Array:
  return jnp.sum(down_FD.astype(jnp.float32) ** 2, -1)


def _energy(x_BTD: jax.Array, valid_BT: jax.Array, eps: float) -> jax.Array:
  unit_D = jnp.ones(x_BTD.shape[-1])
  return _sum(layers.rms_norm(x_BTD.astype(jnp.float32), unit_D, eps) ** 2, valid_BT)


def make_loss(compute: ComputeConfig, chunk: int, vocab_size: int) -> LossFn:
  """Returns the compiled function of `loss`. Removed layers are an argument, not a constant.

  Args:
    compute: the settings of the computation.
    chunk: the number of positions whose logits are in memory at once.
    vocab_size: the number of tokens.
  """
  return jax.jit(
    functools.partial(_loss_without, compute=compute, chunk=chunk, vocab_size=vocab_size)
  )


def loss(
  loss_fn: LossFn, model: DecoderModel, batches: Sequence[Batch], without: Sequence[int] = ()
) -> float:
  """Returns the cross-entropy in nats per label.

  Args:
    loss_fn: from `make_loss`.
    model: the model.
    batches: the text.
    without: numbers of the layers to skip.
  """
  runs_L = np.ones(model.config.num_hidden_layers, bool)
  runs_L[list(without)] = False
  means = [loss_fn(model, batch, runs_L) for batch in batches]
  return float(sum(means[1:], means[0]).value())


def _loss_without(
  model: DecoderModel,
  batch: Batch,
  runs_L: jax.Array,
  *,
  compute: ComputeConfig,
  chunk: int,
  vocab_size: int,
) -> Mean:
  inputs = batch.inputs
  assert isinstance(inputs, Inputs)
  x_BTD, embed_VD = model.embed_tokens(inputs.tokens_BT, compute)
  position_inputs = model.position_inputs(inputs)

  def apply(layer, i, x_BTD):
    def run(x_BTD):
      return layer(x_BTD, *position_inputs(i), inputs.segments_BT, compute)

    return jax.lax.cond(runs_L[i], run, lambda x_BTD: x_BTD, x_BTD)

  stacks = [getattr(model, name) for name, _, _ in model.layer_stacks(model.config)]
  x_BTD, _ = layers.scan_layers(stacks, apply, x_BTD, (), compute)
  out = model.output(x_BTD, embed_VD, compute)

  def ce(z_BCV: jax.Array, piece: Batch) -> Mean:
    z_BCV = fused_head.soft_cap(z_BCV, out.soft_cap)
    return Mean.of(-fused_head.label_logp(z_BCV, piece.labels_BT), piece.mask_BT)

  return fused_head.fold(ce, out.hidden_BTD, out.head_VD, batch, chunk, vocab_size)
