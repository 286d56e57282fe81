"""What a model costs to serve, from its shape alone: bytes, operations, and bounds on speed.

Weights are counted by their declarations, the cache and attention by the published equations.
Latent attention caches one latent and one rotated key a position, and decodes in the latents'
space (arXiv:2405.04434, 2.1.2), as models/deepseek_v3.py does; a layer with a window caches its
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

# What weights and caches may be served in, and bytes of a number. With float8 weights only the
# layers' matrices are that: see `param_bytes`.
DTYPES = {"float32": 4, "bfloat16": 2, "float8": 1}
BLOCK = 128  # float8 weights have a float32 scale for a square of so many rows and columns


@dataclasses.dataclass(frozen=True)
class WeightBytes:
  """Bytes of a model's weights, by when a decode step reads them.

  Attributes:
    total: all weights.
    every_step: what a decode step reads whatever the batch: all but routed experts, and but an
      embedding table of its own, of which it reads a row a token.
    experts: all routed experts of all layers.
    num_experts: of a layer.
    experts_per_token: of a layer.
  """

  total: int
  every_step: int
  experts: int
  num_experts: int
  experts_per_token: int

  def read(self, batch: int) -> float:
    """Bytes that one decode step of `batch` rows reads."""
    if not self.num_experts:
      return self.every_step
    return self.every_step + self.experts * self.distinct_experts(batch) / self.num_experts

  def distinct_experts(self, batch: int) -> float:
    """How many experts of a layer one decode step of `batch` rows is expected to read."""
    return distinct(self.num_experts, self.experts_per_token, batch)


def distinct(n: int, chosen: int, batch: int) -> float:
  """How many of n experts a batch is expected to need, each token `chosen` of them.

  n (1 - (1 - chosen / n) ** batch): each expert is as likely as another, and tokens choose
  independently. Where experts are used unevenly, fewer are needed.
  """
  return n * (1 - (1 - chosen / n) ** batch)


def weight_bytes(source: ModelSource, dtype: str) -> WeightBytes:
  """Bytes of a model served in `dtype`, one of DTYPES."""
  c: Any = source.config  # a decoder's
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
  """Bytes of one declared parameter.

  float8 is block-scaled as DeepSeek-V3 is published (arXiv:2412.19437, 3.3): the layers'
  matrices but the routers', with their scales; all else is bfloat16. What is declared exact is
  float32 always.
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


def attended_positions(c: DecoderConfig, layer: int, context: int) -> int:
  """Positions that the last of `context` attends to: all, or the layer's window."""
  return flops.attended_pairs(c, layer, context) - flops.attended_pairs(c, layer, context - 1)


def all_attended_positions(c: DecoderConfig, context: int) -> int:
  """The same, summed over layers."""
  return sum(attended_positions(c, layer, context) for layer in range(c.num_hidden_layers))


def cache_numbers(c: DecoderConfig, context: int) -> int:
  """Numbers that a server caches of a row, and reads for its next token."""
  return c.cache_width * all_attended_positions(c, context)


def allocated_cache_numbers(c: DecoderConfig, context: int) -> int:
  """Numbers that generation/ allocates for a row: all positions in all layers."""
  return c.cache_width * c.num_hidden_layers * context


def prefill_flops(source: ModelSource, context: int) -> float:
  """Operations a token of reading a prompt of `context` tokens; the head is for the last one."""
  forward = flops.forward_flops(source, 1, context)
  return (forward.weights + forward.attention + forward.head / context) / context


def decode_flops(source: ModelSource, context: int) -> float:
  """Operations of one token at position `context` - 1."""
  c = source.decoder_config
  attended = all_attended_positions(c, context)
  attention = 2.0 * attended * c.num_attention_heads * c.decode_attention_width
  return 2.0 * flops.active_params(source) + attention


@dataclasses.dataclass(frozen=True)
class ServingCost:
  """Bytes and operations by which the decode steps of a served model are bounded.

  Attributes:
    cache: bytes of a row.
    flops: of a row's next token.
  """

  weights: WeightBytes
  cache: float
  flops: float

  def memory(self, batch: int) -> float:
    """Bytes of weights and cache."""
    return self.weights.total + batch * self.cache

  def min_chips(self, chip: Chip, batch: int) -> int:
    """The fewest chips that hold weights and cache, by bytes alone."""
    return math.ceil(self.memory(batch) / chip.memory)

  def step_bound(self, chip: Chip, chips: int, batch: int) -> roofline.Bound:
    """The fewest seconds of a decode step that all chips share evenly, links apart.

    Weights are read once a step, a row's cache once; products are at the bfloat16 peak.
    """
    read = self.weights.read(batch) + batch * self.cache
    return roofline.bound(chip, chips, chips, {"step": batch * self.flops}, read / chips, {})

  def decode_bound(self, chip: Chip, batch: int) -> JsonObject:
    """One row of the report, on the fewest chips."""
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
  """Returns the cost of a model that is served in `dtype`, for rows of `context` positions."""
  c = source.decoder_config
  cache = DTYPES[cache_dtype] * cache_numbers(c, context)
  return ServingCost(weight_bytes(source, dtype), cache, decode_flops(source, context))


def model_costs(
  source: ModelSource,
  chip: Chip,
  context: int,
  dtype: str,
  cache_dtype: str,
  batch_sizes: Sequence[int],
) -> JsonObject:
  """All that is computed of one model, as efficiency.json holds it: bytes, operations, seconds."""
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
