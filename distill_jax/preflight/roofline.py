"""Lower bounds on the seconds of a step, from a chip's published peaks: bounds, not forecasts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from distill_jax.config import Config
from distill_jax.models import loading
from distill_jax.nn import params
from distill_jax.preflight import collectives, estimate, flops
from distill_jax.preflight.chips import Chip
from distill_jax.preflight.topology import Hardware
from distill_jax.types import JsonObject

SPEED_KEYS = (
  "bounds",
  "bound_by",
  "step_seconds_bound",
  "mfu_bound",
  "tokens_per_second_bound",
  "chip_hours",
)


@dataclasses.dataclass(frozen=True)
class Bound:
  """The fewest seconds that a step can take, by what would have to be saturated."""

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
  """Returns the roofline of a step.

  Args:
    flops: over all devices, by purpose, with what is recomputed.
    hbm_bytes: read and written by one device.
    sent: bytes that one device sends, by kind of collective.
  """
  share = devices / chips  # devices of a chip share what it has
  dcn = sum(n for kind, n in sent.items() if kind.startswith(collectives.DCN))
  return Bound(
    compute=sum(flops.values()) / (chips * chip.flops),
    hbm=hbm_bytes * share / chip.hbm_bandwidth,
    ici=(sum(sent.values()) - dcn) * share / chip.ici,
    dcn=dcn * share / chip.dcn,
  )


def speed(
  config: Config,
  verb: str,
  hardware: Hardware,
  mesh: jax.sharding.Mesh,
  step_flops: dict[str, float],
  moved: int,
  sent: dict[str, int],
) -> JsonObject:
  """Returns the bounds that preflight reports, by SPEED_KEYS.

  Args:
    step_flops: see flops.step_flops.
    moved: bytes of a device's arguments and outputs.
    sent: bytes that one device sends, by kind of collective.
  """
  chip, chips = hardware.chip, hardware.num_chips
  hbm_bytes = _hbm_bytes(config, verb, moved, mesh)
  limit = bound(chip, chips, mesh.size, step_flops, hbm_bytes, sent)
  rows = config.records.batch_size if verb == "record" else config.train.batch_size
  rate = rows * config.data.seq_len / limit.seconds
  total = estimate.total_tokens(config, verb)
  return {
    "bounds": vars(limit),
    "bound_by": limit.by,
    "step_seconds_bound": limit.seconds,
    "mfu_bound": flops.model_flops(step_flops) / (limit.seconds * chips * chip.flops),
    "tokens_per_second_bound": rate,
    "chip_hours": total / rate * chips / 3600 if total else None,
  }


def _hbm_bytes(config: Config, verb: str, moved: int, mesh: jax.sharding.Mesh) -> float:
  """The least that a device reads and writes: arguments, outputs, and gathered weights.

  Gathered weights are written once and read once in each pass over the layers.
  """
  spec = config.teacher if verb == "record" else config.student
  numbers = params.count(loading.open_source(spec).abstract) / mesh.shape["tensor"]
  passes = {"record": 1, "train": 2 + (spec.remat == "full")}[verb]
  return moved + 2.0 * passes * numbers * jnp.dtype(spec.dtype).itemsize
