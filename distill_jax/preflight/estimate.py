"""From a compiled step to seconds, utilisation and chip-hours: bounds, not forecasts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from distill_jax.config import Config
from distill_jax.models import loading
from distill_jax.nn import params, sharding
from distill_jax.preflight import collectives, programs
from distill_jax.preflight.chips import Chip
from distill_jax.records.store import Manifest
from distill_jax.training import loop


@dataclasses.dataclass(frozen=True)
class Bound:
  """The least seconds that a step can take, by what would have to be saturated."""

  compute: float
  hbm: float
  ici: float
  dcn: float

  @property
  def seconds(self) -> float:
    return max(vars(self).values())

  @property
  def by(self) -> str:
    return max(vars(self), key=lambda name: vars(self)[name])


def bound(
  chip: Chip,
  chips: int,
  devices: int,
  flops: dict[str, float],
  hbm_bytes: float,
  sent: dict[str, int],
) -> Bound:
  """The roofline.

  Args:
    flops: over all devices, what is recomputed among them.
    hbm_bytes, sent: of one device.
  """
  share = devices / chips  # devices of a chip share what it has
  slow = sum(n for kind, n in sent.items() if kind.startswith(collectives.DCN))
  return Bound(
    compute=sum(flops.values()) / (chips * chip.flops),
    hbm=hbm_bytes * share / chip.hbm_bandwidth,
    ici=(sum(sent.values()) - slow) * share / chip.ici,
    dcn=slow * share / chip.dcn,
  )


def hbm_bytes(config: Config, verb: str, moved: int, mesh: Any) -> float:
  """The least that a device reads and writes: what it is given and gives back, and weights.

  Args:
    moved: bytes of arguments and outputs. Gathered weights are written once and read once in
      each pass over the layers.
  """
  spec = config.teacher if verb == "record" else config.student
  numbers = params.count(loading.abstract(spec)) / mesh.shape["tensor"]
  passes = {"record": 1, "train": 2 + (spec.remat == "full")}[verb]
  return moved + 2.0 * passes * numbers * jnp.dtype(spec.dtype).itemsize


# Entries of systematic sampling at 1.6 nats, seen on SmolLM2-135M (design.md, section 3).
_ENTRIES = {32: 8.6, 63: 12.7, 255: 29.3}


def record_bytes(about: Manifest) -> float:
  """Bytes a token of a store, before it is made.

  Measured (records/entries.py): an id takes about 3 bits less than the vocabulary's width,
  a count about 2, a log-probability 16; entropy and label 4 bytes together, the token its
  own width. Entries depend on the teacher's entropy; 1.6 nats is taken.
  """
  width = math.ceil(math.log2(about.vocab_size))
  if about.kind == "text":
    return width / 8
  if about.kind == "topk":
    entries, bits = float(about.n), width - 3 + 16
  else:
    points = np.log(list(_ENTRIES)), np.log(list(_ENTRIES.values()))
    slope = np.diff(points[1])[-1] / np.diff(points[0])[-1]
    beyond = max(0.0, math.log(about.n / max(_ENTRIES))) * slope
    entries = min(about.n, math.exp(np.interp(math.log(about.n), *points) + beyond))
    bits = width - 3 + 2 + 16 * about.logp
  taps = len(about.taps.layers) * (about.taps.width + 4) if about.taps else 0
  return (width + entries * bits) / 8 + 2 + 2 * about.entropy + taps


def tokens(config: Config, verb: str) -> int:
  """Of the whole run; 0 where the config does not say how long its corpus is."""
  if verb == "record":
    return config.data.sequences * config.data.seq_len
  return config.train.steps * config.train.batch_size * config.data.seq_len


def arguments(config: Config, verb: str, mesh: Any) -> int:
  """Bytes a device of parameters, optimiser and teacher on a mesh, without a compile."""
  size = lambda spec: _placed(loading.abstract(spec), spec, mesh)
  if verb == "record":
    return size(config.teacher)
  teacher = sum(size(spec) for spec in loop.online(config).values())
  trained = _placed(loading.abstract_trainable(config.student), config.student, mesh)
  width = jnp.dtype(config.student.param_dtype).itemsize
  base = size(config.student) if config.student.lora.rank else 0
  moments = trained * (4 + width) / width  # the first in float32, the second as the weights
  return round(teacher + base + trained + moments)


def _placed(tree: Any, spec: Any, mesh: Any) -> int:
  where = sharding.shardings(tree, mesh, loading.compute_config(spec).rules)
  return programs.bytes_of(loading.place(tree, where))
