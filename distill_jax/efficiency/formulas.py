"""The cost of serving a model, computed from its config: bytes, operations, and bounds on speed.

Weights are counted from their declarations; cache and attention follow the published equations.
Latent attention caches one latent and one rotated key per position and decodes in the space of the
latents (arXiv:2405.04434, 2.1.2), like models/deepseek_v3.py. A layer with a window caches the
window.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from flax import nnx

from distill_jax.models import DecoderConfig
from distill_jax.models.loading import ModelSource
from distill_jax.nn import params
from distill_jax.preflight import flops, roofline
from distill_jax.preflight.chips import Chip
from distill_jax.types import JsonObject

# Dtypes of served weights and caches, and bytes per element. Of float8 weights, only the layers'
# matrices are float8; see `param_bytes`.
DTYPES = {"float32": 4, "bfloat16": 2, "float8": 1}
BLOCK = 128  # float8 weights have a float32 scale for each square block of this size


@dataclasses.dataclass(frozen=True)
class WeightBytes:
  """Bytes of a model's weights, grouped by when a decode step reads them.

  Attributes:
    total: all weights.
    every_step: weights that every decode step reads: all except routed experts and an embedding
      table that is not also the head (a step reads only one row of it per token).
    experts: all routed experts of all layers.
    num_experts: the number of routed experts in a layer; 0 without experts.
    experts_per_token: the number of experts that process a token in a layer.
  """

  total: int
  every_step: int
  experts: int
  num_experts: int
  experts_per_token: int

  def read(self, batch: int) -> float:
    """Returns the bytes of weights that one decode step of `batch` rows reads."""
    if not self.num_experts:
      return self.every_step
    return self.every_step + self.experts * self.distinct_experts(batch) / self.num_experts

  def distinct_experts(self, batch: int) -> float:
    """Returns the expected number of a layer's experts that a decode step of `batch` rows reads."""
    return flops.distinct(self.num_experts, self.experts_per_token, batch)


def weight_bytes(source: ModelSource, dtype: str) -> WeightBytes:
  """Returns the bytes of a model that is served in `dtype`, one of DTYPES."""
  c: Any = source.config  # the Config of a decoder
  total = experts = table = n = 0
  for path, v in params.named_params(source.abstract):
    size, axes = param_bytes(v, dtype), v.get_metadata()["axes"]
    total += size
    if "experts" in axes:
      experts, n = experts + size, v.shape[axes.index("experts")]
    if path == "embed" and not c.tie_word_embeddings:
      table = size
  per_token = c.num_experts_per_tok if n else 0
  return WeightBytes(total, total - experts - table, experts, n, per_token)


def param_bytes(v: nnx.Variable, dtype: str) -> int:
  """Returns the bytes of one declared parameter.

  float8 means the format of DeepSeek-V3 (arXiv:2412.19437, 3.3): block-scaled matrices of layers,
  routers excepted, with their scales; other parameters are bfloat16. Parameters declared exact are
  always float32.
  """
  meta, count = v.get_metadata(), math.prod(v.shape)
  if meta["exact"]:
    return 4 * count
  if dtype != "float8":
    return DTYPES[dtype] * count
  if not meta["out"] or meta["axes"][0] != "layers" or "routes" in meta["axes"]:
    return 2 * count
  rows = columns = copies = 1
  for axis, size in zip(meta["axes"], v.shape, strict=True):
    if axis in ("layers", "experts"):
      copies *= size
    elif axis in meta["out"]:
      rows *= size
    else:
      columns *= size
  return count + 4 * copies * math.ceil(rows / BLOCK) * math.ceil(columns / BLOCK)


def cache_numbers(c: DecoderConfig, context: int) -> int:
  """Returns the number of elements that a server caches for a row, and reads for its next token."""
  return c.cache_width * flops.all_attended_positions(c, context)


def allocated_cache_numbers(c: DecoderConfig, context: int) -> int:
  """Returns the number of elements that generation/ allocates per row: all positions and layers."""
  return c.cache_width * c.num_hidden_layers * context


def prefill_flops(source: ModelSource, context: int) -> float:
  """Returns operations per token for a prompt of `context` tokens, with logits of the last one."""
  forward = flops.forward_flops(source, 1, context)
  return (forward.weights + forward.attention + forward.head / context) / context


@dataclasses.dataclass(frozen=True)
class ServingCost:
  """The bytes and operations that bound the decode steps of a served model.

  Attributes:
    weights: bytes of the weights.
    cache: bytes of the cache per row.
    flops: operations for a row's next token.
  """

  weights: WeightBytes
  cache: float
  flops: float

  def memory(self, batch: int) -> float:
    """Returns the bytes of weights and cache."""
    return self.weights.total + batch * self.cache

  def min_chips(self, chip: Chip, batch: int) -> int:
    """Returns the minimum number of chips whose memory holds weights and cache."""
    return math.ceil(self.memory(batch) / chip.memory)

  def step_bound(self, chip: Chip, chips: int, batch: int) -> roofline.Bound:
    """Returns the minimum seconds of a decode step that all chips share evenly.

    Weights and caches are read once per step, and products run at the bfloat16 peak. Communication
    between chips is not counted.
    """
    read = self.weights.read(batch) + batch * self.cache
    return roofline.bound(chip, chips, chips, {"step": batch * self.flops}, read / chips, {})

  def decode_bound(self, chip: Chip, batch: int) -> JsonObject:
    """Returns one row of the report, on the minimum number of chips."""
    chips = self.min_chips(chip, batch)
    bound = self.step_bound(chip, chips, batch)
    w = self.weights
    return {
      "batch_size": batch,
      "chips": chips,
      "bytes": self.memory(batch),
      "bytes_read": w.read(batch) + batch * self.cache,
      "experts_read": w.distinct_experts(batch) if w.num_experts else None,
      "step_seconds": bound.seconds,
      "bound_by": bound.by,
      "tokens_per_second": batch / bound.seconds,
      "tokens_per_second_per_chip": batch / bound.seconds / chips,
    }


def serving_cost(source: ModelSource, context: int, dtype: str, cache_dtype: str) -> ServingCost:
  """Returns the cost of serving a model in `dtype`, for rows of `context` positions."""
  c = source.decoder_config
  cache = DTYPES[cache_dtype] * cache_numbers(c, context)
  return ServingCost(weight_bytes(source, dtype), cache, flops.decode_flops(source, context))


def model_costs(
  source: ModelSource,
  chip: Chip,
  context: int,
  dtype: str,
  cache_dtype: str,
  batch_sizes: Sequence[int],
) -> JsonObject:
  """Returns one model's entry in efficiency.json: bytes, operations, and bounds on speed."""
  c, options = source.decoder_config, source.options
  cost, width = serving_cost(source, context, dtype, cache_dtype), DTYPES[cache_dtype]
  return {
    "name": source.name
    + (f", {len(options.keep_layers)} of its layers" if options.keep_layers else ""),
    "dtype": dtype,
    "cache_dtype": cache_dtype,
    "parameters": params.count(source.abstract),
    "active_parameters": flops.active_params(source),
    "weight_bytes": cost.weights.total,
    "cache_bytes_per_token": width * c.cache_width * c.num_hidden_layers,
    "cache_bytes": cost.cache,
    "decoder_cache_bytes": width * allocated_cache_numbers(c, context),
    "flops_per_token": {"prefill": prefill_flops(source, context), "decode": cost.flops},
    "decode_bounds": [cost.decode_bound(chip, batch) for batch in batch_sizes],
  }
