"""Lower bounds on the time of a step, from the published peaks of a chip."""

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
  """Lower bounds on the seconds per step, one for each resource."""

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
  """Returns the bounds on the time of a step.

  Args:
    chip: the kind of chip.
    chips: number of chips.
    devices: number of devices.
    flops: operations over all devices by purpose, including recomputed ones.
    hbm_bytes: bytes that one device reads and writes.
    sent: bytes that one device sends, by kind of collective.
  """
  share = devices / chips  # the devices of a chip share its bandwidth
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
    config: the config of the run.
    verb: "train" or "record".
    hardware: the slices.
    mesh: the device mesh.
    step_flops: see flops.step_flops.
    moved: bytes of the arguments and outputs of one device.
    sent: bytes that one device sends, by kind of collective.
  """
  chip, chips = hardware.chip, hardware.num_chips
  hbm_bytes = _hbm_bytes(config, verb, moved, mesh)
  limit = bound(chip, chips, mesh.size, step_flops, hbm_bytes, sent)
  rows = config.records.batch_size if verb == "record" else config.train.batch_size
  rate = rows * config.data.seq_len / limit.seconds
  total = estimate.total_tokens(config, verb) * (1 + (estimate.evaluation_share(config, verb) or 0))
  return {
    "bounds": vars(limit),
    "bound_by": limit.by,
    "step_seconds_bound": limit.seconds,
    "mfu_bound": flops.model_flops(step_flops) / (limit.seconds * chips * chip.flops),
    "tokens_per_second_bound": rate,
    "chip_hours": total / rate * chips / 3600 if total else None,
  }


def _hbm_bytes(config: Config, verb: str, moved: int, mesh: jax.sharding.Mesh) -> float:
  """Returns the minimum of bytes that a device reads and writes in a step.

  These are the arguments, the outputs, and the gathered weights, which are written once and read
  once in each pass over the layers.
  """
  spec = config.teacher if verb == "record" else config.student
  numbers = params.count(loading.open_source(spec).abstract) / mesh.shape["tensor"]
  passes = {"record": 1, "train": 2 + (spec.remat == "full")}[verb]
  return moved + 2.0 * passes * numbers * jnp.dtype(spec.dtype).itemsize
