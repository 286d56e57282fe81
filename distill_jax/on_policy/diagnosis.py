"""Diagnosis of a round: student and teacher on texts of the student, before it trains on them.

The mean of the losses hides what goes wrong on a student's own texts. The diagnosis looks at one
microbatch of a round and compares the two models at each token:

  overlap            share of the teacher's TOP most probable tokens that are among the student's
                     TOP: a student whose overlap is small learns little from its own texts
                     (arXiv:2604.13016)
  student_mass       the student's probability of the teacher's TOP tokens
  teacher_mass       the teacher's probability of the student's TOP tokens
  reverse_kl         KL(student || teacher), also at each tenth of the texts: a rise shows that the
                     student's errors lead to further ones
  drift              mean of |log q(token) in training - log q(token) in sampling|: the two programs
                     and the two layouts of the weights should agree

The cost, for each teacher of a round, is a forward pass of both models without a gradient, and
memory for one chunk of logits and some numbers of each token. `due` keeps it below one such pass
per EVERY steps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill_jax.errors import InputError
from distill_jax.losses import DenseTargets, SampledTargets, TopKTargets, divergences
from distill_jax.nn import fused_head, sharding
from distill_jax.on_policy.options import OnPolicyOptions
from distill_jax.records import selection
from distill_jax.records.student_rows import TEACHER
from distill_jax.training.outputs import Teachers
from distill_jax.training.step import Metrics, Step
from distill_jax.training.train_state import TrainState
from distill_jax.types import Batch, Inputs, Mean, Model, PyTree, Targets

EVERY = 10  # steps between two diagnoses, at least
TOP = 16  # most probable tokens of the two models that are compared
TENTHS = 10
TEXTS, TOP_SHOWN = 3, 3  # texts for the report, and most probable tokens at each of their places
OF_TOKENS = ("overlap", "student_mass", "teacher_mass", "reverse_kl")  # metrics of each teacher


class Diagnosed(NamedTuple):
  """The diagnosis of a microbatch.

  Attributes:
    metrics: Scalars by name: those above, for each teacher as "METRIC/TEACHER"; the reverse KL of
      the tenths of the texts as "reverse_kl_tenth_N/TEACHER", N from 1; and "drift". NaN is a mean
      over no token. What the targets do not allow is missing: see `_of_teacher`.
    texts: TEXTS rows, evenly spaced: arrays [TEXTS, T], and [TEXTS, T, TOP_SHOWN] of the most
      probable tokens; see own_texts_file.py.
  """

  metrics: Metrics
  texts: PyTree


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, as jit needs
class Diagnosis:
  """The diagnosis as a pure function of the training state and a batch.

  Attributes:
    step: The training step, whose student, teachers and chunk are used.
  """

  step: Step

  def __call__(
    self, state: TrainState, batch: Batch, teachers: Teachers, base: Model | None = None
  ) -> Diagnosed:
    """Diagnoses the first microbatch of a batch of texts that the student has sampled.

    Args:
      state: The training state before the step.
      batch: The batch of the step.
      teachers: The online teachers, by name.
      base: See `Step.__call__`.
    """
    step = self.step
    piece = jax.tree.map(lambda x: step.microbatches(x)[0], batch)
    prepared = step.prepare(step.trainable.model(state.params, base), piece, teachers)
    out, labelled, mask_BT = prepared.out, prepared.batch, piece.mask_BT
    found = fused_head.each(
      functools.partial(_of_chunk, out.soft_cap),
      out.hidden_BTD,
      out.head_VD,
      labelled,
      max(1, step.chunk * mask_BT.shape[1] // (step.longest or mask_BT.shape[1])),
      step.vocab_size,
      seq_axis=sharding.SEQ,
    )
    metrics, tenth_BT = {}, tenths(mask_BT)
    if piece.rollout is not None:
      drift_BT = jnp.abs(found["student"]["logp"] - piece.rollout.behaviour_logp_BT)
      metrics["drift"] = _mean(drift_BT, mask_BT)
    for name, values in found["teachers"].items():
      for key in (key for key in OF_TOKENS if key in values):
        metrics[f"{key}/{name}"] = _mean(values[key], mask_BT)
      for n in range(TENTHS if "reverse_kl" in values else 0):
        key = f"reverse_kl_tenth_{n + 1}/{name}"
        metrics[key] = _mean(values["reverse_kl"], mask_BT & (tenth_BT == n))
    rows = [i * len(mask_BT) // TEXTS for i in range(min(TEXTS, len(mask_BT)))]
    assert isinstance(piece.inputs, Inputs)
    texts = {"token": piece.inputs.tokens_BT, "label": piece.labels_BT, "mask": mask_BT, **found}
    return Diagnosed(metrics, jax.tree.map(lambda x_BT: x_BT[jnp.array(rows)], texts))


def jitted(step: Step, mesh: Mesh) -> jax.stages.Wrapped:
  """Returns the jitted diagnosis: (state, batch, teachers, base=None) -> Diagnosed.

  The results are on all devices, and the arguments are not donated.
  """
  return jax.jit(Diagnosis(step), out_shardings=sharding.replicated(mesh))


def named(metrics: Mapping[str, jax.Array], teacher: str) -> dict[str, float]:
  """Returns the metrics of a batch of one of several teachers, with its name.

  Args:
    metrics: Diagnosed.metrics, on the host, of a batch whose targets have the name TEACHER.
    teacher: The name; TEACHER if it is the only one.
  """
  if teacher == TEACHER:
    return {key: float(x) for key, x in metrics.items()}
  kinds = {key: key.removesuffix(f"/{TEACHER}") for key in metrics}
  return {f"{kinds[key]}/{teacher}": float(x) for key, x in metrics.items()}


def due(step: int, every: int) -> bool:
  """Returns whether to diagnose before a step, the first one of a round.

  Args:
    step: The step.
    every: Number of steps of a round.
  """
  return step == 0 or step // EVERY > (step - every) // EVERY


def check_limits(options: OnPolicyOptions, metrics: Mapping[str, float], step: int) -> None:
  """Checks a diagnosis against the limits of a config.

  Args:
    options: The config section `on_policy`.
    metrics: The metrics of the diagnosis.
    step: The step, for messages.

  Raises:
    InputError: A value is beyond its limit, or is not a number.
  """
  for key, value in metrics.items():
    kind = key.partition("/")[0]
    if kind == "drift" and options.max_drift and not value <= options.max_drift:
      raise InputError(
        f"Before step {step}, the log-probabilities of the student's own tokens differ from those "
        f"at their sampling by {value:.3g} nats on average; expected at most "
        f"{options.max_drift:g} (on_policy.max_drift). Set generate.cache_dtype='' or lower "
        "on_policy.lag if they are set, compute in float32 to find the cause, or raise the limit."
      )
    if kind == "overlap" and options.min_overlap and not value >= options.min_overlap:
      raise InputError(
        f"Before step {step}, {value:.0%} of the {TOP} most probable tokens of the teacher "
        f"{key.partition('/')[2]!r} are among those of the student; expected at least "
        f"{options.min_overlap:.0%} (on_policy.min_overlap). The student is too far from the "
        "teacher to learn from its own texts: train it on texts of the teacher first (generate, "
        "filter, record and train), or lower the limit."
      )


def tenths(mask_BT: jax.Array) -> jax.Array:
  """Returns the tenth of its text that each label is in, from 0, int32 [B, T].

  Label i of the n labels of a row is in tenth 10 i / n, rounded down.
  """
  count_B1 = jnp.maximum(jnp.sum(mask_BT, -1, keepdims=True), 1)
  index_BT = jnp.cumsum(mask_BT, -1) - 1
  return TENTHS * index_BT // count_B1


def _mean(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
  """Returns the mean over the mask, or NaN over nothing."""
  mean = Mean.of(x_BT, mask_BT)
  return jnp.where(mean.count > 0, mean.value(), jnp.nan)


def _of_chunk(soft_cap: float | None, logits_BCV: jax.Array, piece: Batch) -> PyTree:
  """Returns the values of the student and of each teacher at the labels of a chunk."""
  z_BCV = fused_head.cap_and_select(logits_BCV, soft_cap, piece.class_range_BT2)
  top_BCK, ids_BCK = selection.top_k(z_BCV, TOP)
  logq_BCK = top_BCK - fused_head.log_sum_exp(z_BCV)
  student = {"logp": fused_head.label_logp(z_BCV, piece.labels_BT), **_shown(ids_BCK, logq_BCK)}
  teachers = {
    name: _of_teacher(targets, z_BCV, piece.labels_BT, ids_BCK, student["logp"])
    for name, targets in piece.targets.items()
  }
  return {"student": student, "teachers": teachers}


def _of_teacher(
  targets: Targets,
  z_BCV: jax.Array,
  labels_BC: jax.Array,
  ours_BCK: jax.Array,
  logq_BC: jax.Array,
) -> dict[str, jax.Array]:
  """Returns the values of a teacher at the labels of a chunk, as far as its targets allow.

  The reverse KL is exact where the teacher runs in the step. Otherwise it is log q(label) - log
  p(label), whose mean over texts is the reverse KL if the current student has sampled them, at
  temperature 1 and without truncation. In top-k scores, a token that is not stored counts as
  having the teacher's probability 0. In sampled scores, teacher_mass is an unbiased estimate.

  Args:
    targets: The teacher's targets.
    z_BCV: The student's logits.
    labels_BC: The labels.
    ours_BCK: The student's most probable tokens.
    logq_BC: The student's log-probability of each label.
  """
  found: dict[str, jax.Array] = {}
  label_BC = targets.label_logp(z_BCV, labels_BC) if targets.temperature == 1 else None
  if label_BC is not None:
    found |= {"logp": label_BC, "reverse_kl": logq_BC - label_BC}
  if isinstance(targets, DenseTargets):
    logp_BCV, _ = targets.log_probs(z_BCV)
    logp_BCK, ids_BCK = selection.top_k(logp_BCV, TOP)
    found["reverse_kl"] = targets.divergence(divergences.reverse_kl, z_BCV, 1.0)
    found["teacher_mass"] = _mass(jnp.take_along_axis(logp_BCV, ours_BCK, -1))
  elif isinstance(targets, TopKTargets) and targets.temperature == 1:
    logp_BCK, at_BCK = jax.lax.top_k(targets.logp_BTK, min(TOP, targets.logp_BTK.shape[-1]))
    ids_BCK = jnp.take_along_axis(targets.ids_BTK, at_BCK, -1)
    found["teacher_mass"] = _weight_of(targets.ids_BTK, jnp.exp(targets.logp_BTK), ours_BCK)
  elif isinstance(targets, SampledTargets) and targets.temperature == 1:
    found["teacher_mass"] = _weight_of(targets.ids_BTK, targets.weight_BTK, ours_BCK)
    return found
  else:
    return found
  is_used_BCK = logp_BCK > -jnp.inf
  is_ours_BCK = _is_in(ids_BCK, ours_BCK[..., : ids_BCK.shape[-1]]) & is_used_BCK
  count_BC = jnp.maximum(jnp.sum(is_used_BCK, -1), 1)
  found["overlap"] = jnp.sum(is_ours_BCK, -1) / count_BC
  logq_BCK = fused_head.logp_at(z_BCV, ids_BCK)
  found["student_mass"] = _mass(jnp.where(is_used_BCK, logq_BCK, -jnp.inf))
  return found | _shown(ids_BCK, logp_BCK)


def _mass(logp_BCK: jax.Array) -> jax.Array:
  return jnp.sum(jnp.exp(logp_BCK), -1)


def _is_in(ids_BCK: jax.Array, others_BCK: jax.Array) -> jax.Array:
  """Returns which ids are among others, bool [B, C, K]."""
  return jnp.any(ids_BCK[..., :, None] == others_BCK[..., None, :], -1)


def _weight_of(ids_BCK: jax.Array, p_BCK: jax.Array, ours_BCK: jax.Array) -> jax.Array:
  """Returns the sum of the probabilities of the ids that are among the student's."""
  return jnp.sum(jnp.where(_is_in(ids_BCK, ours_BCK), p_BCK, 0.0), -1)


def _shown(ids_BCK: jax.Array, logp_BCK: jax.Array) -> dict[str, jax.Array]:
  return {"top_ids": ids_BCK[..., :TOP_SHOWN], "top_p": jnp.exp(logp_BCK[..., :TOP_SHOWN])}
