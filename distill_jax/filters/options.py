"""What `filter` reads."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class FilterOptions:
  """What `filter` reads, and the order of `filters`."""

  samples: str = ""  # what `generate` wrote, or the folder it is in; "": the workdir
  order: tuple[str, ...] = ()  # names in `filters`, all of them; (): there is only one
  on_bad: str = "stop"  # stop | skip, what is to happen where a sample cannot be judged
