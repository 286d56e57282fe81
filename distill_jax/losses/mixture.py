"""Soft labels of several teachers: at each token, more of the one that knows better."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from distill_jax.errors import InputError
from distill_jax.losses import kd
from distill_jax.losses._base import TokenLoss
from distill_jax.nn import fused_head
from distill_jax.schedules import Schedule, constant
from distill_jax.types import Batch, Targets

BY = ("shares", "label", "entropy")


@dataclasses.dataclass(frozen=True)
class Loss(TokenLoss):
  """(1 - t) sum_a s_a KD(p_a, q) - t log q(label), in nats: a and t of each token.

  Attributes:
    temperature, divergence, parameters: as in kd.py.
    teachers: their names, two or more; with one, only label_trust makes this other than kd.
    by: what a teacher's share s_a follows: "shares", fixed ones; "label", s_a proportional to
      p_a(label)^sharpness, so that it falls where a teacher is wrong; "entropy", to
      exp(-sharpness H(p_a)), so that the teacher with the lowest entropy has the largest.
    shares: for "shares"; (): equal ones.
    label_trust: t = label_trust (1 - sum_a s_a p_a(label)): the hard label replaces the soft ones
      as far as the teachers give it no probability. 0: never.
  """

  temperature: Schedule = constant(1.0)
  teachers: tuple[str, ...] = ("teacher",)
  by: str = "shares"
  shares: tuple[float, ...] = ()
  sharpness: float = 1.0
  label_trust: float = 0.0
  divergence: str = "forward_kl"
  parameters: dict[str, float] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    super().__post_init__()
    self._kd(self.teachers[0] if self.teachers else "")
    if self.by not in BY or not 0 <= self.label_trust <= 1 or not self.sharpness > 0:
      raise InputError(
        f"by is {self.by!r}, label_trust {self.label_trust} and sharpness {self.sharpness}; by is "
        f"one of {BY}, the trust from 0 to 1, the sharpness above 0"
      )
    if not self.teachers or len(set(self.teachers)) < len(self.teachers):
      raise InputError(f"teachers is {self.teachers}; name one or more, each once")
    if self.shares and (
      self.by != "shares"
      or len(self.shares) != len(self.teachers)
      or min(self.shares) < 0
      or not sum(self.shares)
    ):
      raise InputError(
        f"shares is {self.shares} for {len(self.teachers)} teachers by {self.by!r}; they belong to "
        "by='shares', one a teacher, none below 0"
      )

  @property
  def teacher_names(self) -> tuple[str, ...]:
    return self.teachers

  def check_records(self, kind: str, has_logp: bool, temperature: float, missing_mass: str) -> None:
    alone = self._kd(self.teachers[0])
    alone.check_records(kind, has_logp, temperature, missing_mass)

  def _kd(self, teacher: str) -> kd.Loss:
    """The loss of one teacher alone."""
    return kd.Loss(self.weight, self.temperature, teacher, self.divergence, self.parameters)

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
    """log p(label) of each teacher [A, B, C]."""
    found = [t.label_logp(logits_BCV, labels_BC) for t in targets]
    return jnp.stack(_all_there(found, "label log-probabilities"))

  def _shares(
    self, targets: list[Targets], logits_BCV: jax.Array, label_logp_ABC: jax.Array
  ) -> jax.Array:
    """[A, B, C], summing to 1 over A at each token; no gradient passes through them."""
    if self.by == "label":
      return jax.nn.softmax(self.sharpness * label_logp_ABC, 0)
    if self.by == "entropy":
      entropy_ABC = jnp.stack(_all_there([t.entropy(logits_BCV) for t in targets], "entropies"))
      return jax.nn.softmax(-self.sharpness * entropy_ABC, 0)
    shares_A = jnp.asarray(self.shares or (1.0,) * len(targets), jnp.float32)
    shares_A11 = (shares_A / jnp.sum(shares_A))[:, None, None]
    return jnp.broadcast_to(shares_A11, label_logp_ABC.shape)


def _all_there(values: list[jax.Array | None], noun: str) -> list[jax.Array]:
  """The values; refuses teachers whose records, such as dumps of served teachers, hold none."""
  found = [value for value in values if value is not None]
  if len(found) < len(values):
    raise InputError(
      f"a mixture of these teachers needs {noun}, which the records of one of them do not hold; "
      "choose another `by`, or record with the teacher here"
    )
  return found
