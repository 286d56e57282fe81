"""Rotary frequencies, and their scalings for texts longer than those in training.

Each scaling is a frozen dataclass with the fields of `rope_parameters` in config.json
(`rope_scaling` before transformers 5). The field `rope_type` selects it.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from distill_jax.errors import InputError, bad_value
from distill_jax.models._family import check_numbers
from distill_jax.types import JsonObject

OTHER_KEYS = {"rope_type", "type", "rope_theta"}  # keys that are not fields of a scaling


@dataclasses.dataclass(frozen=True)
class Linear:
  """Linear scaling: all frequencies are divided by `factor` (arXiv:2306.15595)."""

  factor: float

  def __post_init__(self):
    check_numbers(self)

  def slow(self, freq: np.ndarray, theta: float) -> np.ndarray:
    return freq / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3:
  """Llama 3.1's scaling: low frequencies are divided by `factor` (arXiv:2407.21783)."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int

  def __post_init__(self):
    check_numbers(self)
    if self.low_freq_factor >= self.high_freq_factor:
      expected = f"a number below high_freq_factor, {self.high_freq_factor}"
      action = "Correct the rope scaling in the model's config"
      raise bad_value("low_freq_factor", self.low_freq_factor, expected, action)

  def slow(self, freq: np.ndarray, theta: float) -> np.ndarray:
    # Wavelengths above original/low are scaled, below original/high kept, and mixed in between.
    turns = self.original_max_position_embeddings * freq / (2 * math.pi)
    keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
    return _mix(freq, self.factor, keep)


@dataclasses.dataclass(frozen=True)
class Yarn:
  """YaRN (arXiv:2309.00071): low frequencies are scaled, and attention scores are enlarged.

  `mscale` and `mscale_all_dim` are from DeepSeek. The first enlarges cosines and sines. The second
  cancels this, and enlarges the scores of the whole head instead (`attention_scale`).
  """

  factor: float
  original_max_position_embeddings: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float | None = None
  mscale_all_dim: float | None = None
  attention_factor: float | None = None
  truncate: bool = True

  def __post_init__(self):
    check_numbers(self)
    if self.beta_slow >= self.beta_fast:
      action = "Correct the rope scaling in the model's config"
      raise bad_value("beta_slow", self.beta_slow, f"below beta_fast, {self.beta_fast}", action)

  def slow(self, freq: np.ndarray, theta: float) -> np.ndarray:
    n = len(freq)
    low, high = (self._pair_turning(beta, n, theta) for beta in (self.beta_fast, self.beta_slow))
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * n - 1)
    ramp = (np.arange(n) - low) / (high - low if high != low else 0.001)
    return _mix(freq, self.factor, 1 - ramp)

  def _pair_turning(self, beta: float, n: int, theta: float) -> float:
    """Returns the index among n frequencies with `beta` turns over the original length."""
    positions = self.original_max_position_embeddings
    return n * math.log(positions / (beta * 2 * math.pi)) / math.log(theta)

  def sharpness(self, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(self.factor) + 1 if self.factor > 1 else 1.0

  @property
  def amplitude(self) -> float:
    """The factor of cosines and sines."""
    if self.attention_factor is not None:
      return self.attention_factor
    if self.mscale is not None and self.mscale_all_dim is not None:
      return self.sharpness(self.mscale) / self.sharpness(self.mscale_all_dim)
    return self.sharpness()


Scaling = Linear | Llama3 | Yarn
KINDS: dict[str, type] = {"linear": Linear, "llama3": Llama3, "yarn": Yarn}


def _mix(freq: np.ndarray, factor: float, keep: np.ndarray) -> np.ndarray:
  keep = np.clip(keep, 0, 1)
  return keep * freq + (1 - keep) * freq / factor


def frequencies(theta: float, width: int, scaling: Scaling | None) -> np.ndarray:
  """Returns the rotary frequencies for heads of a width, float32 [width / 2] (arXiv:2104.09864)."""
  freq = theta ** -(np.arange(0, width, 2) / width)
  return (scaling.slow(freq, theta) if scaling else freq).astype(np.float32)


def amplitude(scaling: Scaling | None) -> float:
  """Returns the factor of cosines and sines."""
  return scaling.amplitude if isinstance(scaling, Yarn) else 1.0


def read(rope: JsonObject, max_positions: int) -> Scaling | None:
  """Returns the scaling for `rope_parameters` in config.json; None for no scaling.

  Args:
    rope: `rope_parameters`, or `rope_scaling` before transformers 5.
    max_positions: `max_position_embeddings`, the default of `original_max_position_embeddings`.

  Raises:
    InputError: the rope type or one of its keys is not supported.
  """
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind != "default" and kind not in KINDS:
    expected = f"one of default, {', '.join(KINDS)}"
    raise bad_value("rope_type in config.json", kind, expected, "Use another model")
  fields = dataclasses.fields(KINDS[kind]) if kind != "default" else ()
  known = OTHER_KEYS | {f.name for f in fields}
  if unknown := sorted(k for k, v in rope.items() if k not in known and v is not None):
    raise InputError(
      f"The rope parameters in config.json have the key {unknown[0]!r}, which rope type {kind!r} "
      "does not support. Use another model."
    )
  if kind == "default":
    return None
  given = {k: v for k, v in rope.items() if k not in OTHER_KEYS and v is not None}
  required = (f.name for f in fields if f.default is dataclasses.MISSING)
  values = {"original_max_position_embeddings": max_positions} | given
  return KINDS[kind](**{name: values[name] for name in required} | given)


def write(scaling: Scaling | None) -> JsonObject:
  """Returns `rope_parameters` for config.json without rope_theta: the inverse of `read`."""
  kind = next((k for k, t in KINDS.items() if isinstance(scaling, t)), "default")
  given = dataclasses.asdict(scaling) if scaling else {}
  return {"rope_type": kind, **{k: v for k, v in given.items() if v is not None}}
