"""Declaration of a module's parameters by their Hugging Face names, each with a separate key."""

from __future__ import annotations

import jax
from flax import nnx

from distill_jax.nn.params import param

MAX_PARAMS = 40  # maximum number of parameters of one module


class Declare:
  """Declares the parameters of one module, in any order.

  Args:
    key: the module's PRNG key. It is split; the n-th declared parameter uses the n-th part.
    prefix: the prefix of the Hugging Face names of the module's tensors.
    rms_init: the initial scale of RMS norms: "zeros" if 1 is added to scales, otherwise "ones".
  """

  def __init__(self, key: jax.Array, prefix: str, rms_init: str = "ones"):
    self._keys, self._prefix = iter(jax.random.split(key, MAX_PARAMS)), prefix
    self._rms_init = rms_init

  def linear(self, module: str, dims: str, out: str, init: str | float = "fan_in") -> nnx.Param:
    """Declares the weight of a linear layer; see nn/params.py for the arguments."""
    return param(next(self._keys), dims, f"{self._prefix}{module}.weight", out, init=init)

  def bias(self, module: str, width: int, tensor: str = "bias", exact: bool = False) -> nnx.Param:
    """Declares a flat bias. Its axis "bias" excludes it from weight decay."""
    hf = f"{self._prefix}{module}.{tensor}"
    return param(next(self._keys), f"bias:{width}", hf, init="zeros", exact=exact)

  def rms_norm(self, module: str, width: int) -> nnx.Param:
    """Declares the scale of an RMS norm."""
    hf = f"{self._prefix}{module}.weight"
    return param(next(self._keys), f"norm:{width}", hf, init=self._rms_init)

  def layer_norm(self, module: str, width: int) -> tuple[nnx.Param, nnx.Param]:
    """Declares a layer norm; returns (scale, bias)."""
    scale = self.scale(f"{module}.weight", width)
    return scale, param(
      next(self._keys), f"norm:{width}", f"{self._prefix}{module}.bias", init="zeros"
    )

  def scale(self, tensor: str, width: int) -> nnx.Param:
    """Declares a factor for each channel, initially 1."""
    return param(next(self._keys), f"norm:{width}", f"{self._prefix}{tensor}", init="ones")
