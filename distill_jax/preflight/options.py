"""What `preflight` compiles for."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PreflightOptions:
  """What `preflight` compiles for: the flags --topology, --num_slices and --verb."""

  topology: str = ""  # a listed TPU topology, such as v5p:4x4x4
  num_slices: int = 1
  verb: str = "train"  # train | record
