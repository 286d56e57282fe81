"""What a model costs to serve, from its shape alone: bytes, operations, and bounds on speed.

Weights are counted by their declarations, the cache and attention by the published equations.
Latent attention keeps one latent and one rotated key a position, and decodes in the latents'
space (arXiv:2405.04434, 2.1.2), as decode/ does; a layer with a window keeps its window.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from distill_jax.models import loading
from distill_jax.models.options import ModelOptions
from distill_jax.nn import params
from distill_jax.preflight import flops, roofline
from distill_jax.preflight.chips import Chip

# What weights and caches may be served in, and bytes of a number. Of float8 weights only the
# layers' matrices are that: see `stored`.
DTYPES = {"float32": 4, "bfloat16": 2, "float8": 1}
BLOCK = 128  # float8 weights have a float32 scale for a square of so many rows and columns


@dataclasses.dataclass(frozen=True)
class Weights:
  """Bytes of a model's weights.

  Attributes:
    total: all.
    step: what a decode step reads whatever the batch: all but routed experts, and but an
      embedding table of its own, of which it reads a row a token.
    experts: of all routed experts of all layers, `n` of them a layer, `chosen` by a token.
  """

  total: int
  step: int
  experts: int
  n: int
  chosen: int

  def read(self, batch: int) -> float:
    """Bytes that one decode step of `batch` rows reads."""
    if not self.n:
      return self.step
    return self.step + self.experts * distinct(self.n, self.chosen, batch) / self.n


def distinct(n: int, chosen: int, batch: int) -> float:
  """How many of n experts a batch is expected to need, each token `chosen` of them.

  n (1 - (1 - chosen / n) ** batch): each expert is as likely as another, and tokens choose
  independently. Where experts are used unevenly, fewer are needed.
  """
  return n * (1 - (1 - chosen / n) ** batch)


def weights(spec: ModelOptions, dtype: str) -> Weights:
  """Of a model served in `dtype`, one of DTYPES."""
  _, c = loading.family_and_config(spec)
  total = experts = table = n = 0
  for path, v in params.named_params(loading.abstract(spec)):
    size, axes = stored(v, dtype), v.get_metadata()["axes"]
    total += size
    if "experts" in axes:
      experts, n = experts + size, v.shape[axes.index("experts")]
    if path == "embed" and not c.tie_word_embeddings:
      table = size
  return Weights(total, total - experts - table, experts, n, c.num_experts_per_tok if n else 0)


def stored(v: Any, dtype: str) -> int:
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


def kept(c: Any) -> int:
  """Numbers that a layer's cache keeps of a position."""
  if hasattr(c, "kv_lora_rank"):
    return c.kv_lora_rank + c.qk_rope_head_dim
  return 2 * c.num_key_value_heads * c.head_dim


def sees(c: Any, layer: int, context: int) -> int:
  """Positions that the last of `context` attends to: all, or the layer's window."""
  return flops.attended_pairs(c, layer, context) - flops.attended_pairs(c, layer, context - 1)


def cache_numbers(c: Any, context: int) -> int:
  """Numbers that a server keeps of a row, and reads for its next token."""
  return kept(c) * sum(sees(c, layer, context) for layer in range(c.num_hidden_layers))


def decoder_numbers(c: Any, context: int) -> int:
  """Numbers that decode/ allocates for a row: all positions in all layers."""
  return kept(c) * c.num_hidden_layers * context


def prefill_flops(spec: ModelOptions, context: int) -> float:
  """Operations a token of reading a prompt of `context` tokens; the head is for the last one."""
  one = flops.forward_flops(spec, 1, context)
  return (one.weights + one.attention + one.head / context) / context


def decode_flops(spec: ModelOptions, context: int) -> float:
  """Operations of one token at position `context` - 1."""
  _, c = loading.family_and_config(spec)
  wide = 2 * c.head_dim  # of a score, and of a value
  if hasattr(c, "kv_lora_rank"):
    wide = kept(c) + c.kv_lora_rank
  seen = sum(sees(c, layer, context) for layer in range(c.num_hidden_layers))
  return 2.0 * flops.active_params(spec) + 2.0 * seen * c.num_attention_heads * wide


@dataclasses.dataclass(frozen=True)
class Served:
  """A model as it is served: bytes and operations by which a decode step is bounded.

  Attributes:
    cache: bytes of a row.
    flops: of a row's next token.
  """

  weights: Weights
  cache: float
  flops: float

  def memory(self, batch: int) -> float:
    return self.weights.total + batch * self.cache

  def chips(self, chip: Chip, batch: int) -> int:
    """The fewest that hold weights and cache, by bytes alone."""
    return math.ceil(self.memory(batch) / chip.memory)

  def step(self, chip: Chip, chips: int, batch: int) -> roofline.Bound:
    """The least seconds of a decode step that all chips share evenly, links apart.

    Weights are read once a step, a row's cache once; products are at the bfloat16 peak.
    """
    read = self.weights.read(batch) + batch * self.cache
    return roofline.bound(chip, chips, chips, {"step": batch * self.flops}, read / chips, {})

  def at(self, chip: Chip, batch: int) -> dict[str, Any]:
    """One row of the report, on the fewest chips."""
    n = self.chips(chip, batch)
    bound = self.step(chip, n, batch)
    w = self.weights
    return {
      "batch_size": batch,
      "chips": n,
      "bytes": self.memory(batch),
      "bytes_read": w.read(batch) + batch * self.cache,
      "experts_read": distinct(w.n, w.chosen, batch) if w.n else None,
      "step_seconds": bound.seconds,
      "bound_by": bound.by,
      "tokens_per_second": batch / bound.seconds,
      "tokens_per_second_per_chip": batch / bound.seconds / n,
    }


def served(spec: ModelOptions, context: int, dtype: str, cache_dtype: str) -> Served:
  _, c = loading.family_and_config(spec)
  cache = DTYPES[cache_dtype] * cache_numbers(c, context)
  return Served(weights(spec, dtype), cache, decode_flops(spec, context))


def model(
  spec: ModelOptions,
  chip: Chip,
  context: int,
  dtype: str,
  cache_dtype: str,
  batch_sizes: Sequence[int],
) -> dict[str, Any]:
  """All that is computed of one model; bytes, operations, seconds."""
  family, c = loading.family_and_config(spec)
  s, width = served(spec, context, dtype, cache_dtype), DTYPES[cache_dtype]
  return {
    "name": (spec.source or f"{family} {spec.shape}")
    + (f", {len(spec.keep_layers)} of its layers" if spec.keep_layers else ""),
    "dtype": dtype,
    "cache_dtype": cache_dtype,
    "parameters": params.count(loading.abstract(spec)),
    "active_parameters": flops.active_params(spec),
    "weight_bytes": s.weights.total,
    "cache_bytes_per_token": width * kept(c) * c.num_hidden_layers,
    "cache_bytes": s.cache,
    "decoder_cache_bytes": width * decoder_numbers(c, context),
    "flops_per_token": {"prefill": prefill_flops(spec, context), "decode": s.flops},
    "decode_bounds": [s.at(chip, b) for b in batch_sizes],
  }
