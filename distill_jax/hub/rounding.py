"""Weights on the grid on which they were trained, some whole rows at a time, on the host's CPU."""

from __future__ import annotations

import jax
import numpy as np

from distill_jax.errors import InputError
from distill_jax.hub.tensors import Encoded, Tensor, check_overflow
from distill_jax.nn import grids
from distill_jax.nn.quantise import QuantiseOptions, is_quantised
from distill_jax.runtime.distributed import host_device

_on_grid = jax.jit(grids.on_grid, static_argnums=(1, 2))


def on_grid(name: str, rows: np.ndarray, spec: QuantiseOptions) -> np.ndarray:
  """Returns rows on the grid, in float32.

  Args:
    name: the name of the tensor, for errors.
    rows: the rows [..., inputs] in float32, in the layout of a checkpoint.
    spec: the grid.

  Raises:
    InputError: a number is not finite, or too large for its scale.
  """
  with jax.default_device(host_device()):
    rounded = np.asarray(_on_grid(rows, spec.grid, spec.group))
  if not np.isfinite(rounded).all():
    raise not_finite(name, rows, spec)
  return rounded


def not_finite(name: str, rows: np.ndarray, spec: QuantiseOptions) -> InputError:
  """Returns the error for rows that are not finite numbers on a grid."""
  return InputError(
    f"{name} contains {np.abs(rows).max():.3g}, which cannot be rounded to {spec.grid}. Export an "
    "earlier checkpoint with export.step."
  )


def trained_tensor(tensor: Tensor, spec: QuantiseOptions) -> Tensor | Encoded:
  """Returns a tensor of the file with the numbers that were used in training.

  Args:
    tensor: the tensor of the model.
    spec: the grid on which linear weights were trained, if any.
  """
  if not spec.grid or not is_quantised(tensor.param):
    return tensor

  def rounded(rows: np.ndarray) -> np.ndarray:
    x = on_grid(tensor.name, rows, spec)
    with np.errstate(over="ignore"):  # checked next
      stored = x.astype(tensor.dtype)
    check_overflow(tensor.name, x, stored)
    return stored

  return Encoded(tensor.name, tensor, rounded, tensor.shape, tensor.dtype)
