"""Mixtures of experts: the parameters, and the choice of experts."""

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


def grouped_top_k(
  score_BTE: jax.Array,
  balance_E: jax.Array,
  k: int,
  groups: int,
  best_groups: int,
  normalise: bool,
) -> tuple[jax.Array, jax.Array]:
  """Returns (ids, weights) [B, T, K] of the k best experts in the best groups.

  The E experts form groups (g) of e experts. A group's score is the sum of its two best experts'
  scores (arXiv:2412.19437, 2.1.2).

  Args:
    score_BTE: sigmoid scores, float32.
    balance_E: the bias added to scores when choosing.
    k: the number of experts per position.
    groups: the number of groups.
    best_groups: the number of groups from which experts are chosen.
    normalise: whether the weights are divided by their sum.
  """
  choice_BTE = score_BTE + balance_E[None, None]
  choice_BTge = choice_BTE.reshape(*choice_BTE.shape[:2], groups, -1)
  group_score_BTg = jax.lax.top_k(choice_BTge, 2)[0].sum(-1)
  _, best_groups_BTK = jax.lax.top_k(group_score_BTg, best_groups)
  chosen_BTg = jax.nn.one_hot(best_groups_BTK, groups, dtype=bool).any(2)
  choice_BTge = jnp.where(chosen_BTg[..., None], choice_BTge, -jnp.inf)
  _, ids_BTK = jax.lax.top_k(choice_BTge.reshape(score_BTE.shape), k)
  weight_BTK = jnp.take_along_axis(score_BTE, ids_BTK, -1)
  if normalise:
    weight_BTK /= weight_BTK.sum(-1, keepdims=True) + 1e-20
  return ids_BTK, weight_BTK
