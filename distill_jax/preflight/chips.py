"""The TPU chips that preflight supports: their published peaks, memory and available slices."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from distill_jax.errors import bad_value

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU chip. It has one device, or two (v4 without megacore, and tpu7x).

  The peaks are from Google Cloud's documentation (docs.cloud.google.com/tpu/docs/NAME, November
  2026). The documentation gives the bandwidth of interconnects for both directions together or,
  for v4, in bits for one direction. Here it is the number of bytes that a chip can send per second.
  `hbm` is the memory that libtpu 0.0.42.1 makes available to a program, from its error message
  ("exceeds available HBM (95.74G)").

  Attributes:
    name: the name in a topology, e.g. "v5p".
    flops: bfloat16 operations per second.
    hbm: bytes of memory per device.
    hbm_bandwidth: bytes per second.
    ici: bytes per second that a chip sends within its slice.
    dcn: bytes per second that a chip sends to other slices.
    grids: the slices listed in the documentation, from small to large.
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
    """Bytes of memory of a chip, over all its devices."""
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
  """A listed slice: the chip, and the number of chips."""

  chip: Chip
  chips: int


def parse(topology: str) -> Slice:
  """Returns the slice with a name such as v5p:4x4x4.

  Raises:
    InputError: The chip is unknown, or it does not have this slice.
  """
  name, _, grid = topology.partition(":")
  if name not in CHIPS:
    expected = f"CHIP:SHAPE with one of the chips {', '.join(CHIPS)}"
    raise bad_value("--topology", topology, expected, "Name a slice, e.g. --topology=v5p:4x4x4")
  if grid not in CHIPS[name].grids:
    expected = f"{name} with one of the shapes {', '.join(CHIPS[name].grids)}"
    raise bad_value("--topology", topology, expected, "Choose one of them")
  return Slice(CHIPS[name], math.prod(map(int, grid.split("x"))))
