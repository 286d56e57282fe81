"""The devices and the memory of this machine."""

from __future__ import annotations

import dataclasses
import os

import jax


@dataclasses.dataclass(frozen=True)
class Machine:
  """The devices that a run uses.

  Attributes:
    platform: "cpu", "gpu" or "tpu".
    devices: Number of devices, of all processes.
    processes: Number of processes.
    memory: Bytes of memory per device; on a CPU, the share of the machine's memory.
    cores: CPU cores of this machine.
  """

  platform: str
  devices: int
  processes: int
  memory: int
  cores: int

  @property
  def is_cpu(self) -> bool:
    """True on a machine without an accelerator."""
    return self.platform == "cpu"

  def describe(self) -> str:
    """Returns e.g. "1 CPU device with 15.5 GB of memory"."""
    plural = "" if self.devices == 1 else "s"
    each = "" if self.devices == 1 else " each"
    name = f"{self.devices} {self.platform.upper()} device{plural}"
    return f"{name} with {self.memory / 1e9:.1f} GB of memory{each}"


def this_machine() -> Machine:
  """Returns the devices that jax finds."""
  devices, local = jax.devices(), jax.local_devices()
  limit = (local[0].memory_stats() or {}).get("bytes_limit", 0)
  total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return Machine(
    platform=devices[0].platform,
    devices=len(devices),
    processes=jax.process_count(),
    memory=limit or total // len(local),
    cores=len(os.sched_getaffinity(0)),
  )
