"""Soft-label loss with several teachers, weighted per token."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from distill_jax.errors import InputError, bad_value, check_choice
from distill_jax.losses import kd
from distill_jax.losses._base import TokenLoss
from distill_jax.nn import fused_head
from distill_jax.schedules import Schedule, constant
from distill_jax.types import Batch, Targets

BY = ("shares", "label", "entropy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss(TokenLoss):
  """(1 - t) sum_a s_a KD(p_a, q) - t log q(label) in nats, summed over teachers a.

  The shares s_a and the label's weight t are computed per token.
  """

  temperature: Schedule = constant(1.0)
  """Temperature of teachers and student: a positive number or a schedule."""
  teachers: tuple[str, ...] = ("teacher",)
  """Names of the teachers, usually two or more."""
  by: str = "shares"
  """Rule for the teachers' shares: "shares", "label" or "entropy".

  "shares" uses the fixed `shares`. "label" makes a share proportional to p_a(label)^sharpness, so
  that it is small where the teacher is wrong. "entropy" makes it proportional to
  exp(-sharpness H(p_a)), so that the teacher with the lowest entropy has the largest share.
  """
  shares: tuple[float, ...] = ()
  """Fixed shares for by="shares", one per teacher; () for equal shares."""
  sharpness: float = 1.0
  """Exponent, above 0, for by="label" and by="entropy"."""
  label_trust: float = 0.0
  """Weight, from 0 to 1, of the hard label where the teachers give it little probability.

  t = label_trust (1 - sum_a s_a p_a(label)). With 0 the hard label is not used.
  """
  divergence: str = "forward_kl"
  """Name of the divergence; see the loss "kd"."""
  parameters: dict[str, float] = dataclasses.field(default_factory=dict)
  """Parameters of the divergence, by name; missing ones have their defaults."""

  def __post_init__(self) -> None:
    super().__post_init__()
    self._kd(self.teachers[0] if self.teachers else "")
    check_choice("by", self.by, BY, "Correct it")
    if not 0 <= self.label_trust <= 1:
      raise bad_value("label_trust", self.label_trust, "a number from 0 to 1", "Correct it")
    if not self.sharpness > 0:
      raise bad_value("sharpness", self.sharpness, "a number above 0", "Raise it")
    if not self.teachers or len(set(self.teachers)) < len(self.teachers):
      raise bad_value("teachers", self.teachers, "one or more different names", "Correct it")
    if self.shares:
      self._check_shares()

  def _check_shares(self) -> None:
    if self.by != "shares":
      raise bad_value("shares", self.shares, f"() for by={self.by!r}", "Remove them")
    if len(self.shares) != len(self.teachers):
      expected = f"one number for each of {len(self.teachers)} teachers"
      raise bad_value("shares", self.shares, expected, "Correct them")
    if min(self.shares) < 0 or not sum(self.shares):
      expected = "numbers of at least 0 with a positive sum"
      raise bad_value("shares", self.shares, expected, "Correct them")

  @property
  def teacher_names(self) -> tuple[str, ...]:
    return self.teachers

  def check_records(self, kind: str, has_logp: bool, temperature: float, missing_mass: str) -> None:
    kd_loss = self._kd(self.teachers[0])
    kd_loss.check_records(kind, has_logp, temperature, missing_mass)

  def _kd(self, teacher: str) -> kd.Loss:
    """Returns the loss of one teacher."""
    return kd.Loss(
      temperature=self.temperature,
      teacher=teacher,
      divergence=self.divergence,
      parameters=self.parameters,
    )

  def token_loss(self, logits_BCV: jax.Array, batch: Batch, step: jax.Array | int) -> jax.Array:
    targets = [batch.targets[name] for name in self.teachers]
    label_logp_ABC = self._label_logp(targets, logits_BCV, batch.labels_BT)
    share_ABC = self._shares(targets, logits_BCV, label_logp_ABC)
    loss_ABC = jnp.stack([self._kd(n).token_loss(logits_BCV, batch, step) for n in self.teachers])
    loss_BC = jnp.sum(share_ABC * loss_ABC, 0)
    if not self.label_trust:
      return loss_BC
    trust_BC = self.label_trust * (1 - jnp.sum(share_ABC * jnp.exp(label_logp_ABC), 0))
    hard_BC = -fused_head.label_logp(logits_BCV, batch.labels_BT)
    return (1 - trust_BC) * loss_BC + trust_BC * hard_BC

  def _label_logp(
    self, targets: list[Targets], logits_BCV: jax.Array, labels_BC: jax.Array
  ) -> jax.Array:
    """Returns log p(label) of each teacher, [A, B, C]."""
    found = [t.label_logp(logits_BCV, labels_BC) for t in targets]
    return jnp.stack(_require_all(found, "label log-probabilities"))

  def _shares(
    self, targets: list[Targets], logits_BCV: jax.Array, label_logp_ABC: jax.Array
  ) -> jax.Array:
    """Returns the shares [A, B, C], which sum to 1 over A and have no gradient."""
    if self.by == "label":
      return jax.nn.softmax(self.sharpness * label_logp_ABC, 0)
    if self.by == "entropy":
      entropy_ABC = jnp.stack(_require_all([t.entropy(logits_BCV) for t in targets], "entropies"))
      return jax.nn.softmax(-self.sharpness * entropy_ABC, 0)
    shares_A = jnp.asarray(self.shares or (1.0,) * len(targets), jnp.float32)
    shares_A11 = (shares_A / jnp.sum(shares_A))[:, None, None]
    return jnp.broadcast_to(shares_A11, label_logp_ABC.shape)


def _require_all(values: list[jax.Array | None], noun: str) -> list[jax.Array]:
  """Returns the values of all teachers.

  Raises:
    InputError: The records of a teacher lack them, e.g. because they were imported from a server.
  """
  found = [value for value in values if value is not None]
  if len(found) < len(values):
    raise InputError(
      f"The loss 'mixture' needs the {noun} of every teacher, but the records of one of them lack "
      "them. Set another `by`, or record that teacher with `record` instead of importing a dump."
    )
  return found
