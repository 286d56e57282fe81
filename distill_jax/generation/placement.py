"""The sharding of weights in decoding, and the memory that decoding takes.

In training, weights are spread over the mesh axes fsdp and tensor, and are gathered over fsdp where
they are used. The work per weight of a training step hides this; that of a decode step does not:
DeepSeek-R1 on the mesh (1, 16, 4) gathers 336 GB per device and token, which takes half a second.
Where the memory allows, the weights are therefore gathered once, before the first token: each
device holds what it computes with, the weights divided by the tensor axis only. Sequences are
spread over data and fsdp in both cases, and the computation is the same.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from distill_jax.errors import bad_value
from distill_jax.generation.options import DecodingOptions
from distill_jax.generation.unrolled import Unrolled, cache_shapes, unroll, unrolled_shapes
from distill_jax.nn import sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.runtime import distributed
from distill_jax.types import Model, PyTree

AUTO, ONCE, PER_TOKEN = GATHER = ("auto", "once", "per_token")
ROOM = 0.9  # the part of a device's memory for weights and caches; the rest is for activations
MiB, GiB = 2**20, 2**30


class DecodingMemory(NamedTuple):
  """The bytes per device of decoding.

  Attributes:
    stored: The weights in their storage sharding, in the compute dtype.
    gathered: The weights in their compute sharding.
    cache: The KV cache of the rows.
    prompt_cache: The KV cache of the prompts that are prefilled.
  """

  stored: int
  gathered: int
  cache: int
  prompt_cache: int

  @property
  def gathered_once(self) -> int:
    """The bytes of weights and caches if the weights are gathered once."""
    return self.gathered + self.cache + self.prompt_cache

  def fits(self, limit: int) -> bool:
    """Tests whether gathered weights and the caches fit a device with `limit` bytes of memory."""
    return self.gathered_once <= ROOM * limit


def divisible(decoding: DecodingOptions, mesh: Mesh) -> DecodingOptions:
  """Returns the options; batch sizes are rounded up to multiples of `sharding.row_shards`.

  Texts do not depend on either, and on 64 devices the additional rows cost almost nothing: a decode
  step reads the same weights for them.
  """
  n = sharding.row_shards(mesh)
  return dataclasses.replace(
    decoding,
    batch_size=n * -(-decoding.batch_size // n),
    prefill_rows=n * -(-decoding.prefill_rows // n),
  )


def memory(
  model: Model, compute: ComputeConfig, mesh: Mesh, decoding: DecodingOptions
) -> DecodingMemory:
  """Computes the memory of decoding from the shapes of a model; nothing is allocated.

  Args:
    model: The model with stacked layers, or its shapes.
    compute: The compute settings.
    mesh: The devices.
    decoding: The options, from `divisible`.
  """
  stored, gathered = (unrolled_shapes(model, compute, mesh, c) for c in ("storage", "compute"))
  caches = (
    cache_shapes(stored, rows, decoding.cache_len, compute, mesh, decoding.cache_dtype)
    for rows in (decoding.batch_size, decoding.prefill_rows)
  )
  return DecodingMemory(*(bytes_per_device(tree) for tree in (stored, gathered, *caches)))


def bytes_per_device(tree: PyTree) -> int:
  """Returns the bytes per device of arrays, or of shapes with shardings."""
  leaves = jax.tree.leaves(tree)
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def place(model: Model, compute: ComputeConfig, mesh: Mesh, decoding: DecodingOptions) -> Unrolled:
  """Unrolls a model for decoding, and gathers its weights once if `decoding.gather` allows it.

  The arrays of `model` are deleted. If the weights stay spread over several devices that could
  compute without each other, a line on stderr gives the reason.
  """
  need = memory(model, compute, mesh, divisible(decoding, mesh))
  limit = _memory_to_decode(mesh, bytes_per_device(model))
  if decoding.gather == AUTO and need.stored < need.gathered and not need.fits(limit):
    _print_once(_why_not(need, limit))
    return unroll(model, compute)
  return unroll(model, compute, "storage" if decoding.gather == PER_TOKEN else "compute")


def check(decoding: DecodingOptions) -> None:
  """Checks `gather`.

  Raises:
    InputError: If it is not one of GATHER.
  """
  if decoding.gather not in GATHER:
    raise bad_value("generate.gather", decoding.gather, f"one of {GATHER}", "Choose one of them")


def _memory_to_decode(mesh: Mesh, model: int) -> int:
  """Returns the bytes left for decoding on the fullest device of any process; 0 if unknown.

  Arrays other than the model, such as the state and the teachers of training, stay in memory.

  Args:
    mesh: The devices.
    model: The bytes per device of the model, which is deleted when its decoding copy is made.
  """
  stats = [d.memory_stats() or {} for d in mesh.local_devices]
  left = (s.get("bytes_limit", 0) - max(0, s.get("bytes_in_use", 0) - model) for s in stats)
  own = max(0, min(left)) // MiB  # bytes would not fit an int32
  return -distributed.max_over_processes(-own) * MiB


@functools.cache
def _print_once(line: str) -> None:
  """Prints a line on process 0 once, even if several models or rounds are decoded."""
  if distributed.is_process_0():
    print(line, file=sys.stderr)


def _why_not(need: DecodingMemory, limit: int) -> str:
  size = f"{need.gathered_once / GiB:.1f} GiB"
  if limit == 0:
    return (
      "Weights are gathered for every token, which is slow, because these devices do not report "
      f'their memory. Set generate.gather to "once" if each device has {size}.'
    )
  return (
    "Weights are gathered for every token, which is slow: gathered once, weights and caches take "
    f"{size} of {limit / GiB:.1f} GiB that are left per device. Increase mesh.tensor, or decrease "
    "generate.batch_size or generate.cache_len."
  )
