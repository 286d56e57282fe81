"""The TPU chips that preflight knows: published peaks, memory, and the slices one can rent."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from distill_jax.errors import InputError

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip, a device or (v4 without its megacore, tpu7x) two.

  Peaks are those of Google Cloud's documentation, docs.cloud.google.com/tpu/docs/NAME, read in
  November 2026. It gives the interconnects' bandwidth in both directions together, or (v4) as
  the bits of one; here it is what a chip can send in a second, half of the former. `hbm` is
  what libtpu 0.0.42.1 lets a program have of a device, as it says itself when that is too
  little ("exceeds available HBM (95.74G)").

  Attributes:
    name: as in a topology's name.
    flops: bfloat16 operations a second.
    hbm: bytes of memory a device.
    hbm_bandwidth: bytes a second.
    ici, dcn: bytes a second that a chip sends, within its slice and to other slices.
    grids: slices as the documentation lists them, from small to large.
  """

  name: str
  flops: float
  hbm: int
  hbm_bandwidth: float
  ici: float
  dcn: float
  grids: tuple[str, ...]

  @property
  def memory(self) -> int:
    """Bytes of all devices of a chip."""
    return self.hbm * (2 if self.name in ("v4", "tpu7x") else 1)

  @property
  def topologies(self) -> tuple[str, ...]:
    return tuple(f"{self.name}:{grid}" for grid in self.grids)


_TORUS_2D = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_TORUS_3D = (
  "2x2x1",
  "2x2x2",
  "2x2x4",
  "2x4x4",
  "4x4x4",
  "4x4x8",
  "4x8x8",
  "8x8x8",
  "8x8x16",
  "8x16x16",
  "16x16x16",
)

CHIPS = {
  chip.name: chip
  for chip in (
    Chip("v4", 275e12, int(15.25 * GiB), 1.2e12, 300e9, 6.25e9, _TORUS_3D),
    Chip("v5e", 197e12, int(15.75 * GiB), 0.819e12, 200e9, 3.125e9, _TORUS_2D),
    Chip("v5p", 459e12, int(95.74 * GiB), 2.765e12, 600e9, 6.25e9, (*_TORUS_3D, "16x16x24")),
    Chip("v6e", 918e12, int(31.25 * GiB), 1.638e12, 400e9, 12.5e9, _TORUS_2D),
    Chip("tpu7x", 2307e12, int(94.75 * GiB), 7.38e12, 600e9, 12.5e9, _TORUS_3D),
  )
}


class Slice(NamedTuple):
  """A listed slice: which chip, and how many of them."""

  chip: Chip
  chips: int


def parse(topology: str) -> Slice:
  """Returns the slice with a name such as v5p:4x4x4.

  Raises:
    InputError: the chip is unknown, or it has no such slice.
  """
  name, _, grid = topology.partition(":")
  if name not in CHIPS:
    raise InputError(
      f"--topology is {topology!r}, and {name!r} is no chip that preflight knows; they are "
      f"{', '.join(CHIPS)}, as in --topology=v5p:4x4x4"
    )
  if grid not in CHIPS[name].grids:
    raise InputError(
      f"--topology is {topology!r}, which is not listed; {name} has {', '.join(CHIPS[name].grids)}"
    )
  return Slice(CHIPS[name], math.prod(map(int, grid.split("x"))))
