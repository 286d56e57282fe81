"""Operations of a step by closed formulas, from the parameters' own declarations.

A product of [m, k] and [k, n] is 2 m k n operations. Of a decoder's weights every position
passes all but the embedding table, which is looked up, and of an expert layer K of E experts.
Attention is causal: position t sees t + 1 positions, or its window. Norms, softmax and rope are
not counted, nor is what documents in one row do not see of each other.

A backward pass is twice the forward one: a product each for the inputs' and the weights'
gradients. The head's gradient needs no second forward pass (head.py).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from distill_jax.config import Config
from distill_jax.models import loading
from distill_jax.models.options import ModelOptions
from distill_jax.nn import layer_sharing, lora, params
from distill_jax.training import loop


@dataclasses.dataclass(frozen=True)
class Flops:
  """Operations of one forward pass of one model, over all devices."""

  weights: float  # of layers: attention's and feed-forwards' products with weights
  attention: float  # scores, and sums of values
  head: float

  @property
  def forward(self) -> float:
    return self.weights + self.attention + self.head


def model(spec: ModelOptions, rows: int, seq_len: int) -> Flops:
  """Of `rows` sequences of `seq_len` positions."""
  _, c = loading.family_and_config(spec)
  tokens = rows * seq_len
  whole = loading.abstract(spec)
  weights = sum(_active(v, c) for path, v in params.named_params(whole) if path.find(".") > 0)
  wide = c.head_dim + getattr(c, "v_head_dim", c.head_dim)  # of a score, and of a value
  pairs = rows * sum(seen(c, layer, seq_len) for layer in range(c.num_hidden_layers))
  return Flops(
    weights=2.0 * tokens * weights,
    attention=2.0 * pairs * c.num_attention_heads * wide,
    head=2.0 * tokens * c.vocab_size * c.hidden_size,
  )


def active(spec: ModelOptions) -> int:
  """Weights that one position is multiplied with, the head's among them."""
  _, c = loading.family_and_config(spec)
  whole = loading.abstract(spec)
  layers = sum(_active(v, c) for path, v in params.named_params(whole) if path.find(".") > 0)
  return round(layers) + c.vocab_size * c.hidden_size


def _active(v: Any, c: Any) -> float:
  """Numbers of a layer's parameter that one position is multiplied with."""
  meta = v.get_metadata()
  if not meta["out"]:  # a norm or a bias
    return 0
  if "experts" not in meta["axes"]:
    return math.prod(v.shape)
  return math.prod(v.shape) * c.num_experts_per_tok / v.shape[meta["axes"].index("experts")]


def seen(c: Any, layer: int, seq_len: int) -> int:
  """Pairs of a position and one that it attends to, in one sequence."""
  types = getattr(c, "layer_types", ())
  window = c.sliding_window if types and types[layer] != "full_attention" else c.window
  w = min(window or seq_len, seq_len)
  return w * (w + 1) // 2 + (seq_len - w) * w


def step(config: Config, verb: str, rows: int) -> dict[str, float]:
  """Operations of one step over all devices, by what they are for.

  Returns: "layers" (weights), "attention", "head", "teacher" (online), "adapters" (merging
  low-rank ones); and "recomputed", which a model's FLOPs do not count: layers run again
  in the backward pass by remat, scores by the attention kernel.
  """
  T = config.data.seq_len
  if verb == "record":
    one = model(config.teacher, rows, T)
    return {"layers": one.weights, "attention": one.attention, "head": one.head}
  one = model(config.student, rows, T)
  out = {"layers": 3 * one.weights, "attention": 3 * one.attention, "head": 3 * one.head}
  if online := loop.online(config):
    out["teacher"] = sum(model(spec, rows, T).forward for spec in online.values())
  if rank := config.student.lora.rank or config.student.share.lora.rank:
    # A B, and what its factors get of its gradient
    out["adapters"] = 3 * 2.0 * rank * _adapted(config) * config.optim.accumulate
  again = {"none": 0.0, "full": one.weights + one.attention}
  out["recomputed"] = again.get(config.student.remat, one.attention)
  if config.student.attention != "xla":  # a flash kernel makes the scores again, going back
    out["recomputed"] += one.attention / 2
  return out


def _adapted(config: Config) -> int:
  """Numbers of the weights that adapters go on."""
  trained = loading.abstract_trainable(config.student)
  adapters = trained.deltas if isinstance(trained, layer_sharing.Shared) else trained
  joined = lora.join(loading.abstract(config.student), adapters)
  is_adapter = lambda x: isinstance(x, lora.Adapter)
  leaves = jax.tree.leaves(joined, is_leaf=lambda x: is_adapter(x) or params.is_param(x))
  return sum(params.count(x.weight) for x in leaves if is_adapter(x))
