"""DeepSeek-V3 and R1: latent attention and many small experts (arXiv:2412.19437)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp

from distill_jax.errors import bad_value
from distill_jax.models import _decoder, _rope
from distill_jax.models._declare import Declare
from distill_jax.models._experts import Experts, check_top_k, grouped_top_k
from distill_jax.nn import attention, kv_cache, layers, sharding
from distill_jax.nn.products import product
from distill_jax.types import QKV, JsonObject

HF_MODEL_TYPES = ("deepseek_v3",)  # model_type in config.json


@dataclasses.dataclass(frozen=True)
class Config(_decoder.Config):
  """A model's architecture, under Hugging Face's field names.

  `head_dim` is the width of queries and keys, `v_head_dim` that of values. Layers from
  `first_k_dense_replace` on have experts.
  """

  rms_norm_eps: float = 1e-6
  q_lora_rank: int | None = None
  kv_lora_rank: int = 512
  qk_nope_head_dim: int = 128
  qk_rope_head_dim: int = 64
  v_head_dim: int = 128
  rope_interleave: bool = True
  first_k_dense_replace: int = 0
  n_routed_experts: int = 256
  num_experts_per_tok: int = 8
  moe_intermediate_size: int = 2_048
  n_shared_experts: int = 1
  n_group: int = 8
  topk_group: int = 4
  norm_topk_prob: bool = True
  routed_scaling_factor: float = 2.5
  num_nextn_predict_layers: int = 0  # extra layers at the end of the checkpoint; not read

  MODEL_TYPE = "deepseek_v3"
  ARCHITECTURE = "DeepseekV3ForCausalLM"
  SUPPORTED_VALUES = {
    "hidden_act": "silu",
    "attention_bias": False,
    "moe_layer_freq": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
  }
  OPTIONAL_ZERO = ("first_k_dense_replace", "num_nextn_predict_layers")

  def __post_init__(self):
    super().__post_init__()
    check_top_k(self.num_experts_per_tok, self.n_routed_experts)
    action = "Correct the model's config"
    experts, groups = self.n_routed_experts, self.n_group
    if experts % groups or experts < 2 * groups:
      expected = f"a multiple of n_group, {groups}, with at least 2 experts per group"
      raise bad_value("n_routed_experts", experts, expected, action)
    if self.topk_group > groups:
      raise bad_value("topk_group", self.topk_group, f"at most n_group, {groups}", action)
    if self.num_experts_per_tok > (in_groups := experts // groups * self.topk_group):
      expected = f"at most {in_groups}, the number of experts in topk_group groups"
      raise bad_value("num_experts_per_tok", self.num_experts_per_tok, expected, action)
    if self.head_dim != (width := self.qk_nope_head_dim + self.qk_rope_head_dim):
      expected = f"{width}, the sum of qk_nope_head_dim and qk_rope_head_dim"
      raise bad_value("head_dim", self.head_dim, expected, action)
    if self.v_head_dim > self.head_dim:
      expected = f"at most {self.head_dim}, the width of queries"
      raise bad_value("v_head_dim", self.v_head_dim, expected, action)

  @classmethod
  def from_hf(cls, hf: JsonObject) -> Self:
    if hf.get("num_key_value_heads") not in (None, hf["num_attention_heads"]):
      key, expected = "num_key_value_heads", f"num_attention_heads, {hf['num_attention_heads']}"
      raise bad_value(f"{key} in config.json", hf[key], expected, "Use another model")
    # head_dim in config.json, if transformers has written it, is the width of the rotated part.
    head_dim = hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"]
    mtp = hf.get("num_nextn_predict_layers", hf.get("num_mtp_layers", 0))
    return super().from_hf({**hf, "head_dim": head_dim, "num_nextn_predict_layers": mtp})

  def to_hf(self) -> JsonObject:
    hf = super().to_hf()
    return {**hf, "head_dim": self.qk_rope_head_dim, "num_nextn_predict_layers": 0}

  def keep_layers(self, kept: tuple[int, ...]) -> Self:
    dense = [i < self.first_k_dense_replace for i in kept]
    if dense != sorted(dense, reverse=True):
      expected = f"dense layers, i.e. the first {self.first_k_dense_replace}, before all others"
      raise bad_value("keep_layers", kept, expected, "Change the order")
    n = {"num_hidden_layers": len(kept), "first_k_dense_replace": sum(dense)}
    return dataclasses.replace(self, **n)  # type: ignore[arg-type]

  def ignores_tensor(self, name: str) -> bool:
    """Returns whether a tensor is unused, e.g. in a layer that predicts further tokens."""
    found = re.match(r"model\.layers\.([0-9]{1,9})\.", name)
    first = self.num_hidden_layers
    past = found is not None and first <= int(found[1]) < first + self.num_nextn_predict_layers
    return past or super().ignores_tensor(name)

  @property
  def attention_width(self) -> int:
    return self.head_dim + self.v_head_dim

  @property
  def decode_attention_width(self) -> int:
    return self.cache_width + self.kv_lora_rank  # both in the latents' space

  @property
  def cache_width(self) -> int:
    return self.kv_lora_rank + self.qk_rope_head_dim

  @property
  def expert_groups(self) -> int:
    return self.n_group

  @property
  def attention_scale(self) -> float:
    s, scale = self.rope_scaling, self.head_dim**-0.5
    if isinstance(s, _rope.Yarn) and s.mscale_all_dim is not None:
      return scale * s.sharpness(s.mscale_all_dim) ** 2
    return scale

  @property
  def value_head_dim(self) -> int:
    return self.v_head_dim

  @property
  def rope_dim(self) -> int:
    return self.qk_rope_head_dim


class Block(_decoder.Block):
  """One dense layer, whose queries, keys and values are computed from narrow latents.

  Letters of this file: rope rotates r elements of a head and not the other u; w is the width of
  values.
  """

  config: Config
  CACHE = {"latent": "batch latent seq"}

  def declare_attention(self, declare: Declare) -> None:
    c = self.config
    D, H, at = c.hidden_size, c.num_attention_heads, "self_attn."
    q_heads = f"heads:{H} head_dim:{c.head_dim}"
    if c.q_lora_rank is None:
      self.q = declare.linear(f"{at}q_proj", f"embed:{D} {q_heads}", "heads head_dim")
    else:
      R = c.q_lora_rank
      self.q_down = declare.linear(f"{at}q_a_proj", f"embed:{D} latent:{R}", "latent")
      self.q_norm = declare.rms_norm(f"{at}q_a_layernorm", R)
      up = f"from_latent:{R} {q_heads}"
      self.q_up = declare.linear(f"{at}q_b_proj", up, "heads head_dim")
    R = c.kv_lora_rank
    down = f"embed:{D} latent:{R + c.qk_rope_head_dim}"
    up = f"from_latent:{R} heads:{H} head_dim:{c.qk_nope_head_dim + c.v_head_dim}"
    self.kv_down = declare.linear(f"{at}kv_a_proj_with_mqa", down, "latent")
    self.kv_norm = declare.rms_norm(f"{at}kv_a_layernorm", R)
    self.kv_up = declare.linear(f"{at}kv_b_proj", up, "heads head_dim")
    self.o = declare.linear(f"{at}o_proj", f"heads:{H} head_dim:{c.v_head_dim} embed:{D}", "embed")

  def qkv(self, x_BTD: jax.Array, angles: layers.Angles) -> QKV:
    """Returns queries and keys [B, T, H, h] and values [B, T, H, w] for the layer's input."""
    q_BTHh, kv_BTR, k_rope_BTr = self._latents(x_BTD, angles)
    return q_BTHh, *self._expand(kv_BTR, k_rope_BTr, self.kv_up[...])

  def gathered_qkv(
    self, x_BTD: jax.Array, angles: layers.Angles
  ) -> tuple[jax.Array, Sequence[jax.Array], dict[str, Any]]:
    """Returns queries, the latents to gather, and how each device expands those of its heads.

    The latents are 71 times narrower in R1 than keys and values.
    """
    q_BTHh, *latents = self._latents(x_BTD, angles)
    return (
      q_BTHh,
      latents,
      {
        "gathered_axes": "batch seq latent",
        "expand": self._expand,
        "weights": [self.kv_up[...]],
        "weight_axes": ["from_latent heads head_dim"],
      },
    )

  def _expand(
    self, kv_BTR: jax.Array, k_rope_BTr: jax.Array, up_RHh: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Returns keys [B, T, H, h] and values [B, T, H, w] of the heads of `up_RHh`."""
    c = self.config
    k_and_v_BTHh = product(kv_BTR, up_RHh)
    k_BTHu, v_BTHw = jnp.split(k_and_v_BTHh, [c.qk_nope_head_dim], -1)
    # All heads share one rotated key.
    k_rope_BTHr = jnp.broadcast_to(k_rope_BTr[:, :, None], (*k_BTHu.shape[:3], c.qk_rope_head_dim))
    return jnp.concatenate([k_BTHu, k_rope_BTHr], -1), v_BTHw

  def _latents(
    self, x_BTD: jax.Array, angles: layers.Angles
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns queries [B, T, H, h], latents for keys and values [B, T, R], keys [B, T, r]."""
    c, y_BTD = self.config, self.norm(x_BTD, self.attn_norm)
    if c.q_lora_rank is None:
      q_BTHh = product(y_BTD, self.q[...])
    else:
      q_BTR = layers.rms_norm(product(y_BTD, self.q_down[...]), self.q_norm[...], LATENT_EPS)
      q_BTHh = product(q_BTR, self.q_up[...])
    kv_BTR, k_rope_BTr = jnp.split(product(y_BTD, self.kv_down[...]), [c.kv_lora_rank], -1)
    q_BTHu, q_rope_BTHr = jnp.split(q_BTHh, [c.qk_nope_head_dim], -1)
    q_rope_BTHr = layers.rope(q_rope_BTHr, angles, c.rope_interleave)
    q_BTHh = jnp.concatenate([q_BTHu, q_rope_BTHr], -1)
    kv_BTR = layers.rms_norm(kv_BTR, self.kv_norm[...], LATENT_EPS)
    k_rope_BTr = layers.rope(k_rope_BTr[:, :, None], angles, c.rope_interleave)[:, :, 0]
    return q_BTHh, kv_BTR, k_rope_BTr

  def project_for_cache(
    self, x_BTD: jax.Array, angles: layers.Angles
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns queries in the space of the latents, and the latent with the rotated key to cache.

    Scores are q (c W)^T = (q W^T) c^T, so all heads share one key (arXiv:2405.04434, 2.1.2).
    """
    c = self.config
    q_BTHh, kv_BTR, k_rope_BTr = self._latents(x_BTD, angles)
    q_BTHu, q_rope_BTHr = jnp.split(q_BTHh, [c.qk_nope_head_dim], -1)
    up_RHu = self.kv_up[...][..., : c.qk_nope_head_dim]
    q_BTHR = jnp.einsum("BTHu,RHu->BTHR", q_BTHu, up_RHu)
    latent_BTh = jnp.concatenate([kv_BTR, k_rope_BTr], -1)  # here h = R + r
    return jnp.concatenate([q_BTHR, q_rope_BTHr], -1), {"latent": latent_BTh}

  def attend_cached(
    self,
    q_BTHh: jax.Array,
    positions_BT: jax.Array,
    cache: kv_cache.LayerCache,
    window: attention.Window,
  ) -> jax.Array:
    """Returns the output of the attention heads over a cache."""
    a_BTHR = super().attend_cached(q_BTHh, positions_BT, cache, window)
    up_RHw = self.kv_up[...][..., self.config.qk_nope_head_dim :]
    return jnp.einsum("BTHR,RHw->BTHw", a_BTHR, up_RHw)

  def keys_and_values(self, cached: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """A cached vector is the key of all heads; its first R elements are their value."""
    k_BGhZ = cached["latent"][:, None]
    return k_BGhZ, k_BGhZ[:, :, : self.config.kv_lora_rank].swapaxes(2, 3)


LATENT_EPS = 1e-6  # epsilon of the latents' norms, which config.json does not change


class SparseBlock(Block):
  """One layer with routed experts, chosen by sigmoid scores, and shared experts."""

  experts: Experts

  def declare_mlp(self, declare: Declare) -> None:
    c = self.config
    D, E, F = c.hidden_size, c.n_routed_experts, c.moe_intermediate_size
    self.experts = Experts(declare, D, E, F)
    # This bias balances the experts' load. It is used to choose experts, not to weight them, so
    # it has no gradient. It is exact because many of its values are equal in bfloat16.
    self.balance = declare.bias("mlp.gate", E, tensor="e_score_correction_bias", exact=True)
    shared, at = F * c.n_shared_experts, "mlp.shared_experts."
    self.gate = declare.linear(f"{at}gate_proj", f"embed:{D} mlp:{shared}", "mlp")
    self.up = declare.linear(f"{at}up_proj", f"embed:{D} mlp:{shared}", "mlp")
    self.down = declare.linear(f"{at}down_proj", f"mlp:{shared} embed:{D}", "embed")

  def feed_forward(self, x_BTD: jax.Array, rules: sharding.Rules) -> jax.Array:
    y_BTD = self.norm(x_BTD, self.mlp_norm)
    routed_BTD = self.experts(y_BTD, *self.route(y_BTD), rules)
    return routed_BTD + super().feed_forward(x_BTD, rules)

  def route(self, y_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (ids, weights) [B, T, K] of the experts of each normed position."""
    c, score_BTE = self.config, jax.nn.sigmoid(self.experts.logits(y_BTD))
    ids_BTK, weight_BTK = grouped_top_k(
      score_BTE,
      self.balance[...],
      c.num_experts_per_tok,
      c.n_group,
      c.topk_group,
      c.norm_topk_prob,
    )
    return ids_BTK, weight_BTK * c.routed_scaling_factor


class Model(_decoder.Model):
  """A decoder: tokens to hidden states and the unembedding."""

  @staticmethod
  def layer_stacks(c: Config) -> _decoder.LayerStacks:
    dense = min(c.first_k_dense_replace, c.num_hidden_layers)
    stacks = (
      layers.LayerStack("dense", Block, dense),
      layers.LayerStack("layers", SparseBlock, c.num_hidden_layers - dense),
    )
    return tuple(stack for stack in stacks if stack.size)


TINY = Config(
  **_decoder.TINY | {"num_key_value_heads": 4, "head_dim": 12},
  q_lora_rank=16,
  kv_lora_rank=24,
  qk_nope_head_dim=8,
  qk_rope_head_dim=4,
  v_head_dim=10,
  first_k_dense_replace=1,
  n_routed_experts=8,
  num_experts_per_tok=3,
  moe_intermediate_size=24,
  n_group=4,
  topk_group=2,
)

CONFIGS = {
  "tiny": TINY,
  "deepseek-v3": Config(  # and R1
    vocab_size=129_280,
    hidden_size=7_168,
    intermediate_size=18_432,
    num_hidden_layers=61,
    num_attention_heads=128,
    num_key_value_heads=128,
    head_dim=192,
    q_lora_rank=1_536,
    max_position_embeddings=163_840,
    first_k_dense_replace=3,
    rope_scaling=_rope.Yarn(40.0, 4_096, mscale=1.0, mscale_all_dim=1.0),
  ),
}
