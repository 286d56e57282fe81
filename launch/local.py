"""Runs a command as several processes on this machine, like the hosts of a pod.

  python launch/local.py --processes=2 [--devices=2] [--dry_run] -- \\
      train --config=configs/demo.py --workdir=runs/two

Each process has `--devices` virtual CPU devices. On a machine with accelerators omit the flag, and
select devices with environment variables such as JAX_CUDA_VISIBLE_DEVICES. Output lines of process
i start with [i]. On SIGTERM the run saves and exits with code 75; the same command resumes it. If
one process fails, the others are stopped, and the launcher exits with its code.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

GRACE = 30  # seconds until the other processes are killed after a failure


def commands(processes: int, port: int, verb: list[str]) -> list[list[str]]:
  """Returns the command of each process."""
  where = [f"--distributed=localhost:{port},{processes},{i}" for i in range(processes)]
  return [[sys.executable, "-m", "distill_jax.cli", *verb, w] for w in where]


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def run(lines: list[list[str]], env: dict[str, str]) -> int:
  """Runs all commands and waits; returns 0 or the exit code of the first that failed."""
  children = [
    subprocess.Popen(line, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in lines
  ]

  def forward(number, _):
    return [c.send_signal(number) for c in children if c.poll() is None]

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, forward)
  readers = [threading.Thread(target=_copy, args=(i, c)) for i, c in enumerate(children)]
  for reader in readers:
    reader.start()
  code = 0
  while any(c.poll() is None for c in children):
    failed = [c.returncode for c in children if c.returncode]
    if failed and not code:
      code, deadline = failed[0], time.monotonic() + GRACE
    if code and time.monotonic() > deadline:
      for c in children:
        c.kill()
    time.sleep(0.1)
  for reader in readers:
    reader.join()
  return code or next((c.returncode for c in children if c.returncode), 0)


def _copy(i: int, child: subprocess.Popen) -> None:
  assert child.stdout is not None
  for line in child.stdout:
    sys.stdout.write(f"[{i}] {line.decode(errors='replace')}")
    sys.stdout.flush()


def main() -> None:
  """Parses the command line and runs the processes, or prints their commands."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--processes", type=int, default=2)
  parser.add_argument("--devices", type=int, default=0, help="virtual CPU devices per process")
  parser.add_argument("--dry_run", action="store_true", help="only print the commands")
  parser.add_argument("verb", nargs="+", help="after --: a verb and its flags")
  args = parser.parse_args()
  if args.processes < 1:
    parser.error(f"--processes is {args.processes}; expected at least 1. Correct it.")
  if args.devices < 0:
    parser.error(f"--devices is {args.devices}; expected at least 0. Correct it.")
  env = {}
  if args.devices:
    env = {
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": str(args.devices),
      # A collective blocks a thread per device until the others arrive, and a device has up to four
      # workers. With fewer threads, a step can wait for itself.
      "PJRT_NPROC": str(max(4 * args.devices, os.cpu_count() or 1)),
    }
  lines = commands(args.processes, free_port(), args.verb)
  if args.dry_run:
    for line in lines:
      print(shlex.join(["env", *(f"{k}={v}" for k, v in env.items()), *line]))
    return
  sys.exit(run(lines, env))


if __name__ == "__main__":
  main()
