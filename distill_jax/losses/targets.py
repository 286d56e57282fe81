"""The five kinds of targets, which differ in the outcomes that are compared.

DenseTargets    All tokens: logits of an online teacher, given or computed one chunk at a time.
TopKTargets     The k stored tokens, with a convention for the mass outside them.
SampledTargets  The sampled tokens, each with an unbiased estimate of its probability.
LabelTargets    The labels alone, with their exact log-probabilities.
SpanTargets     The text alone: log-probabilities of its spans, by a teacher with other tokens.

A token loss gets the targets of one chunk of positions: the axis T of their arrays is its axis C.
"""

from __future__ import annotations

from typing import Self

import jax
import jax.numpy as jnp
from flax import struct

from distill_jax.errors import InputError
from distill_jax.losses import divergences
from distill_jax.nn import fused_head
from distill_jax.types import PyTree, Targets, Terms

NEG_LARGE = -1e4  # a finite log-probability whose exponential is 0
MIN_TAIL = 1e-7  # smallest mass outside top-k: the resolution of 1 - sum(p) in float32


class DenseTargets(Targets, kw_only=True):
  """Outputs of an online teacher: hidden states and head, or logits.

  From hidden states and head, logits are computed for one chunk at a time.

  Attributes:
    hidden_BTD: Hidden states; see types.Output. None with `logits_BTV`.
    head_VD: The unembedding; see types.Output. None with `logits_BTV`.
    soft_cap: Soft cap of the logits; see types.Output. Given logits are not capped again.
    contrastive: True if the head is made of the batch; see types.Output.
    logits_BTV: The logits; None to compute them from `hidden_BTD` and `head_VD`.
  """

  hidden_BTD: PyTree = None  # an array, or None
  soft_cap: float | None = struct.field(pytree_node=False, default=None)
  contrastive: bool = struct.field(pytree_node=False, default=False)
  logits_BTV: jax.Array | None = None

  def logits(self) -> jax.Array:
    """Returns the teacher's logits, float32 [B, C, V].

    Raises:
      InputError: Neither logits nor hidden states and head are given.
    """
    if self.logits_BTV is not None:
      return self.logits_BTV.astype(jnp.float32)
    if self.hidden_BTD is None or self.head_VD is None:
      given = [name for name in ("hidden_BTD", "head_VD") if getattr(self, name) is not None]
      raise InputError(
        f"DenseTargets has {' and '.join(given) or 'no outputs'}; expected hidden_BTD and head_VD, "
        "or logits_BTV. Pass the missing ones."
      )
    logits_BCV = fused_head.logits(self.hidden_BTD, self.head_VD)
    return fused_head.soft_cap(logits_BCV, self.soft_cap)

  def with_logits(self) -> Self:
    return self.replace(logits_BTV=self.logits(), head_VD=None)

  def aligned_logits(self, logits_BCV: jax.Array) -> jax.Array:
    """Returns the teacher's logits over the rows of the student's head; padding rows are -inf."""
    return fused_head.fit_rows(self.logits(), logits_BCV)

  def log_probs(
    self, logits_BCV: jax.Array, temperature: jax.Array | float = 1.0
  ) -> tuple[jax.Array, jax.Array]:
    """Returns (log p, log q) over the rows of the student's head, both float32 [B, C, V].

    Padding rows are -inf.
    """
    logp_BCV = jax.nn.log_softmax(self.aligned_logits(logits_BCV) / temperature)
    return logp_BCV, jax.nn.log_softmax(logits_BCV / temperature)

  def divergence(
    self, terms: Terms, logits_BCV: jax.Array, temperature: jax.Array | float
  ) -> jax.Array:
    """Returns the exact divergence at each position, float32 [B, C]."""
    return _sum(terms, *self.log_probs(logits_BCV, temperature))

  def forward_kl(self, logits_BCV: jax.Array, temperature: jax.Array | float) -> jax.Array:
    return fused_head.kl(self.aligned_logits(logits_BCV), logits_BCV, temperature)

  def label_logp(self, logits_BCV: jax.Array, labels_BC: jax.Array) -> jax.Array:
    return fused_head.label_logp(self.aligned_logits(logits_BCV), labels_BC)

  def entropy(self, logits_BCV: jax.Array) -> jax.Array:
    return fused_head.entropy(self.aligned_logits(logits_BCV))

  def argmax(self, logits_BCV: jax.Array) -> jax.Array:
    return jnp.argmax(self.aligned_logits(logits_BCV), -1)


class TopKTargets(Targets, kw_only=True):
  """The k most probable tokens at each position.

  Attributes:
    ids_BTK: int32 token ids.
    logp_BTK: float32, exact log-probabilities; -inf in unused entries.
    missing_mass: "tail_bucket" (all other tokens are one further outcome; needs the recorded
      temperature) or "renormalise" (the k tokens are the only outcomes).
  """

  ids_BTK: jax.Array
  logp_BTK: jax.Array
  missing_mass: str = struct.field(pytree_node=False, default="tail_bucket")

  def log_probs(
    self, logits_BCV: jax.Array, temperature: jax.Array | float = 1.0
  ) -> tuple[jax.Array, jax.Array]:
    """Returns (log p, log q) over the outcomes, both float32; -inf in unused entries.

    Their shape is [B, C, K], or [B, C, K + 1] with a tail bucket, which is the last outcome.
    """
    used = self.logp_BTK > -jnp.inf
    if self.missing_mass == "renormalise":
      z = jnp.take_along_axis(logits_BCV, self.ids_BTK, -1)
      logp = jnp.where(used, self.logp_BTK, -jnp.inf) / temperature
      logq = jnp.where(used, z, -jnp.inf) / temperature
      return (
        jax.nn.log_softmax(logp, where=used, axis=-1),
        jax.nn.log_softmax(logq, where=used, axis=-1),
      )
    logq = fused_head.logp_at(logits_BCV / temperature, self.ids_BTK)
    logq = jnp.where(used, logq, -jnp.inf)
    return _with_tail(self.logp_BTK), _with_tail(logq)

  def divergence(
    self, terms: Terms, logits_BCV: jax.Array, temperature: jax.Array | float
  ) -> jax.Array:
    """Returns the exact divergence over these outcomes, float32 [B, C]."""
    return _sum(terms, *self.log_probs(logits_BCV, temperature))

  def forward_kl(self, logits_BCV: jax.Array, temperature: jax.Array | float) -> jax.Array:
    return self.divergence(divergences.forward_kl, logits_BCV, temperature)

  def present(self) -> jax.Array:
    # Positions without targets are filled with zeros. Real entries are not, as their ids differ.
    return jnp.any((self.logp_BTK != 0) | (self.ids_BTK != 0), -1)


class SampledTargets(Targets, kw_only=True):
  """Tokens sampled from the teacher's distribution at each position.

  Attributes:
    ids_BTK: int32 token ids.
    weight_BTK: float32, unbiased estimates of their probabilities, which sum to 1. Unused entries
      are 0; at positions the teacher was not evaluated on, all are.
    logp_BTK: float32, exact log-probabilities; None if they are not recorded.
  """

  ids_BTK: jax.Array
  weight_BTK: jax.Array
  logp_BTK: jax.Array | None = None

  def weighted_log_probs(
    self, logits_BCV: jax.Array, temperature: jax.Array | float = 1.0
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (log p, log q, weight) at the sampled tokens, each float32 [B, C, K].

    Raises:
      InputError: Log-probabilities are not recorded.
    """
    if self.logp_BTK is None:
      raise InputError(
        "These sampled records lack log-probabilities. Record with records.logp=True."
      )
    valid = self.weight_BTK > 0
    logp = jnp.where(valid, self.logp_BTK, 0.0)
    power = self.temperature / temperature  # from the recorded temperature to this one
    tilt = jnp.where(valid, self.weight_BTK * jnp.exp((power - 1) * logp), 0.0)
    mass = jnp.sum(tilt, -1, keepdims=True)  # estimates sum_i p_i^power
    mass = jnp.where(mass > 0, mass, 1.0)  # a masked position has no entries
    logq = fused_head.logp_at(logits_BCV / temperature, self.ids_BTK)
    return power * logp - jnp.log(mass), logq, tilt / mass

  def divergence(
    self, terms: Terms, logits_BCV: jax.Array, temperature: jax.Array | float
  ) -> jax.Array:
    """Returns an estimate of the divergence at each position, float32 [B, C].

    The estimate is unbiased at the recorded temperature T0. At others it is consistent, with
    self-normalised weights p^(T0 / temperature - 1).

    Raises:
      InputError: Log-probabilities are not recorded.
    """
    logp, logq, weight = self.weighted_log_probs(logits_BCV, temperature)
    valid = weight > 0
    logp = jnp.where(valid, logp, 0.0)
    return jnp.sum(jnp.where(valid, weight * jnp.exp(-logp) * terms(logp, logq), 0.0), -1)

  def forward_kl(self, logits_BCV: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """Returns an estimate of KL(p || q) at each position, float32 [B, C].

    The estimate is -H(p) - sum_i w_i log q_i. No other divergence is unbiased with counts alone.
    With recorded log-probabilities the weights are adjusted to the temperature; without them, p
    keeps the recorded temperature.
    """
    if self.logp_BTK is not None:
      logp_BCK, logq_BCK, weight_BCK = self.weighted_log_probs(logits_BCV, temperature)
      return jnp.sum(jnp.where(weight_BCK > 0, weight_BCK * (logp_BCK - logq_BCK), 0.0), -1)
    assert self.entropy_BT is not None
    logq_BCK = fused_head.logp_at(logits_BCV / temperature, self.ids_BTK)
    weighted = jnp.where(self.weight_BTK > 0, self.weight_BTK * logq_BCK, 0.0)  # not 0 * -inf
    return -self.entropy_BT - jnp.sum(weighted, -1)

  def present(self) -> jax.Array:
    return jnp.any(self.weight_BTK > 0, -1)


class LabelTargets(Targets, kw_only=True):
  """The log-probability of the label at each position, and no distribution.

  Enough for losses that compare it with the student's: policy_gradient, log_ratio and alm.

  Attributes:
    label_logp_BT: float32, log p(label) in nats.
  """

  label_logp_BT: jax.Array


class SpanTargets(Targets, kw_only=True):
  """Log-probabilities of spans of the text, by a teacher with another tokenizer.

  A span is a piece of text that begins and ends at a token's border in both tokenizations, and that
  contains no other common border. It is one label of a row or several consecutive ones.

  Attributes:
    span_logp_BT: float32, the teacher's log-probability of the span that a label belongs to.
    span_left_BT: int32, the number of labels of the span from this one on: 1 at its last label, and
      0 at labels without a span.
    student_logp_BT: float32, the student's log-probability of the span; None until `fused_loss` or
      `logits_loss` adds it.
  """

  span_logp_BT: jax.Array
  span_left_BT: jax.Array
  student_logp_BT: jax.Array | None = None

  def with_student(self, label_logp_BT: jax.Array) -> SpanTargets:
    """Returns the targets with the student's log-probabilities of the spans.

    Sums are over the labels of each span alone, in a fixed order, so that they neither lose digits
    to the rest of a long row nor depend on the device.

    Args:
      label_logp_BT: The student's log-probability of each label of whole rows.
    """
    left_BT = self.span_left_BT
    starts_BT = jnp.pad(left_BT[:, :-1] <= 1, ((0, 0), (1, 0)), constant_values=True)

    def join(left: tuple, right: tuple) -> tuple:
      (a, a_starts), (b, b_starts) = left, right
      return jnp.where(b_starts, b, a + b), a_starts | b_starts

    sums_BT, _ = jax.lax.associative_scan(join, (label_logp_BT, starts_BT), axis=1)
    last_BT = jnp.arange(left_BT.shape[1])[None] + jnp.maximum(left_BT - 1, 0)
    return self.replace(student_logp_BT=jnp.take_along_axis(sums_BT, last_BT, 1))

  def present(self) -> jax.Array:
    return self.span_left_BT > 0


def check_unbiased(
  kind: str,
  has_logp: bool,
  divergence: str,
  temperature_changes: bool,
  missing_mass: str = "none",
) -> None:
  """Checks that a divergence can be estimated without bias from records.

  Args:
    kind: Kind of the records; "dense" for an online teacher.
    has_logp: True if sampled records hold exact log-probabilities in addition to counts.
    divergence: Name of the divergence.
    temperature_changes: True if the loss has a temperature other than the recorded one.
    missing_mass: Convention of top-k records.

  Raises:
    InputError: The estimate would be biased.
  """
  if kind == "labels":
    raise InputError(
      f"{divergence} compares distributions, but records of kind 'labels' hold only the labels' "
      "log-probabilities. Use the loss policy_gradient, log_ratio or alm, or record with another "
      "records.kind."
    )
  if kind == "sampled" and divergence == "adaptive_kl":
    raise InputError(
      "adaptive_kl ranks all outcomes, but sampled records hold a random subset. Record with "
      "records.kind=topk."
    )
  if kind == "sampled" and not has_logp and divergence != "forward_kl":
    raise InputError(
      f"{divergence} needs exact probabilities. Counts of sampled records are unbiased only for "
      "losses linear in p. Record with records.logp=True or records.kind=topk."
    )
  if kind == "sampled" and not has_logp and temperature_changes:
    raise InputError(
      "The loss's temperature differs from the recorded one, and counts of sampled records cannot "
      "be raised to a power without bias. Record at that temperature or with records.logp=True."
    )
  if kind == "topk" and temperature_changes and missing_mass == "tail_bucket":
    raise InputError(
      "The loss's temperature differs from the recorded one, and the mass of a tail bucket at "
      "another temperature is unknown. Record with records.missing_mass=renormalise, or keep the "
      "recorded temperature."
    )


def _sum(terms: Terms, logp: jax.Array, logq: jax.Array) -> jax.Array:
  """Returns the sum of the terms over outcomes with a finite log-probability on both sides."""
  valid = (logp > -jnp.inf) & (logq > -jnp.inf)
  logp, logq = (jnp.where(valid, x, NEG_LARGE) for x in (logp, logq))
  return jnp.sum(jnp.where(valid, terms(logp, logq), 0.0), -1)


def _with_tail(logx: jax.Array) -> jax.Array:
  """Appends the log-mass of all other tokens as one outcome, of at least MIN_TAIL."""
  inside = jax.nn.logsumexp(logx, axis=-1, keepdims=True)
  tail = jnp.log(-jnp.expm1(jnp.minimum(inside, -MIN_TAIL)))
  return jnp.concatenate([logx, tail], -1)
