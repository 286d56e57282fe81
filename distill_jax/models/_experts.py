"""Mixtures of experts: the parameters, and the softmax router."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.errors import bad_value
from distill_jax.models._declare import Declare
from distill_jax.nn import layers, sharding


class Experts(nnx.Module):
  """A router's weights and E gated feed-forwards."""

  def __init__(self, declare: Declare, D: int, E: int, F: int):
    """Declares the parameters.

    Args:
      declare: declares parameters of the layer.
      D: the model width.
      E: the number of experts.
      F: the width of one expert.
    """
    up, down = f"experts:{E} embed:{D} expert_mlp:{F}", f"experts:{E} expert_mlp:{F} embed:{D}"
    at = "mlp.experts.{experts}."
    self.router = declare.linear("mlp.gate", f"embed:{D} routes:{E}", "routes")
    self.gate = declare.linear(f"{at}gate_proj", up, "expert_mlp")
    self.up = declare.linear(f"{at}up_proj", up, "expert_mlp")
    self.down = declare.linear(f"{at}down_proj", down, "embed")

  def logits(self, x_BTD: jax.Array) -> jax.Array:
    """Returns the router's logits, float32 [B, T, E]."""
    return jnp.einsum("BTD,DE->BTE", x_BTD, self.router[...], preferred_element_type=jnp.float32)

  def __call__(
    self, x_BTD: jax.Array, ids_BTK: jax.Array, weight_BTK: jax.Array, rules: sharding.Rules
  ) -> jax.Array:
    """Computes the weighted sum of each position's K experts; see layers.experts."""
    return layers.experts(
      x_BTD, ids_BTK, weight_BTK, self.gate[...], self.up[...], self.down[...], rules
    )


def check_top_k(chosen: int, experts: int) -> None:
  """Checks the number of experts per token.

  Raises:
    InputError: it is larger than the number of experts.
  """
  if chosen > experts:
    expected = f"at most {experts}, the number of experts"
    raise bad_value("num_experts_per_tok", chosen, expected, "Correct the model's config")


def softmax_top_k(logits_BTE: jax.Array, k: int, normalise: bool) -> tuple[jax.Array, jax.Array]:
  """Returns (ids, weights) [B, T, K] of the k most probable experts.

  Args:
    logits_BTE: the router's logits.
    k: the number of experts per position.
    normalise: whether the weights are divided by their sum.
  """
  weight_BTK, ids_BTK = jax.lax.top_k(jax.nn.softmax(logits_BTE), k)
  if normalise:
    weight_BTK /= weight_BTK.sum(-1, keepdims=True)
  return ids_BTK, weight_BTK
