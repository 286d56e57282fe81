"""The operations (FLOPs) of a step, computed by formulas from the shapes of the parameters.

A product of [m, k] and [k, n] counts as 2 m k n operations. Each position is multiplied with all
weights of a decoder except the embedding table and, in an expert layer, with K of E experts.
Attention is causal: position t of a document attends to t + 1 positions, or to its window. Kernels
compute whole blocks of pairs: those that contain a pair that is attended to (nn/splash.py), or all
pairs of the row ("xla"). Norms, softmax and rope are not counted.

A backward pass has twice the operations of the forward pass: one product for the gradient of the
inputs and one for that of the weights. The gradient of the head does not need a second forward pass
(nn/fused_head.py), and a frozen head has no gradient of the weights.

For a student with another tokenizer, the head of a teacher that runs is computed for the positions
of the chains (cross_tokenizer/dense.py), which are PROJECTED_HEAD times as many as the student's.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.config import Config
from distill_jax.models import DecoderConfig, loading
from distill_jax.models.loading import ModelSource
from distill_jax.nn import layer_sharing, lora, params, splash
from distill_jax.preflight import other_tokenizer
from distill_jax.training import state

PROJECTED_HEAD = 1.75  # blocks of the second to fourth level included; see cross_tokenizer/dense.py


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
  """The operations of one forward pass of a model, over all devices."""

  weights: float  # products with the weights of the layers
  attention: float  # attention scores and weighted sums of values
  head: float

  @property
  def total(self) -> float:
    return self.weights + self.attention + self.head


def forward_flops(source: ModelSource, rows: int, seq_len: int, document: int = 0) -> ForwardFlops:
  """Returns the operations of one forward pass over `rows` sequences of `seq_len` positions.

  Args:
    source: the model.
    rows: number of sequences.
    seq_len: positions per sequence.
    document: tokens per document; 0 for one document per sequence.
  """
  c, tokens = source.decoder_config, rows * seq_len
  pairs = rows * pairs_of_row(c, seq_len, document)
  return ForwardFlops(
    weights=2.0 * tokens * _active_layer_params(source),
    attention=2.0 * pairs * c.num_attention_heads * c.attention_width,
    head=2.0 * tokens * c.vocab_size * c.hidden_size,
  )


def active_params(source: ModelSource) -> int:
  """Returns the number of weights that one position is multiplied with, including the head."""
  c = source.decoder_config
  return round(_active_layer_params(source)) + c.vocab_size * c.hidden_size


def _active_layer_params(source: ModelSource) -> float:
  """Returns the number of weights of the layers that one position is multiplied with."""
  total = 0.0
  for path, v in params.named_params(source.abstract):
    meta = v.get_metadata()
    if path.find(".") <= 0 or not meta["out"]:  # outside the layers, or a norm or a bias
      continue
    size = float(math.prod(v.shape))
    if "experts" in meta["axes"]:
      config: Any = source.config  # of a family with experts
      size = size * config.num_experts_per_tok / v.shape[meta["axes"].index("experts")]
    total += size
  return total


def attended_pairs(c: DecoderConfig, layer: int, seq_len: int) -> int:
  """Returns the number of (query, key) pairs of a layer in one sequence."""
  w = min(c.window_at(layer) or seq_len, seq_len)
  return w * (w + 1) // 2 + (seq_len - w) * w


def pairs_of_row(c: DecoderConfig, seq_len: int, document: int = 0) -> int:
  """Returns the number of pairs of all layers in a row of documents of this many tokens."""
  document = min(document or seq_len, seq_len)
  documents, rest = divmod(seq_len, document)
  return sum(
    documents * attended_pairs(c, layer, document) + attended_pairs(c, layer, rest)
    for layer in range(c.num_hidden_layers)
  )


def computed_pairs_of_row(c: DecoderConfig, kernel: str, seq_len: int, document: int = 0) -> int:
  """Returns the number of pairs of all layers that an attention kernel computes on a TPU.

  Args:
    c: the config of the decoder.
    kernel: one of nn.attention.KERNELS.
    seq_len: positions per sequence.
    document: tokens per document; 0 for one document per sequence.
  """
  layers = collections.Counter(c.window_at(layer) for layer in range(c.num_hidden_layers))
  if kernel == "xla":
    return layers.total() * seq_len**2
  positions = seq_len + -seq_len % splash.LANES
  index_T = jnp.arange(positions, dtype=jnp.int32)
  segments_1T = index_T[None] // (document or seq_len)
  total = 0
  for window, count in layers.items():
    window = None if window is None or window >= seq_len else window
    block = splash.block_size(positions, window)
    first, last = splash.visited_blocks(segments_1T, index_T, window, block, block)
    total += count * int((last - first + 1).sum()) * block**2
  return total


def attended_positions(c: DecoderConfig, layer: int, context: int) -> int:
  """Returns the number of positions that the last of `context` positions attends to in a layer."""
  return attended_pairs(c, layer, context) - attended_pairs(c, layer, context - 1)


def all_attended_positions(c: DecoderConfig, context: int) -> int:
  """Returns `attended_positions`, summed over layers."""
  return sum(attended_positions(c, layer, context) for layer in range(c.num_hidden_layers))


def decode_flops(source: ModelSource, context: int) -> float:
  """Returns the operations to decode one token at position `context` - 1."""
  c = source.decoder_config
  attended = all_attended_positions(c, context)
  attention = 2.0 * attended * c.num_attention_heads * c.decode_attention_width
  return 2.0 * active_params(source) + attention


def distinct(n: int, chosen: int, batch: float) -> float:
  """Returns the expected number of distinct experts in a batch: n (1 - (1 - chosen / n) ** batch).

  This assumes that all experts are equally likely and that tokens choose independently. With uneven
  use, the number is smaller.

  Args:
    n: the number of experts.
    chosen: the number of experts that each token chooses.
    batch: the number of tokens; it may be a mean.
  """
  return n * (1 - (1 - chosen / n) ** batch)


def step_flops(config: Config, verb: str, rows: int) -> dict[str, float]:
  """Returns the operations of one step over all devices, by purpose.

  The purposes are "layers" (weights), "attention", "head", "teacher" (online teachers), "adapters"
  (merging low-rank adapters) and two that are not part of a model's FLOPs. "recomputed" are layers
  that remat computes again in the backward pass, and scores that the attention kernel computes
  again. "masked" are pairs that attention computes and does not use, in all passes.
  """
  T, document = config.data.seq_len, config.preflight.document_tokens
  if verb == "record":
    source = loading.open_source(config.teacher)
    forward = forward_flops(source, rows, T, document)
    unused = _unused_share(source.decoder_config, config.teacher.attention, T, document)
    return {
      "layers": forward.weights,
      "attention": forward.attention,
      "head": _teacher_head(config, config.records.student_tokenizer, forward),
      "masked": unused * forward.attention,
    }
  student = config.student
  source = loading.open_source(student)
  named = config.retarget.tokenizer if config.train.online else ""
  own = other_tokenizer.positions(config) if named else T
  forward = forward_flops(source, rows, own, document)
  flops = {
    "layers": 3 * forward.weights,
    "attention": 3 * forward.attention,
    "head": (3 if _head_is_trained(source) else 2) * forward.head,
  }
  scores_again = forward.attention / 2  # the backward pass of every kernel computes them again
  if student.remat != "none":
    scores_again += forward.attention
  flops["recomputed"] = scores_again + (forward.weights if student.remat == "full" else 0)
  unused = _unused_share(source.decoder_config, student.attention, own, document)
  flops["masked"] = unused * (flops["attention"] + scores_again)
  if online := state.online_teachers(config):
    flops["teacher"] = 0.0
    for teacher in online.values():
      forward = forward_flops(teacher, rows, T, document)
      unused = _unused_share(teacher.decoder_config, config.teacher.attention, T, document)
      flops["teacher"] += forward.total - forward.head + _teacher_head(config, named, forward)
      flops["masked"] += unused * forward.attention
  if rank := student.lora.rank or student.share.lora.rank:
    # The product A B, and the gradients of A and B.
    flops["adapters"] = 3 * 2.0 * rank * _adapted_params(source) * config.optim.accumulate
  return flops


def _teacher_head(config: Config, student_tokenizer: str, forward: ForwardFlops) -> float:
  """Returns the operations of a teacher's head; student_tokenizer is "" if it is the teacher's."""
  if not student_tokenizer:
    return forward.head
  return forward.head * PROJECTED_HEAD * other_tokenizer.positions(config) / config.data.seq_len


def _unused_share(c: DecoderConfig, kernel: str, seq_len: int, document: int) -> float:
  """Returns the pairs that a kernel computes and does not use, divided by those it uses."""
  computed = computed_pairs_of_row(c, kernel, seq_len, document)
  return computed / pairs_of_row(c, seq_len, document) - 1


def model_flops(step_flops: dict[str, float]) -> float:
  """Returns the operations that model FLOPs utilization counts: all that give a result once."""
  return sum(n for purpose, n in step_flops.items() if purpose not in ("recomputed", "masked"))


def _head_is_trained(student: ModelSource) -> bool:
  if student.trainable.has_base:
    return False
  part, _ = params.split(student.abstract, student.trainable.frozen)
  by_name = {path.rpartition(".")[2]: v for path, v in params.named_params(part)}
  return bool(jax.tree.leaves(by_name.get("head", by_name["embed"])))


def _adapted_params(student: ModelSource) -> int:
  """Returns the number of weights in the matrices that have adapters."""
  trained = student.abstract_trainable
  adapters = trained.deltas if isinstance(trained, layer_sharing.SharedLayers) else trained
  joined = lora.with_adapters(student.abstract, adapters)
  leaves = jax.tree.leaves(joined, is_leaf=lambda x: _is_adapter(x) or params.is_param(x))
  return sum(params.count(x.weight) for x in leaves if _is_adapter(x))


def _is_adapter(x: object) -> bool:
  return isinstance(x, lora.LoraAdapter)
