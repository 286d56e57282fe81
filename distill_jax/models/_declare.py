"""How modules declare their parameters: by Hugging Face's names, each with a key of its own."""

from __future__ import annotations

import jax
from flax import nnx

from distill_jax.nn.params import param

MAX_PARAMS = 40  # of one module


class Declare:
  """Declares the parameters of one module, in any order.

  Args:
    key: the module's PRNG key; the nth parameter declared gets the nth of its parts.
    prefix: what Hugging Face's names of the module's tensors begin with.
    rms_init: of the scales of RMS norms: "zeros" where 1 is added to them, else "ones".
  """

  def __init__(self, key: jax.Array, prefix: str, rms_init: str = "ones"):
    self._keys, self._prefix = iter(jax.random.split(key, MAX_PARAMS)), prefix
    self._rms_init = rms_init

  def linear(self, module: str, dims: str, out: str, init: str | float = "fan_in") -> nnx.Param:
    return param(next(self._keys), dims, f"{self._prefix}{module}.weight", out, init=init)

  def bias(self, module: str, width: int, tensor: str = "bias", exact: bool = False) -> nnx.Param:
    """Flat, with the axis that tells the optimizer not to decay it."""
    hf = f"{self._prefix}{module}.{tensor}"
    return param(next(self._keys), f"bias:{width}", hf, init="zeros", exact=exact)

  def rms_norm(self, module: str, width: int) -> nnx.Param:
    """The scale of an RMS norm."""
    hf = f"{self._prefix}{module}.weight"
    return param(next(self._keys), f"norm:{width}", hf, init=self._rms_init)

  def layer_norm(self, module: str, width: int) -> tuple[nnx.Param, nnx.Param]:
    """(scale, bias) of a layer norm."""
    scale = self.scale(f"{module}.weight", width)
    return scale, param(
      next(self._keys), f"norm:{width}", f"{self._prefix}{module}.bias", init="zeros"
    )

  def scale(self, tensor: str, width: int) -> nnx.Param:
    """A factor for each channel, 1 at first."""
    return param(next(self._keys), f"norm:{width}", f"{self._prefix}{tensor}", init="ones")
