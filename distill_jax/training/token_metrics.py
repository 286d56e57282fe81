"""What is measured of every token in training, beside the losses: the same online and offline."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from distill_jax.losses import supports
from distill_jax.losses.divergences import forward_kl
from distill_jax.losses.kd import sampled_forward_kl
from distill_jax.nn import fused_head
from distill_jax.types import Batch, Mean, Recorded, Targets


def means(
  logits_BCV: jax.Array, piece: Batch, recorded: Recorded, parts: tuple[tuple[str, int], ...] = ()
) -> dict[str, Mean]:
  """Means over a chunk's labels, in nats.

  Args:
    parts: of several tasks, each one's name and its first row of the head.

  Returns:
    ce, entropy: of the student. And by teacher, as far as its targets tell: kl (at T=1, or
    at the recorded temperature under the name kl_at_T), teacher_ce, teacher_entropy,
    agreement (both have the same top token). By task: ce, and accuracy.
  """
  lse_BC = fused_head.log_sum_exp(logits_BCV)[..., 0]
  label_BC = jnp.take_along_axis(logits_BCV, piece.labels_BT[..., None], -1)[..., 0]
  token_loss = {"ce": lse_BC - label_BC, "entropy": lse_BC - _mean_logit(logits_BCV, lse_BC)}
  out = {name: Mean.of(x_BC, piece.mask_for_label_losses()) for name, x_BC in token_loss.items()}
  for name, first in parts:
    assert piece.class_range_BT2 is not None
    mask = piece.mask_for_label_losses() & (piece.class_range_BT2[..., 0] == first)
    right = label_BC >= jnp.max(logits_BCV, -1)
    out |= {f"ce/{name}": Mean.of(token_loss["ce"], mask), f"accuracy/{name}": Mean.of(right, mask)}
  for name, t in piece.targets.items():
    online = t.hidden_BTD is not None
    said = _online(t, logits_BCV, piece) if online else _offline(t, logits_BCV, recorded)
    kl = _kl(t, logits_BCV, recorded)
    if kl is not None:
      T = 1.0 if online else recorded.temperature
      said[f"kl/{name}" if T == 1 else f"kl_at_{T:g}/{name}"] = kl
    # Text among sampled records has no entries: of it the teacher has said nothing.
    mask = piece.mask_for_teacher_losses()
    mask = mask if t.weight_BTK is None else mask & jnp.any(t.weight_BTK > 0, -1)
    out |= {k if "/" in k else f"{k}/{name}": Mean.of(x, mask) for k, x in said.items()}
  return out


def _online(t: Targets, logits_BCV: jax.Array, piece: Batch) -> dict[str, jax.Array]:
  logp_BCV, _ = supports.dense(t, logits_BCV, 1.0)
  lse_BC = fused_head.log_sum_exp(logp_BCV)[..., 0]  # 0 up to rounding
  label_BC = jnp.take_along_axis(logp_BCV, piece.labels_BT[..., None], -1)[..., 0]
  return {
    "teacher_ce": lse_BC - label_BC,
    "teacher_entropy": lse_BC - _mean_logit(logp_BCV, lse_BC),
    "agreement": jnp.any(_is_top(logp_BCV) & _is_top(logits_BCV), -1),
  }


def _offline(t: Targets, logits_BCV: jax.Array, recorded: Recorded) -> dict[str, jax.Array]:
  said = {}
  if t.label_logp_BT is not None and recorded.temperature == 1:
    said["teacher_ce"] = -t.label_logp_BT
  if t.entropy_BT is not None and recorded.temperature == 1:
    said["teacher_entropy"] = t.entropy_BT
  if t.argmax_BT is not None:
    # Not argmax, which is ten times slower on a CPU than a maximum.
    at_top_BC = jnp.take_along_axis(logits_BCV, t.argmax_BT[..., None], -1)[..., 0]
    said["agreement"] = at_top_BC >= jnp.max(logits_BCV, -1)
  return said


def _kl(t: Targets, logits_BCV: jax.Array, recorded: Recorded) -> jax.Array | None:
  """KL(p || q) at T=1 where the targets allow, else at the recorded temperature."""
  T = recorded.temperature
  if t.hidden_BTD is not None:
    return supports.divergence(forward_kl, t, logits_BCV, 1.0)
  if t.weight_BTK is not None:
    return sampled_forward_kl(t, logits_BCV, T) if t.entropy_BT is not None else None
  if t.logp_BTK is not None and T == 1:
    return supports.divergence(forward_kl, t, logits_BCV, 1.0, recorded.missing_mass)
  return None


def _is_top(logits_BCV: jax.Array) -> jax.Array:
  return logits_BCV == jnp.max(logits_BCV, -1, keepdims=True)


def _mean_logit(logits_BCV: jax.Array, lse_BC: jax.Array) -> jax.Array:
  """sum_i q_i z_i, with rows of -inf left out."""
  q_BCV = jnp.exp(logits_BCV - lse_BC[..., None])
  return jnp.sum(jnp.where(q_BCV > 0, q_BCV * logits_BCV, 0), -1)
