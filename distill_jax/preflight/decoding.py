"""Bounds on `generate` on a slice, by formula: nothing is compiled.

A decode step reads the weights and the caches of all its rows, and computes one token for each row.
The own decoder (generation/) allocates cache_len positions for each row. A step reads the blocks up
to the longest text of the batch (nn/kv_cache.py); the bounds assume a text of cache_len positions.
A server (vLLM, SGLang) stores and reads only the positions of each text, and starts a new text in
the same step in which another ends, which is why it is faster for long texts whose lengths differ.
"""

from __future__ import annotations

import dataclasses
import math

import jax

from distill_jax.config import Config
from distill_jax.errors import InputError, bad_value
from distill_jax.generation import placement
from distill_jax.generation.options import DecodingOptions
from distill_jax.generation.placement import ONCE, PER_TOKEN, DecodingMemory
from distill_jax.models import loading
from distill_jax.models.loading import ModelSource
from distill_jax.nn import params, sharding
from distill_jax.preflight import flops, roofline, topology
from distill_jax.preflight.topology import Hardware
from distill_jax.types import JsonObject

# Tokens per second of a server, for each GPU and each 10^9 weights that a token is multiplied with.
# Assumption: a node of 8 H200 serves DeepSeek-R1 (36.6 10^9 active weights) at 3,000 to 5,000
# tokens per second with 256 requests in flight (published runs of vLLM and SGLang), that is 500 per
# GPU; the rate of other models is inversely proportional to their active weights.
SERVER_RATE = 500 * 36.6
# The part of its bound that a decoder is assumed to reach: that of the same server. It reads 671 GB
# of weights (float8) per step from 8 x 4.8 TB/s, so its bound is 14,600 tokens per second.
REACHED = 0.25
PROMPTS = 1_000  # hours are given for this number of prompts


@dataclasses.dataclass(frozen=True)
class Decoder:
  """A model that decodes on a mesh.

  Attributes:
    source: The model.
    hardware: The slices.
    mesh: The devices.
    options: The decoding settings, divisible by the mesh.
    memory: The bytes per device with these settings.
    resident: The bytes per device of other arrays, e.g. of the training state.
  """

  source: ModelSource
  hardware: Hardware
  mesh: jax.sharding.Mesh
  options: DecodingOptions
  memory: DecodingMemory
  resident: int = 0

  @classmethod
  def of(
    cls,
    config: Config,
    source: ModelSource,
    hardware: Hardware,
    mesh: jax.sharding.Mesh,
    resident: int = 0,
  ) -> Decoder:
    """Returns the decoder of a config.

    Raises:
      InputError: If an axis of a parameter is not divisible by the mesh.
    """
    sharding.shardings(source.abstract, mesh, source.compute.rules)
    options = placement.divisible(config.generate, mesh)
    memory = placement.memory(source.abstract, source.compute, mesh, options)
    return cls(source, hardware, mesh, options, memory, resident)

  @property
  def room(self) -> float:
    """Bytes per device for weights and caches."""
    return placement.ROOM * (self.hardware.chip.hbm - self.resident)

  @property
  def gather(self) -> str:
    """The time at which weights are gathered: ONCE or PER_TOKEN."""
    if self.options.gather != placement.AUTO:
      return self.options.gather
    return ONCE if self.memory.gathered_once <= self.room else PER_TOKEN

  @property
  def weights(self) -> int:
    """Bytes per device of the weights between two steps."""
    return self.memory.gathered if self.gather == ONCE else self.memory.stored

  @property
  def largest_batch(self) -> int:
    """Maximum number of rows that fit, with the weights where they are."""
    shards = sharding.row_shards(self.mesh)
    free = self.room - self.weights - self.memory.prompt_cache
    return shards * max(0, math.floor(free / self.row_cache))

  @property
  def row_cache(self) -> float:
    """Bytes per device of the cache of one row."""
    return self.memory.cache * sharding.row_shards(self.mesh) / self.options.batch_size

  def bound(self, rows: int) -> roofline.Bound:
    """Returns the minimum seconds of a step that decodes one token for each of `rows` rows."""
    own = rows / sharding.row_shards(self.mesh)
    if self.gather == ONCE:
      moved = self._weights_read(own)
      sent = {"all-reduce": tensor_sums(self.source, self.mesh, own)}
    else:  # stored weights are read; gathered weights are written once and read once
      moved = self.memory.stored + 2.0 * self.memory.gathered
      sent = {"all-gather": self.memory.gathered - self.memory.stored}
    return roofline.bound(
      self.hardware.chip,
      self.hardware.num_chips,
      self.mesh.size,
      {"step": rows * flops.decode_flops(self.source, self.options.cache_len)},
      moved + own * self.row_cache,
      sent,
    )

  def speed(self, rows: int) -> JsonObject:
    """Returns the bounds with a number of rows: `batch_size`, `bounds`, `bound_by` and others."""
    bound = self.bound(rows)
    return {
      "batch_size": rows,
      "bounds": vars(bound),
      "bound_by": bound.by,
      "step_seconds_bound": bound.seconds,
      "tokens_per_second_bound": rows / bound.seconds,
    }

  def _weights_read(self, rows: float) -> float:
    """Returns the bytes of gathered weights that a device reads for `rows` rows.

    A step reads one row of an embedding table that is not also the head, and the experts that its
    rows choose (flops.distinct).
    """
    c, total = self.source.decoder_config, 0.0
    shapes = placement.unrolled_shapes(
      self.source.abstract, self.source.compute, self.mesh, "compute"
    )
    for path, v in params.named_params(shapes):
      size = float(placement.bytes_per_device(v))
      axes = v.get_metadata()["axes"]
      if path.endswith("rest.embed") and not c.tie_word_embeddings:
        continue
      if "experts" in axes:
        experts = v.shape[axes.index("experts")]
        chosen = getattr(c, "num_experts_per_tok")  # noqa: B009, of a family with experts
        size *= flops.distinct(experts, chosen, rows) / experts
      total += size
    return total


def tensor_sums(source: ModelSource, mesh: jax.sharding.Mesh, tokens: float) -> int:
  """Returns the bytes that a device sends for the sums over the tensor axis in a forward pass.

  Each layer has two sums of activations, in 2 bytes per number.

  Args:
    source: The model.
    mesh: The devices.
    tokens: The number of tokens of a device.
  """
  c, n = source.decoder_config, mesh.shape["tensor"]
  return int(2 * c.num_hidden_layers * tokens * c.hidden_size * 2 * 2 * (n - 1) / n)


def estimate(config: Config, hardware: Hardware, mesh: jax.sharding.Mesh) -> JsonObject:
  """Returns the result of `preflight --verb=generate`; preflight/decoding_table.py prints it.

  Args:
    config: The config; `teacher` is the model that decodes.
    hardware: The slices.
    mesh: The devices.

  Returns:
    A dict with `fits`, `gather`, `bytes_per_device` and `hbm_bytes_per_device`;
    `at`, the bounds with the config's batch; `largest`, those with the largest batch that fits
    (None if none fits); `best`, the mesh with the highest bound, its `largest` and its `gather`;
    `tokens`, the maximum for 1,000 prompts, and the `chip_hours` for them; and
    `assumed_tokens_per_second`, what chips and a server are assumed to do (REACHED, SERVER_RATE).

  Raises:
    InputError: If the config has tasks or the mesh does not divide the model.
  """
  if config.tasks:
    expected = "'train' or 'record', because the config has tasks"
    raise bad_value("--verb", "generate", expected, "Choose one of them")
  placement.check(config.generate)
  source = loading.open_source(config.teacher, config.seed)
  decoder = Decoder.of(config, source, hardware, mesh)
  c, options, need = config.generate, decoder.options, decoder.memory
  at, largest = decoder.speed(options.batch_size), decoder.largest_batch
  best = best_mesh(config, source, hardware)
  tokens = PROMPTS * c.samples * min(c.max_new_tokens, c.cache_len)
  return {
    "fits": largest >= options.batch_size,
    "model": source.name,
    "gather": decoder.gather,
    "cache_len": options.cache_len,
    "bytes_per_device": {
      "weights": decoder.weights,
      "cache": need.cache,
      "prompt cache": need.prompt_cache,
    },
    "weights_stored": need.stored,
    "weights_gathered": need.gathered,
    "hbm_bytes_per_device": hardware.chip.hbm,
    "at": at,
    "largest": decoder.speed(largest) if largest else None,
    "best": best,
    "tokens": tokens,
    "chip_hours": tokens / at["tokens_per_second_bound"] * hardware.num_chips / 3600,
    "assumed_tokens_per_second": {
      "per chip": REACHED * at["tokens_per_second_bound"] / hardware.num_chips,
      "per chip, best mesh": REACHED * best["tokens_per_second_bound"] / hardware.num_chips
      if best
      else None,
      "per GPU of a server": SERVER_RATE * 1e9 / flops.active_params(source),
    },
  }


def best_mesh(config: Config, source: ModelSource, hardware: Hardware) -> JsonObject | None:
  """Finds the tensor axis with the highest bound, with the largest batch that fits on each mesh.

  Returns:
    `mesh`, `gather`, and the values of `Decoder.speed`; None if the model fits on no mesh.
  """
  found: JsonObject | None = None
  for tensor in (2**i for i in range(hardware.num_chips.bit_length())):
    axes = sharding.MeshOptions(hardware.num_slices, -1, tensor)
    try:
      mesh = topology.make_mesh(axes, hardware.topology, hardware.num_slices)
      decoder = Decoder.of(config, source, hardware, mesh)
    except InputError:  # an axis is not divisible
      continue
    if not (rows := decoder.largest_batch):
      continue
    speed = decoder.speed(rows)
    if found is None or speed["tokens_per_second_bound"] > found["tokens_per_second_bound"]:
      found = {"mesh": dict(mesh.shape), "gather": decoder.gather, **speed}
  return found
