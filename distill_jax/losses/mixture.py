"""Soft labels of several teachers: at each token, more of the one that knows better."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from distill_jax.errors import InputError
from distill_jax.losses import kd, supports
from distill_jax.nn import fused_head
from distill_jax.schedules import Schedule, constant
from distill_jax.types import Batch, Targets

BY = ("shares", "label", "entropy")


@dataclasses.dataclass(frozen=True)
class Loss:
  """(1 - t) sum_a s_a T^2 D(p_a, q) - t log q(label), in nats: a and t of each token.

  Attributes:
    weight, temperature, divergence, parameters, missing_mass: as in kd.py.
    teachers: their names, two or more; with one, only label_trust makes this other than kd.
    by: what a teacher's share s_a follows: "shares", fixed ones; "label", s_a proportional to
      p_a(label)^sharpness, so that it falls where a teacher is wrong; "entropy", to
      exp(-sharpness H(p_a)), the surest has most.
    shares: for "shares"; (): equal ones.
    label_trust: t = label_trust (1 - sum_a s_a p_a(label)): the hard label takes over as far as
      the teachers deny it. 0: never.
  """

  weight: Schedule = constant(1.0)
  temperature: Schedule = constant(1.0)
  teachers: tuple[str, ...] = ("teacher",)
  by: str = "shares"
  shares: tuple[float, ...] = ()
  sharpness: float = 1.0
  label_trust: float = 0.0
  divergence: str = "forward_kl"
  parameters: tuple[float, ...] = ()
  missing_mass: str = "tail_bucket"

  def __post_init__(self):
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

  def _kd(self, teacher: str) -> kd.Loss:
    fields = {
      f.name: getattr(self, f.name) for f in dataclasses.fields(kd.Loss) if f.name != "teacher"
    }
    return kd.Loss(teacher=teacher, **fields)

  def token_loss(self, logits_BCV: jax.Array, batch: Batch, step: jax.Array) -> jax.Array:
    said = [batch.targets[name] for name in self.teachers]
    label_logp_ABC = jnp.stack([label_logp(t, logits_BCV, batch.labels_BT) for t in said])
    share_ABC = self._shares(said, logits_BCV, label_logp_ABC)
    loss_ABC = jnp.stack([self._kd(n).token_loss(logits_BCV, batch, step) for n in self.teachers])
    loss_BC = jnp.sum(share_ABC * loss_ABC, 0)
    if not self.label_trust:
      return loss_BC
    trust_BC = self.label_trust * (1 - jnp.sum(share_ABC * jnp.exp(label_logp_ABC), 0))
    hard_BC = -fused_head.logp_at(logits_BCV, batch.labels_BT[..., None])[..., 0]
    return (1 - trust_BC) * loss_BC + trust_BC * hard_BC

  def _shares(self, said: list[Targets], logits_BCV, label_logp_ABC: jax.Array) -> jax.Array:
    """[A, B, C], 1 in all at each token; no gradient passes through them."""
    if self.by == "label":
      return jax.nn.softmax(self.sharpness * label_logp_ABC, 0)
    if self.by == "entropy":
      return jax.nn.softmax(-self.sharpness * jnp.stack([entropy(t, logits_BCV) for t in said]), 0)
    shares_A = jnp.asarray(self.shares or (1.0,) * len(said), jnp.float32)
    shares_A11 = (shares_A / jnp.sum(shares_A))[:, None, None]
    return jnp.broadcast_to(shares_A11, label_logp_ABC.shape)


def label_logp(targets: Targets, logits_BCV: jax.Array, labels_BC: jax.Array) -> jax.Array:
  """log p(label) [B, C] at the recorded temperature; of an online teacher at T=1."""
  if targets.label_logp_BT is not None:
    return targets.label_logp_BT
  logp_BCV, _ = supports.dense(targets, jax.lax.stop_gradient(logits_BCV), 1.0)
  return jnp.take_along_axis(logp_BCV, labels_BC[..., None], -1)[..., 0]


def entropy(targets: Targets, logits_BCV: jax.Array) -> jax.Array:
  """H(p) [B, C] in nats, at the recorded temperature; of an online teacher at T=1."""
  if targets.entropy_BT is not None:
    return targets.entropy_BT
  if targets.hidden_BTD is None:
    raise InputError(
      "a mixture by entropy is over records that hold none, as dumps of served teachers do not; "
      "take by='label', or record with the teacher here"
    )
  logp_BCV, _ = supports.dense(targets, jax.lax.stop_gradient(logits_BCV), 1.0)
  return -jnp.sum(jnp.where(logp_BCV > -jnp.inf, jnp.exp(logp_BCV) * logp_BCV, 0.0), -1)
