"""The three kinds of targets: teacher and student compared on the same outcomes.

DenseTargets    every token: an online teacher's logits, made for the chunk.
TopKTargets     the k stored tokens, and what the convention does with the mass outside them.
SampledTargets  the sampled tokens, each with an unbiased estimate of its p.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from distill_jax.errors import InputError
from distill_jax.losses import divergences
from distill_jax.nn import fused_head
from distill_jax.types import Targets, Terms

NEG_LARGE = -1e4  # a log-probability whose exponential is 0, and finite as -inf is not
MIN_TAIL = 1e-7  # of the mass outside top-k: float32 cannot tell 1 - sum(p) from less


class DenseTargets(Targets, kw_only=True):
  """An online teacher's outputs: its logits exist for a chunk of positions at a time.

  Attributes:
    hidden_BTD, head_VD, soft_cap, contrastive: see types.Output.
  """

  hidden_BTD: jax.Array
  soft_cap: float | None = struct.field(pytree_node=False, default=None)
  contrastive: bool = struct.field(pytree_node=False, default=False)

  def logits(self) -> jax.Array:
    """The teacher's logits, float32 [B, C, V]."""
    assert self.head_VD is not None
    logits_BCV = fused_head.logits(self.hidden_BTD, self.head_VD)
    return fused_head.soft_cap(logits_BCV, self.soft_cap)

  def log_probs(
    self, logits_BCV: jax.Array, temperature: jax.Array | float = 1.0
  ) -> tuple[jax.Array, jax.Array]:
    """(log p, log q) over the student's rows; rows past either vocabulary have no probability."""
    teacher_BCV = fused_head.fit_rows(self.logits(), logits_BCV)
    logp_BCV = jax.nn.log_softmax(teacher_BCV / temperature)
    return logp_BCV, jax.nn.log_softmax(logits_BCV / temperature)

  def divergence(
    self, terms: Terms, logits_BCV: jax.Array, temperature: jax.Array | float
  ) -> jax.Array:
    """The exact divergence of each position, float32 [B, C]."""
    return _sum(terms, *self.log_probs(logits_BCV, temperature))

  def forward_kl(self, logits_BCV: jax.Array, temperature: jax.Array | float) -> jax.Array:
    return self.divergence(divergences.forward_kl, logits_BCV, temperature)

  def label_logp(self, logits_BCV: jax.Array, labels_BC: jax.Array) -> jax.Array:
    logp_BCV, _ = self.log_probs(jax.lax.stop_gradient(logits_BCV))
    return jnp.take_along_axis(logp_BCV, labels_BC[..., None], -1)[..., 0]

  def entropy(self, logits_BCV: jax.Array) -> jax.Array:
    logp_BCV, _ = self.log_probs(jax.lax.stop_gradient(logits_BCV))
    return -jnp.sum(jnp.where(logp_BCV > -jnp.inf, jnp.exp(logp_BCV) * logp_BCV, 0.0), -1)

  def argmax(self, logits_BCV: jax.Array) -> jax.Array:
    return jnp.argmax(self.log_probs(logits_BCV)[0], -1)


class TopKTargets(Targets, kw_only=True):
  """The k most probable tokens of each position.

  Attributes:
    ids_BTK: int32, tokens.
    logp_BTK: float32, their true log-probabilities; unused entries are -inf.
    missing_mass: "tail_bucket", the other tokens are one outcome more (the temperature must be
      1); or "renormalise", the k tokens are all outcomes.
  """

  ids_BTK: jax.Array
  logp_BTK: jax.Array
  missing_mass: str = struct.field(pytree_node=False, default="tail_bucket")

  def log_probs(
    self, logits_BCV: jax.Array, temperature: jax.Array | float = 1.0
  ) -> tuple[jax.Array, jax.Array]:
    """(log p, log q) over k tokens, or k and the rest; unused entries are -inf in both."""
    used = self.logp_BTK > -jnp.inf
    if self.missing_mass == "renormalise":
      z = jnp.take_along_axis(logits_BCV, self.ids_BTK, -1)
      logp = jnp.where(used, self.logp_BTK, -jnp.inf) / temperature
      logq = jnp.where(used, z, -jnp.inf) / temperature
      return (
        jax.nn.log_softmax(logp, where=used, axis=-1),
        jax.nn.log_softmax(logq, where=used, axis=-1),
      )
    logq = jnp.where(used, fused_head.logp_at(logits_BCV, self.ids_BTK), -jnp.inf)
    return _with_tail(self.logp_BTK), _with_tail(logq)

  def divergence(
    self, terms: Terms, logits_BCV: jax.Array, temperature: jax.Array | float
  ) -> jax.Array:
    """The exact divergence between the two over these outcomes, float32 [B, C]."""
    return _sum(terms, *self.log_probs(logits_BCV, temperature))

  def forward_kl(self, logits_BCV: jax.Array, temperature: jax.Array | float) -> jax.Array:
    return self.divergence(divergences.forward_kl, logits_BCV, temperature)


class SampledTargets(Targets, kw_only=True):
  """Tokens drawn from the teacher's distribution at each position.

  Attributes:
    ids_BTK: int32, tokens.
    weight_BTK: float32, unbiased estimates of their probabilities, summing to 1; unused entries
      are 0, and a position that the teacher did not read has no other.
    logp_BTK: float32, their true log-probabilities, where they are recorded.
  """

  ids_BTK: jax.Array
  weight_BTK: jax.Array
  logp_BTK: jax.Array | None = None

  def log_probs(
    self, logits_BCV: jax.Array, temperature: jax.Array | float = 1.0
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(log p, log q, weight) at the sampled tokens; needs recorded log-probabilities."""
    if self.logp_BTK is None:
      raise InputError("sampled targets hold no log-probabilities; record with records.logp=True")
    valid = self.weight_BTK > 0
    logp = jnp.where(valid, self.logp_BTK, 0.0)
    tilt = jnp.where(valid, self.weight_BTK * jnp.exp((1 / temperature - 1) * logp), 0.0)
    mass = jnp.sum(tilt, -1, keepdims=True)  # estimates sum_i p_i^(1/temperature)
    mass = jnp.where(mass > 0, mass, 1.0)  # a masked position has no entries
    logq = fused_head.logp_at(logits_BCV / temperature, self.ids_BTK)
    return logp / temperature - jnp.log(mass), logq, tilt / mass

  def divergence(
    self, terms: Terms, logits_BCV: jax.Array, temperature: jax.Array | float
  ) -> jax.Array:
    """An estimate of the divergence of each position, float32 [B, C].

    Unbiased at a temperature of 1, and consistent at others by self-normalised weights
    p^(1/temperature - 1). Needs recorded log-probabilities.
    """
    logp, logq, weight = self.log_probs(logits_BCV, temperature)
    valid = weight > 0
    logp = jnp.where(valid, logp, 0.0)
    return jnp.sum(jnp.where(valid, weight * jnp.exp(-logp) * terms(logp, logq), 0.0), -1)

  def forward_kl(self, logits_BCV: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """-H(p) - sum_i w_i log q_i: the one divergence that counts alone serve without bias.

    With recorded log-probabilities the weights follow any temperature; without, p is as recorded.
    """
    if self.logp_BTK is not None:
      logp_BCK, logq_BCK, weight_BCK = self.log_probs(logits_BCV, temperature)
      return jnp.sum(jnp.where(weight_BCK > 0, weight_BCK * (logp_BCK - logq_BCK), 0.0), -1)
    assert self.entropy_BT is not None
    logq_BCK = fused_head.logp_at(logits_BCV / temperature, self.ids_BTK)
    return -self.entropy_BT - jnp.sum(self.weight_BTK * logq_BCK, -1)

  def present(self) -> jax.Array:
    return jnp.any(self.weight_BTK > 0, -1)


def check(
  kind: str,
  has_logp: bool,
  divergence: str,
  temperature_changes: bool,
  missing_mass: str = "none",
) -> None:
  """Refuses a divergence over records that cannot serve it without bias.

  Args:
    kind: of the records; "dense" for an online teacher.
    has_logp: sampled records that hold true log-probabilities beside the counts.
    temperature_changes: a temperature other than the recorded one is asked for.
    missing_mass: the convention of top-k records.
  """
  if kind == "sampled" and divergence == "adaptive_kl":
    raise InputError(
      "adaptive_kl ranks all outcomes and sampled records hold a random few; record kind topk"
    )
  if kind == "sampled" and not has_logp and divergence != "forward_kl":
    raise InputError(
      f"{divergence} needs p itself and sampled records hold counts, which estimate it without "
      "bias only where the loss is linear in p; record with records.logp=True, or kind topk"
    )
  if kind == "sampled" and not has_logp and temperature_changes:
    raise InputError(
      "the temperature is not the recorded one and sampled records hold counts, which cannot be "
      "raised to a power without bias; record at that temperature, or with records.logp=True"
    )
  if kind == "topk" and temperature_changes and missing_mass == "tail_bucket":
    raise InputError(
      "the temperature is not the recorded one and these top-k records have a tail bucket, of "
      "which a temperature makes nothing that is known; record with "
      "records.missing_mass=renormalise, or keep the recorded temperature"
    )


def _sum(terms: Terms, logp: jax.Array, logq: jax.Array) -> jax.Array:
  """Sums over the outcomes that either side can have; the others are -inf in both."""
  valid = (logp > -jnp.inf) & (logq > -jnp.inf)
  logp, logq = (jnp.where(valid, x, NEG_LARGE) for x in (logp, logq))
  return jnp.sum(jnp.where(valid, terms(logp, logq), 0.0), -1)


def _with_tail(logx: jax.Array) -> jax.Array:
  """Adds the mass of all other tokens as one outcome, where float32 can tell it from 0."""
  inside = jax.nn.logsumexp(logx, axis=-1, keepdims=True)
  tail = jnp.log(-jnp.expm1(jnp.minimum(inside, -MIN_TAIL)))
  return jnp.concatenate([logx, tail], -1)
