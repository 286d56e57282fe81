"""Processes of an emulated pod: each has its own limits, its own small disk and its own proxy.

A process gets a mount namespace with a private tmpfs for all its files (as root on Linux; elsewhere
a folder whose size is only measured), a limit of open files and, where the machine has cgroups of
version 1, a limit of memory. While it runs, its open files and its disk are sampled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path

from local_stores import Proxy, Request, Store, free_port

SAMPLE_SECONDS = 0.05
GRACE_SECONDS = 5  # between the death of one process and that of the others
CGROUPS = Path("/sys/fs/cgroup/memory")
START = """
set -e
if [ "$POD_PRIVATE_DISK" = 1 ]; then mount -t tmpfs -o size="$POD_DISK" none "$HOME"; fi
mkdir -p "$TMPDIR"
if [ -n "$POD_CGROUP" ]; then echo $$ > "$POD_CGROUP/tasks"; fi
ulimit -n "$POD_OPEN_FILES"
cd "$HOME"
exec "$@"
"""


@dataclasses.dataclass(frozen=True)
class Limits:
  """The limits of one process.

  Attributes:
    open_files: Maximum number of open files.
    disk_bytes: Size of its disk.
    memory_bytes: Maximum memory, its disk and cached files included.
  """

  open_files: int = 256
  disk_bytes: int = 4 * 2**20
  memory_bytes: int = 2 * 2**30


@dataclasses.dataclass
class Usage:
  """The resources that one process has used.

  Attributes:
    code: Its exit code; negative for a signal.
    output: Its output.
    open_files: Maximum number of open files, as sampled.
    disk_bytes: Maximum use of its disk, as sampled.
    rss_bytes: Peak of its resident memory.
    requests: Its requests to the store.
  """

  code: int = 0
  output: str = ""
  open_files: int = 0
  disk_bytes: int = 0
  rss_bytes: int = 0
  requests: list[Request] = dataclasses.field(default_factory=list)

  def read_bytes(self, part: str) -> int:
    """Returns the bytes read from paths that contain a text."""
    paths = ((urllib.parse.unquote(r.path), r) for r in self.requests if r.method == "GET")
    return sum(request.read_bytes for path, request in paths if part in path)


def run(
  store: Store,
  verb: Sequence[str],
  processes: int,
  devices: int,
  limits: Limits | None = None,
  kill_when: Callable[[], bool] | None = None,
) -> list[Usage]:
  """Runs a command of distill-jax on several processes, and returns the usage of each.

  Args:
    store: The object store, which each process reaches through its own proxy.
    verb: The verb and its flags.
    processes: Number of processes.
    devices: Number of virtual devices of each.
    limits: The limits of each; None for none.
    kill_when: Called regularly; when it returns True, the last process is killed with SIGKILL, and
      a few seconds later the others, as a scheduler does.
  """
  address = f"localhost:{free_port()}"
  with contextlib.ExitStack() as stack:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pod-")))
    hosts = []
    for i in range(processes):
      proxy = stack.enter_context(Proxy(store.port))
      flags = [f"--distributed={address},{processes},{i}"] if processes > 1 else []
      command = [sys.executable, "-m", "distill_jax.cli", *verb, *flags]
      hosts.append(_Host(command, folder / str(i), store, proxy, devices, limits))
    _wait(hosts, kill_when)
    return [host.finished() for host in hosts]


def _wait(hosts: list[_Host], kill_when: Callable[[], bool] | None) -> None:
  """Waits for all processes; a failure of one ends the others."""
  deadline, checked = 0.0, time.monotonic()
  while any(host.running() for host in hosts):
    for host in hosts:
      host.sample()
    if kill_when is not None and time.monotonic() > checked + 0.3:
      checked = time.monotonic()
      if kill_when():
        hosts[-1].kill()
        kill_when = None
    if not deadline and any(host.failed() for host in hosts):
      deadline = time.monotonic() + GRACE_SECONDS
    if deadline and time.monotonic() > deadline:
      for host in hosts:
        host.kill()
    time.sleep(SAMPLE_SECONDS)


class _Host:
  """One running process."""

  def __init__(
    self,
    command: list[str],
    folder: Path,
    store: Store,
    proxy: Proxy,
    devices: int,
    limits: Limits | None,
  ):
    self._home, self._proxy, self._usage = folder / "home", proxy, Usage()
    self._home.mkdir(parents=True)
    self._private = limits is not None and os.geteuid() == 0 and bool(shutil.which("unshare"))
    self._cgroup = _cgroup(limits) if limits is not None else None
    self._output = (folder / "output").open("w+b")
    limits = limits or Limits(open_files=4096)
    environment = {
      "AWS_EC2_METADATA_DISABLED": "true",
      "DISTILL_JAX_CACHE": str(self._home / "cache"),
      "HOME": str(self._home),
      "JAX_NUM_CPU_DEVICES": str(devices),
      "JAX_PLATFORMS": "cpu",
      "PJRT_NPROC": "16",  # threads for collectives; see tests/conftest.py
      "POD_CGROUP": str(self._cgroup or ""),
      "POD_DISK": str(limits.disk_bytes),
      "POD_OPEN_FILES": str(limits.open_files),
      "POD_PRIVATE_DISK": str(int(self._private)),
      "PYTHONPATH": str(Path(__file__).parent.parent),
      "TMPDIR": str(self._home / "tmp"),
    }
    inherited = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    namespace = ["unshare", "--mount", "--propagation=private"] if self._private else []
    self._process = subprocess.Popen(
      [*namespace, "sh", "-c", START, "sh", *command],
      env=inherited | store.environment(proxy.port) | environment,
      stdout=self._output,
      stderr=subprocess.STDOUT,
    )

  def running(self) -> bool:
    if self._process.returncode is not None:
      return False
    pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
    if not pid:
      return True
    self._usage.code = self._process.returncode = os.waitstatus_to_exitcode(status)
    self._usage.rss_bytes = usage.ru_maxrss * 1024
    return False

  def failed(self) -> bool:
    return not self.running() and self._usage.code != 0

  def kill(self) -> None:
    if self.running():
      os.kill(self._process.pid, signal.SIGKILL)

  def sample(self) -> None:
    """Updates the maxima of open files and disk use."""
    root = Path(f"/proc/{self._process.pid}")
    with contextlib.suppress(OSError):
      self._usage.open_files = max(self._usage.open_files, len(list((root / "fd").iterdir())))
    with contextlib.suppress(OSError):
      self._usage.disk_bytes = max(self._usage.disk_bytes, self._disk(root))

  def _disk(self, root: Path) -> int:
    if not self._private:
      return sum(p.stat().st_size for p in self._home.rglob("*") if p.is_file())
    home = Path(f"{root}/root{self._home}")
    if not (home / "tmp").is_dir():  # not mounted yet
      return 0
    found = os.statvfs(home)
    return (found.f_blocks - found.f_bfree) * found.f_frsize

  def finished(self) -> Usage:
    self._output.seek(0)
    self._usage.output = self._output.read().decode(errors="replace")
    self._output.close()
    self._usage.requests = list(self._proxy.requests)
    if self._cgroup is not None:
      with contextlib.suppress(OSError):
        self._cgroup.rmdir()
    return self._usage


def _cgroup(limits: Limits) -> Path | None:
  """Returns a new cgroup with a limit of memory; None where that is not possible."""
  try:
    folder = Path(tempfile.mkdtemp(prefix="distill_jax_pod_", dir=CGROUPS))
    (folder / "memory.limit_in_bytes").write_text(str(limits.memory_bytes))
  except OSError:
    return None
  return folder
