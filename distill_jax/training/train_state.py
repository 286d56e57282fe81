"""The state of training."""

from __future__ import annotations

import jax
import optax
from flax import struct

from distill_jax.types import PyTree


class TrainState(struct.PyTreeNode):
  """The state that a training step updates."""

  step: jax.Array  # int32
  params: PyTree  # the trained parameters of the student: see models/trainables.py
  adapters: dict[str, PyTree]  # the losses' own parameters, by loss; they are not exported
  opt: optax.OptState
  balance: dict[str, jax.Array] = struct.field(default_factory=dict)  # factors of loss weights
