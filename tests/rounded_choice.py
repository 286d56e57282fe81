"""The loss of a model whose tensors are rounded to chosen widths."""

from distill_jax.deployment import rounding
from distill_jax.deployment.rounding import Width


def measured(model, calibrated, tensors, choice):
  """Returns (the model as it was, the KL with the tensors of `choice` at these widths)."""
  before = {}
  for name, width in choice.items():
    model, before[name] = rounding.round_tensor(model, tensors[name], Width(width))
  kl = calibrated.loss(model).kl
  for name, x in before.items():
    model = rounding.put_back(model, tensors[name], x)
  return model, kl
