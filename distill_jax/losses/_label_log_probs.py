"""The labels' log-probabilities, for losses that need nothing else of teacher and student."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from distill_jax.errors import bad_value
from distill_jax.nn import fused_head
from distill_jax.types import Targets


def check_temperature(temperature: float) -> None:
  """Raises InputError if records do not hold the label's log-probability at temperature 1."""
  if temperature != 1:
    expected = "1, the temperature of the text's probability"
    raise bad_value("records.temperature", temperature, expected, "Record at temperature 1")


def log_probs(
  targets: Targets, logits_BCV: jax.Array, labels_BC: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns (log p, log q) of the labels, float32 [B, C]; the teacher's has no gradient."""
  logp_BC = targets.label_logp(logits_BCV, labels_BC)
  assert logp_BC is not None
  return jax.lax.stop_gradient(logp_BC), fused_head.label_logp(logits_BCV, labels_BC)


def where_present(targets: Targets, loss_BC: jax.Array) -> jax.Array:
  """Returns the loss, 0 at positions that a mixture of stores has no targets for."""
  present_BC = targets.present()
  return loss_BC if present_BC is None else jnp.where(present_BC, loss_BC, 0.0)
