"""Sums of weighted losses, with and without the fused head.

This is the one place where weights are applied, masks are chosen and sums are divided by the number
of labels. The training step and own training loops both call it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from distill_jax.errors import InputError, bad_value
from distill_jax.losses._base import BaseLoss, TokenLoss
from distill_jax.losses.targets import LabelTargets, SampledTargets, SpanTargets, TopKTargets
from distill_jax.nn import fused_head, label_logp, mesh_in_use, sharding
from distill_jax.nn.sharding import MeshAxes
from distill_jax.types import Batch, Mean, Targets

Scalar = jax.Array | float
Means = dict[str, Mean]
# (logits_BCV, chunk of the batch) -> more means, which are not differentiated.
Metrics = Callable[[jax.Array, Batch], Means]


def fused_loss(
  losses: Mapping[str, BaseLoss],
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  batch: Batch,
  *,
  step: jax.Array | int = 0,
  label_count: Scalar | None = None,
  chunk: int = 128,
  vocab_size: int | None = None,
  soft_cap: float | None = None,
  weights: Mapping[str, Scalar] | None = None,
  metrics: Metrics | None = None,
  batch_axes: tuple[str, ...] = sharding.BATCH,
  seq_axis: str | None = None,
  vocab_axis: MeshAxes = sharding.VOCAB,
  embed_axis: MeshAxes = None,
) -> tuple[jax.Array, Means]:
  """Returns the weighted sum of losses, computed without ever holding [B, T, V] logits.

  The scalar is the sum over losses of `weight(step)` times the mean over the batch's labels. It is
  differentiable in `hidden_BTD` and `head_VD`, and the gradient is computed in the forward pass,
  one chunk of positions at a time (see `fused_head.loss`).

  Args:
    losses: Losses by name, e.g. {"soft": KD(temperature=2.0), "hard": CE(weight=0.3)}. Each applies
      its own temperature, squared factor included; weights are applied here.
    hidden_BTD: Hidden states after the final norm, float32 or bfloat16.
    head_VD: The unembedding matrix, in the same dtype.
    batch: Labels, mask and teachers' targets. Its inputs are not used and may be None.
    step: Step number that schedules of weights and temperatures follow.
    label_count: Number of labels that sums are divided by; None for those of `batch`. With gradient
      accumulation, pass the number of labels of all microbatches. Inside `jax.shard_map`, pass the
      sum over its devices.
    chunk: Positions of each sequence whose logits exist at once; it need not divide T.
    vocab_size: Rows of the head from this one on are padding; None if no row is.
    soft_cap: Logits become soft_cap * tanh(logits / soft_cap); None for no cap.
    weights: Weights by loss, instead of `weight(step)` of each.
    metrics: Computes further means of each chunk's logits.
    batch_axes: Mesh axes over which sequences are sharded.
    seq_axis: Mesh axis over which positions are sharded; None if they are not.
    vocab_axis: Mesh axis, or axes, over which the rows of the head are sharded; None if they are
      not.
    embed_axis: Mesh axis, or axes, over which the columns of the head are stored. The head's
      gradient is reduce-scattered over those of them over which positions are sharded. None if
      columns are not sharded.

  Returns:
    (loss, means): a float32 scalar, and a `Mean` for each loss, without its weight, and metric.
    `means[name].value()` is the mean over labels; `Mean`s of microbatches are added.

  Raises:
    InputError: A teacher has no targets in the batch, a loss would be biased with them, a loss does
      not work on logits, the mask is not bool, or the mesh does not have these axes.
  """
  token_losses = _checked(losses, batch)
  _check_batch(hidden_BTD.shape, head_VD.shape[-1:], batch)
  if chunk < 1:
    raise bad_value("chunk", chunk, "at least 1 position", "Raise it")
  if label_count is None:
    label_count = count_labels(batch)
  weights = _weights(token_losses, step) if weights is None else weights
  run = functools.partial(
    _fused,
    token_losses,
    chunk=chunk,
    vocab_size=vocab_size,
    soft_cap=soft_cap,
    metrics=metrics,
    batch_axes=batch_axes,
    seq_axis=seq_axis,
    vocab_axis=vocab_axis,
    embed_axis=embed_axis,
  )
  batch = batch.replace(inputs=None, valid_BS=None)
  return mesh_in_use.auto(run, P())(hidden_BTD, head_VD, batch, label_count, dict(weights), step)


def logits_loss(
  losses: Mapping[str, BaseLoss],
  logits_BTV: jax.Array,
  batch: Batch,
  *,
  step: jax.Array | int = 0,
  label_count: Scalar | None = None,
  weights: Mapping[str, Scalar] | None = None,
) -> tuple[jax.Array, Means]:
  """Returns the weighted sum of losses of logits that exist already.

  The same as `fused_loss` for models that return logits and not hidden states. It needs memory for
  several arrays of the size of the logits.

  Args:
    losses: Losses by name.
    logits_BTV: The student's logits.
    batch: See `fused_loss`, as for the other arguments and for the result.
  """
  token_losses = _checked(losses, batch)
  _check_batch(logits_BTV.shape, logits_BTV.shape[-1:], batch)
  if label_count is None:
    label_count = count_labels(batch)
  weights = _weights(token_losses, step) if weights is None else weights
  mask_BT1 = batch.mask_BT[..., None]
  logits_BTV = jnp.where(mask_BT1, logits_BTV.astype(jnp.float32), 0.0)
  batch = _with_spans(
    token_losses, batch, lambda: fused_head.label_logp(logits_BTV, batch.labels_BT)
  )
  return _weighted_sum(token_losses, logits_BTV, batch, label_count, weights, step)


def count_labels(batch: Batch) -> jax.Array:
  """Returns the number of labels that are trained on, at least 1, as float32.

  Raises:
    InputError: It is called inside `jax.shard_map`, where the batch is a part of the whole.
  """
  if mesh_in_use.manual_axes():
    raise bad_value(
      "label_count",
      None,
      "the number of labels of all devices inside jax.shard_map",
      "Sum batch.mask_BT with jax.lax.psum and pass it",
    )
  return jnp.maximum(jnp.sum(batch.mask_BT, dtype=jnp.float32), 1.0)


def _fused(
  losses: Mapping[str, TokenLoss],
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  batch: Batch,
  label_count: Scalar,
  weights: Mapping[str, Scalar],
  step: jax.Array | int,
  *,
  chunk: int,
  vocab_size: int | None,
  soft_cap: float | None,
  metrics: Metrics | None,
  batch_axes: tuple[str, ...],
  seq_axis: str | None,
  **options: Any,
) -> tuple[jax.Array, Means]:
  where = (chunk, vocab_size, batch_axes, seq_axis)
  label_logp_BT = functools.partial(
    label_logp.of_rows, hidden_BTD, head_VD, batch, *where, soft_cap=soft_cap
  )
  batch = _with_spans(losses, batch, label_logp_BT)

  def chunk_loss(logits_BCV: jax.Array, piece: Batch) -> tuple[jax.Array, Means]:
    logits_BCV = fused_head.cap_and_select(logits_BCV, soft_cap, piece.class_range_BT2)
    total, means = _weighted_sum(losses, logits_BCV, piece, label_count, weights, step)
    more = metrics(jax.lax.stop_gradient(logits_BCV), piece) if metrics else {}
    return total, means | more

  return fused_head.loss(chunk_loss, hidden_BTD, head_VD, batch, *where, **options)


def _with_spans(
  losses: Mapping[str, TokenLoss], batch: Batch, label_logp_BT: Callable[[], jax.Array]
) -> Batch:
  """Returns the batch with the student's log-probabilities of spans, if a loss reads them.

  A span may cross chunks of positions and devices, so that they are computed for whole rows before
  the losses. This costs one more product with the head, and one more pass over the logits.

  Args:
    losses: The losses, by name.
    batch: The whole batch.
    label_logp_BT: Computes the student's log-probability of each label.
  """
  read = {teacher for fn in losses.values() for teacher in fn.teacher_names}
  spans = {
    name: t for name, t in batch.targets.items() if isinstance(t, SpanTargets) and name in read
  }
  if not spans:
    return batch
  logq_BT = jax.lax.stop_gradient(label_logp_BT())
  return batch.replace(
    targets=batch.targets | {name: t.with_student(logq_BT) for name, t in spans.items()}
  )


def _weighted_sum(
  losses: Mapping[str, TokenLoss],
  logits_BCV: jax.Array,
  batch: Batch,
  label_count: Scalar,
  weights: Mapping[str, Scalar],
  step: jax.Array | int,
) -> tuple[jax.Array, Means]:
  """Returns (weighted sum over label_count, mean of each loss) of one chunk of positions."""
  total, means = jnp.zeros((), jnp.float32), {}
  for name, fn in losses.items():
    by_teacher = bool(fn.teacher_names)
    mask_BC = batch.mask_for_teacher_losses() if by_teacher else batch.mask_for_label_losses()
    means[name] = Mean.of(fn.token_loss(logits_BCV, batch, step), mask_BC)
    total += weights[name] / label_count * means[name].total
  return total, means


def _weights(losses: Mapping[str, BaseLoss], step: jax.Array | int) -> dict[str, jax.Array]:
  return {name: fn.weight(step) for name, fn in losses.items()}


def _checked(losses: Mapping[str, BaseLoss], batch: Batch) -> dict[str, TokenLoss]:
  """Returns the losses, all of which work on logits and on the targets in the batch."""
  checked = {}
  for name, fn in losses.items():
    if not isinstance(fn, TokenLoss):
      raise bad_value(
        f"losses[{name!r}]",
        type(fn).__module__.rpartition(".")[2],
        "a loss of logits, such as losses.KD or losses.CE",
        "Call feature_loss of a loss of features yourself",
      )
    checked[name] = fn
    for teacher in fn.teacher_names:
      if teacher not in batch.targets:
        expected = f"one of the teachers in batch.targets, {tuple(batch.targets)}"
        raise bad_value(f"losses[{name!r}].teacher", teacher, expected, "Correct its name")
      _check_targets(fn, batch.targets[teacher])
    for scalar in fn.rollout_scalars:
      if getattr(batch.rollout, f"{scalar}_BT", None) is None:
        expected = f"the {scalar} of texts that the student wrote, for losses[{name!r}]"
        raise bad_value(f"Batch.rollout.{scalar}_BT", None, expected, "Add it to the batch")
  return checked


def _check_targets(fn: TokenLoss, targets: Targets) -> None:
  if isinstance(targets, SampledTargets):
    fn.check_records("sampled", targets.logp_BTK is not None, targets.temperature, "none")
  elif isinstance(targets, TopKTargets):
    fn.check_records("topk", True, targets.temperature, targets.missing_mass)
  elif isinstance(targets, LabelTargets):
    fn.check_records("labels", False, targets.temperature, "none")
  elif isinstance(targets, SpanTargets) and not fn.reads_spans:
    raise InputError(
      f"The loss {type(fn).__module__.rpartition('.')[2]!r} needs targets in the student's tokens, "
      "but these records are in the teacher's. Run `retarget`, or use the loss 'alm'."
    )


def _check_batch(shape: tuple[int, ...], width: tuple[int, ...], batch: Batch) -> None:
  labels = batch.labels_BT.shape
  if len(shape) != 3 or shape[:2] != labels or shape[-1:] != width or batch.mask_BT.shape != labels:
    raise InputError(
      f"The hidden states or logits have shape {shape}, the head's rows {width}, labels_BT "
      f"{labels} and mask_BT {batch.mask_BT.shape}. Pass [B, T, D] with [V, D], or [B, T, V], and "
      "labels and mask as [B, T]."
    )
  if batch.mask_BT.dtype != bool:
    raise InputError(
      f"Batch.mask_BT has the dtype {batch.mask_BT.dtype}; expected bool. Pass confidences in "
      "labels as Batch.smoothing_BT, which is 1 minus the confidence."
    )
