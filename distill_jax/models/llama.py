"""The Llama family: Llama 2 and 3, SmolLM2 (arXiv:2302.13971, arXiv:2407.21783)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill_jax import layers, sharding
from distill_jax.errors import InputError
from distill_jax.params import param, stack, unstack
from distill_jax.types import Inputs, Output

HF_MODEL_TYPES = ("llama",)  # of config.json


def _check_numbers(config: Any) -> None:
  """Refuses, by name, a field of the wrong kind, or a number no model can have."""
  kinds = {"int": (int,), "float": (int, float), "bool": (bool,)}  # annotations are strings here
  for f in dataclasses.fields(config):
    x, kind = getattr(config, f.name), kinds.get(str(f.type))
    if kind and (type(x) not in kind or (kind != (bool,) and not 0 < x < 2**31)):
      raise InputError(f"{f.name} is {x!r:.60}; a {f.type}, above 0 if a number, was expected")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3.1's rope scaling: low frequencies are slowed by `factor`."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int

  def __post_init__(self):
    _check_numbers(self)
    if self.low_freq_factor >= self.high_freq_factor:
      raise InputError(
        f"rope scaling has low_freq_factor {self.low_freq_factor} and high_freq_factor "
        f"{self.high_freq_factor}; the first has to be the smaller"
      )


@dataclasses.dataclass(frozen=True)
class Config:
  """The shape of a model, in Hugging Face's words."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  max_position_embeddings: int
  rms_norm_eps: float = 1e-5
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  tie_word_embeddings: bool = False

  def __post_init__(self):
    _check_numbers(self)
    if self.head_dim % 2:
      raise InputError(f"head_dim is {self.head_dim}; rope turns pairs, so it has to be even")
    if self.num_attention_heads % self.num_key_value_heads:
      raise InputError(
        f"{self.num_attention_heads} attention heads do not divide over "
        f"{self.num_key_value_heads} key/value heads"
      )

  @classmethod
  def from_hf(cls, hf: dict[str, Any]) -> Config:
    """From a Hugging Face config.json; what this family cannot do is refused by name."""
    for key, want in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}.items():
      if hf.get(key, want) != want:
        raise InputError(f"config.json has {key}={hf[key]!r}; the llama family has {want!r} only")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
      raise InputError(f"config.json has rope type {kind!r}; this family has default and llama3")
    heads = hf["num_attention_heads"]
    return cls(
      vocab_size=hf["vocab_size"],
      hidden_size=hf["hidden_size"],
      intermediate_size=hf["intermediate_size"],
      num_hidden_layers=hf["num_hidden_layers"],
      num_attention_heads=heads,
      num_key_value_heads=hf.get("num_key_value_heads") or heads,
      head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
      max_position_embeddings=hf["max_position_embeddings"],
      rms_norm_eps=float(hf["rms_norm_eps"]),
      rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0))),
      rope_scaling=None if kind == "default" else RopeScaling(
        **{f.name: rope[f.name] for f in dataclasses.fields(RopeScaling)}
      ),
      tie_word_embeddings=hf.get("tie_word_embeddings", False),
    )  # fmt: skip

  def to_hf(self) -> dict[str, Any]:
    """The config.json of this model."""
    hf = dataclasses.asdict(self)
    theta, scaling = hf.pop("rope_theta"), hf.pop("rope_scaling")
    rope = {"rope_type": "llama3", **scaling} if scaling else {"rope_type": "default"}
    return {
      "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
      "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
      "initializer_range": 0.02, "use_cache": True, **hf,
      # The first key is read by transformers 5, the two others by older ones and by vLLM.
      "rope_parameters": {**rope, "rope_theta": theta}, "rope_theta": theta,
      "rope_scaling": rope if scaling else None,
    }  # fmt: skip

  def inv_freq(self) -> np.ndarray:
    """Rotary frequencies, float32 [h/2], with Llama 3.1's scaling where there is one."""
    freq = self.rope_theta ** -(np.arange(0, self.head_dim, 2) / self.head_dim)
    if (s := self.rope_scaling) is not None:
      # Wavelengths past original/low are slowed, under original/high kept, between mixed.
      turns = s.original_max_position_embeddings * freq / (2 * math.pi)
      keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
      keep = np.clip(keep, 0, 1)
      freq = keep * freq + (1 - keep) * freq / s.factor
    return freq.astype(np.float32)


TINY = Config(
  vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
  num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
  tie_word_embeddings=True,
)  # fmt: skip

CONFIGS = {
  "tiny": TINY,
  "smollm2-135m": Config(
    vocab_size=49_152, hidden_size=576, intermediate_size=1_536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8_192,
    rope_theta=100_000.0, tie_word_embeddings=True,
  ),
}  # fmt: skip


class Block(nnx.Module):
  """One layer: attention, then feed-forward, each normed and added to the residual."""

  def __init__(self, c: Config, key: jax.Array):
    D, H, G, h, F = (
      c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.intermediate_size,
    )  # fmt: skip
    keys = iter(jax.random.split(key, 9))
    at = "model.layers.{layers}."
    norm = lambda name: param(next(keys), f"norm:{D}", f"{at}{name}.weight", init="ones")
    linear = lambda name, dims, out: param(next(keys), dims, f"{at}{name}.weight", out)
    self.eps = c.rms_norm_eps
    self.attn_norm = norm("input_layernorm")
    self.q = linear("self_attn.q_proj", f"embed:{D} heads:{H} head_dim:{h}", "heads head_dim")
    self.k = linear("self_attn.k_proj", f"embed:{D} kv_heads:{G} head_dim:{h}", "kv_heads head_dim")
    self.v = linear("self_attn.v_proj", f"embed:{D} kv_heads:{G} head_dim:{h}", "kv_heads head_dim")
    self.o = linear("self_attn.o_proj", f"heads:{H} head_dim:{h} embed:{D}", "embed")
    self.mlp_norm = norm("post_attention_layernorm")
    self.gate = linear("mlp.gate_proj", f"embed:{D} mlp:{F}", "mlp")
    self.up = linear("mlp.up_proj", f"embed:{D} mlp:{F}", "mlp")
    self.down = linear("mlp.down_proj", f"mlp:{F} embed:{D}", "embed")

  def qkv(self, x_BTD: jax.Array, angles: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, H, h], keys and values [B, T, G, h] from the layer's input."""
    y_BTD = layers.rms_norm(x_BTD, self.attn_norm[...], self.eps)
    q_BTHh = layers.rope(jnp.einsum("BTD,DHh->BTHh", y_BTD, self.q[...]), angles)
    k_BTGh = layers.rope(jnp.einsum("BTD,DGh->BTGh", y_BTD, self.k[...]), angles)
    v_BTGh = jnp.einsum("BTD,DGh->BTGh", y_BTD, self.v[...])
    return q_BTHh, k_BTGh, v_BTGh

  def __call__(self, x_BTD: jax.Array, angles: Any, segments_BT: jax.Array) -> jax.Array:
    with jax.named_scope("attention"):
      a_BTHh = layers.attention(*self.qkv(x_BTD, angles), segments_BT)
      x_BTD = x_BTD + jnp.einsum("BTHh,HhD->BTD", a_BTHh, self.o[...])
    with jax.named_scope("mlp"):
      y_BTD = layers.rms_norm(x_BTD, self.mlp_norm[...], self.eps)
      return x_BTD + layers.swiglu(y_BTD, self.gate[...], self.up[...], self.down[...])


class Model(nnx.Module):
  """Tokens in, hidden states and the unembedding out."""

  def __init__(self, c: Config, key: jax.Array):
    keys = jax.random.split(key, 4)
    V, D = c.vocab_size, c.hidden_size
    self.config = c
    self.embed = param(
      keys[0], f"vocab:{V} table:{D}", "model.embed_tokens.weight", "vocab", init=0.02
    )
    self.layers = stack(c.num_hidden_layers, lambda k: Block(c, k), keys[1])
    self.norm = param(keys[2], f"norm:{D}", "model.norm.weight", init="ones")
    if not c.tie_word_embeddings:
      self.head = param(keys[3], f"vocab:{V} embed:{D}", "lm_head.weight", "vocab")

  def __call__(self, inputs: Inputs, how: layers.Compute, taps: tuple[int, ...] = ()) -> Output:
    """Args: inputs, int32 [B, T]; taps, the layers whose output is kept. Returns: Output."""
    with jax.named_scope("embed"):
      embed_VD = how.view(self.embed)[...]
      x_BTD = sharding.constrain(embed_VD[inputs.tokens_BT], "batch seq embed", how.rules)
    angles = layers.rope_angles(inputs.positions_BT, self.config.inv_freq())
    x_BTD, taps_PBTD = layers.scan_layers(
      self.layers, lambda layer, x: layer(x, angles, inputs.segments_BT), x_BTD, taps, how
    )
    x_BTD = layers.rms_norm(x_BTD, self.norm[...], self.config.rms_norm_eps)
    head_VD = embed_VD if self.config.tie_word_embeddings else how.view(self.head)[...]
    return Output(x_BTD, head_VD, taps_PBTD)

  def qkv(self, layer: int, x_BTD: jax.Array, inputs: Inputs, how: layers.Compute):
    """Queries, keys and values of one layer, from the output of the layer before it."""
    block = how.view(unstack(jax.tree.map(lambda w: w[layer], self.layers)))
    return block.qkv(x_BTD, layers.rope_angles(inputs.positions_BT, self.config.inv_freq()))
