"""The commands of gcloud that launch/tpu_pod.py runs, and the scripts that they run on hosts."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from distill_jax.preflight import chips

ROOT = Path(__file__).parent.parent
# The images of chips with queued resources (cloud.google.com/tpu/docs/runtimes).
RUNTIMES = {
  "v4": "tpu-ubuntu2204-base",
  "v5e": "v2-alpha-tpuv5-lite",
  "v5p": "v2-alpha-tpuv5",
  "v6e": "v2-alpha-tpuv6e",
}

# All hosts at once, because they wait for each other; the default of gcloud is 64 at a time.
EVERYWHERE = ("--node=all", "--worker=all", "--batch-size=all")

# Remote scripts get their values as "$1" and "$@", so that a value is never run as code.
INSTALL = (
  'test -e "$1/.installed" || { tar -xzf "$1.tar.gz" && cd "$1" && sudo apt-get $3 update -q && '
  'sudo apt-get $3 install -qy "$2-venv" && "$2" -m venv .venv && '
  '.venv/bin/pip install -q -c tools/constraints.txt ".[all,gcs,s3,tpu]" && touch .installed; }'
)
# After the first boot, unattended upgrades hold the lock of apt for minutes.
APT = "-o DPkg::Lock::Timeout=600"
# `queued-resources ssh` and `scp` also exit with 0 if they reach no host. So the hosts confirm what
# they did: that the commit is installed, and that the command has ended.
INSTALLED = 'test -e "$1/.installed" && test -e "$2" && echo installed'
ENDED = "distill-exit"
# The lock: after a lost connection, the second command waits for the end of the first.
RUN = (
  "{ trap '' HUP && exec 9>distill.lock && flock 9 && ulimit -n \"$(ulimit -Hn)\" && "
  'if [ -f distill.env ]; then . ./distill.env; fi && cd "$1" && shift && set -o pipefail && '
  '.venv/bin/distill-jax "$@" --distributed=auto 2>&1 | tee -ap ../distill.log; }; '
  f'code=$?; echo "{ENDED} $code"; exit $code'
)
LOG = 'host=$(hostname); echo "$host: distill.log"; sed "s/^/$host: /" distill.log; true'
ENVIRONMENT = "distill.env"  # file on the hosts with the variables of --env


def gcloud(args: argparse.Namespace, *words: str) -> list[str]:
  """Returns a gcloud command for TPUs."""
  project = [f"--project={args.project}"] if args.project else []
  return ["gcloud", "compute", "tpus", *words, f"--zone={args.zone}", *project]


def remote(script: str, *values: str) -> str:
  """Returns the flag of gcloud that runs a script on the hosts."""
  return f"--command={shlex.join(['bash', '-c', script, 'bash', *values])}"


def ssh(args: argparse.Namespace, script: str, *values: str) -> list[str]:
  """Returns the command that runs a script on all hosts of all slices at once."""
  return gcloud(args, "queued-resources", "ssh", args.name, *EVERYWHERE, remote(script, *values))


def ssh_slices(args: argparse.Namespace, script: str, *values: str) -> list[list[str]]:
  """Returns, for each slice, the command that runs a script on all its hosts."""
  command = remote(script, *values)
  return [gcloud(args, "tpu-vm", "ssh", node, "--worker=all", command) for node in slices(args)]


def slices(args: argparse.Namespace) -> list[str]:
  """Returns the names of the slices."""
  if args.num_slices == 1:
    return [args.name]
  return [f"{args.name}-{i}" for i in range(args.num_slices)]


def create(args: argparse.Namespace) -> list[str]:
  """Returns the command that creates the slices."""
  chip, count = chips.parse(args.topology)
  what = [f"--type={chip.name}", f"--topology={args.topology.partition(':')[2]}"]
  if chip.name in ("v5e", "v6e"):  # the number of chips determines the shape
    what = [f"--accelerator-type={'v5litepod' if chip.name == 'v5e' else chip.name}-{count}"]
  what += [f"--runtime-version={args.runtime or RUNTIMES[chip.name]}"]
  what += (
    [f"--node-id={args.name}"]
    if args.num_slices == 1
    else [f"--node-count={args.num_slices}", f"--node-prefix={args.name}"]
  )
  what += ["--spot"] * args.spot
  if args.service_account:
    what += [f"--service-account={args.service_account}"]
  return gcloud(args, "queued-resources", "create", args.name, *what)


def environment_file(args: argparse.Namespace) -> Path:
  """Returns the local path of the script that sets the variables of --env."""
  return Path(tempfile.gettempdir()) / f".{args.name}.{os.getpid()}.env"


def write_environment(args: argparse.Namespace) -> Path:
  """Writes the variables of --env as a shell script that only this user can read."""
  path = environment_file(args)
  path.touch(mode=0o600)
  path.write_text("".join(f"export {name}={shlex.quote(os.environ[name])}\n" for name in args.env))
  return path


def plan(args: argparse.Namespace) -> dict[str, list[list[str]]]:
  """Returns the commands of each step."""
  git = ["git", "-C", str(ROOT)]
  commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
  folder = f"distill_jax-{commit.stdout[:12]}"
  archive = f"{tempfile.gettempdir()}/{folder}.tar.gz"
  environment = str(environment_file(args))

  def copy(source: str, target: str = "") -> list[str]:
    return gcloud(args, "queued-resources", "scp", source, f"{args.name}:{target}", *EVERYWHERE)

  return {
    "create": [create(args)],
    "install": [
      [*git, "archive", f"--prefix={folder}/", f"--output={archive}", "HEAD"],
      copy(archive),
      *([copy(environment, ENVIRONMENT)] if args.env else []),
      ssh(args, INSTALL, folder, args.python, APT),
    ],
    "check": ssh_slices(args, INSTALLED, folder, ENVIRONMENT if args.env else folder),
    "run": [ssh(args, RUN, folder, *args.verb)],
    "logs": ssh_slices(args, LOG),
    "delete": [gcloud(args, "queued-resources", "delete", args.name, "--force", "--quiet")],
  }
