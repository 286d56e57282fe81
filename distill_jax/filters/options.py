"""Config section `filter`: the samples to filter, and the order of the filters."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class FilterOptions:
  """The samples that the command `filter` reads, and the order in which it applies `filters`."""

  samples: str = ""
  """File of samples written by `generate`, or the folder that contains it. "": the workdir."""
  order: tuple[str, ...] = ()
  """Names of all entries of `filters`, in the order in which they are applied. (): allowed if
  there is only one."""
  on_bad: str = "stop"
  """Action at a sample that cannot be judged, e.g. without an answer key: "stop" (raise an error)
  or "skip" (reject and count it)."""
