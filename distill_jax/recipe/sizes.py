"""Sequence length, batch sizes, chunks and steps, from the size of the data and the machine.

The formulas are rules of thumb; any key can be overridden on the command line.
"""

from __future__ import annotations

import dataclasses
import math

from distill_jax.models import DecoderConfig
from distill_jax.nn import params
from distill_jax.recipe.machine import Machine
from distill_jax.recipe.model_source import Models
from distill_jax.recipe.tokens import TokenCount

CPU_FLOPS = 5e10  # operations per second and core that training reaches
CPU_SECONDS = 900  # recording and training on a CPU take about this long at most
USABLE = 0.6  # fraction of the memory that is planned with
LOGITS_BYTES = {"cpu": 2**27, "accelerator": 2**29}
BYTES_PER_PARAMETER = 16  # float32: weights, gradients and Adam's two moments
MIN_SEQUENCES = 32


def seq_len(count: TokenCount, models: Models, machine: Machine) -> int:
  """Returns the length of the packed sequences.

  Texts take 512 tokens on a CPU and 1024 elsewhere, fewer if the data is small. Chats take the
  length that holds 95% of them.
  """
  limit = min(models.max_positions, 1024 if machine.is_cpu else 4096)
  if count.is_whole and count.lengths:
    ordered = sorted(count.lengths)
    fits = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return min(limit, max(128, 128 * math.ceil(fits / 128)))
  length = min(limit, 512 if machine.is_cpu else 1024)
  while length > 64 and count.sequences(length) < MIN_SEQUENCES:
    length //= 2
  return length


def epochs(tokens: int) -> int:
  """Returns how many times the data is read: more often if there is little of it."""
  return 4 if tokens < 1e6 else 3 if tokens < 2e7 else 2 if tokens < 2e8 else 1


def max_sequences(length: int, passes: int, models: Models, machine: Machine) -> int:
  """Returns the number of sequences that a CPU trains on in CPU_SECONDS; 0: no limit."""
  if not machine.is_cpu:
    return 0
  teacher, student = (params.count(m.abstract) for m in (models.teacher, models.student))
  per_token = 2 * teacher + 6 * student * passes
  tokens = CPU_FLOPS * machine.cores * CPU_SECONDS / per_token
  return max(MIN_SEQUENCES, int(tokens // length))


def heldout_sequences(sequences: int, most: int) -> int:
  """Returns the number of sequences to evaluate during training, given that of the training ones.

  To record 2% more costs little. Fewer than 8 would give a curve with much noise.
  """
  return min(most, max(8, sequences // 50))


@dataclasses.dataclass(frozen=True)
class BatchSizes:
  """The batch of a training step, and how it is divided.

  Attributes:
    batch: Sequences per step, over all devices.
    accumulate: Microbatches per step.
    remat: What is recomputed in the backward pass; see student.remat.
  """

  batch: int
  accumulate: int
  remat: str


def batch_sizes(total: int, length: int, models: Models, machine: Machine) -> BatchSizes:
  """Returns the batch of a step for `total` sequences over all epochs.

  The batch grows with the square root of the data: 2 sequences for 128 in all, 16 for 8192.
  """
  wanted = power_of_two(math.sqrt(total / 32), 256)
  devices = machine.devices
  batch = devices * max(1, round(min(wanted, max(1, total)) / devices))
  rows = batch // devices
  count = params.count(models.student.abstract)
  free = USABLE * machine.memory - BYTES_PER_PARAMETER * count / devices
  for remat in ("none", "full"):
    fitting = int(max(free, 0) // activation_bytes(length, models, machine, remat))
    if fitting >= rows or remat == "full":
      break
  micro = max(n for n in range(1, rows + 1) if rows % n == 0 and n <= max(1, fitting))
  return BatchSizes(batch, rows // micro, remat)


def activation_bytes(length: int, models: Models, machine: Machine, remat: str) -> int:
  """Returns the bytes that one sequence keeps for the backward pass."""
  config = models.student.decoder_config
  size = 4 if machine.is_cpu else 2
  layer = _layer_bytes(length, config, size)
  kept = length * config.hidden_size * size if remat == "full" else layer
  # On a CPU, the attention scores of one layer at a time are in memory.
  scores = _score_bytes(length, config) if machine.is_cpu else 0
  return config.num_hidden_layers * kept + layer + scores


def _layer_bytes(length: int, config: DecoderConfig, size: int) -> int:
  """Returns the bytes of a layer's activations of one sequence, without attention scores."""
  return length * (14 * config.hidden_size + 3 * config.intermediate_size) * size


def _score_bytes(length: int, config: DecoderConfig) -> int:
  """Returns the bytes of a layer's attention scores of one sequence, in float32."""
  return 2 * config.num_attention_heads * length**2 * 4


def forward_batch(length: int, sequences: int, models: Models, machine: Machine) -> int:
  """Returns the sequences of a batch without a backward pass."""
  config = models.teacher.decoder_config
  row = _layer_bytes(length, config, 4) + _score_bytes(length, config)
  most = 4 if machine.is_cpu else 32
  rows = power_of_two(0.2 * machine.memory / row, most)
  return machine.devices * min(rows, power_of_two(sequences / machine.devices, most))


def chunk(length: int, rows: int, models: Models, machine: Machine) -> int:
  """Returns the positions of each sequence whose logits exist at once.

  Args:
    length: Tokens of a sequence.
    rows: Sequences per device.
    models: The models.
    machine: The devices.
  """
  room = LOGITS_BYTES["cpu" if machine.is_cpu else "accelerator"]
  vocab_size = max(m.decoder_config.vocab_size for m in (models.teacher, models.student))
  return min(length, max(16, power_of_two(room / (4 * vocab_size * rows), 1024)))


def power_of_two(x: float, most: int) -> int:
  """Returns the largest power of two that is not above `x` or `most`, at least 1."""
  return 2 ** int(math.log2(max(1, min(x, most))))


def peak_lr(models: Models) -> float:
  """Returns the peak learning rate: higher for a student cut from its teacher, lower for width.

  1e-3 was the best of those tried for 12 of SmolLM2-135M's layers and 1,024 tokens per step.
  """
  base = 1e-3 if models.is_cut else 2e-4
  rate = base * min(1.0, 768 / models.student.decoder_config.hidden_size)
  return float(f"{rate:.1g}")
