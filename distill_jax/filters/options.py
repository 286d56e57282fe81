"""Config section `filter`: the samples to filter, and the order of the filters."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class FilterOptions:
  """The samples that the command `filter` reads, and the order in which it applies `filters`."""

  samples: str = ""
  """Samples: a .jsonl file, a folder of them, or a workdir of `generate`; a path or URL. The lines
  of a prompt must be together, and in one file. "": the workdir."""
  order: tuple[str, ...] = ()
  """Names of all entries of `filters`, in the order in which they are applied. `near_duplicates`,
  which compares all samples, is last. (): allowed if there is only one."""
  on_bad: str = "stop"
  """Action at a sample that cannot be judged, e.g. without an answer key: "stop" (raise an error)
  or "skip" (reject and count it)."""
  workers: int = 0
  """Number of processes. 0: one per core. The result does not depend on it."""
  slice: str = ""
  """Share of the segments to filter in this call, e.g. "3/16" for those whose number modulo 16 is
  3, so that several machines can work in one workdir. "": all that are missing, and the summary."""
