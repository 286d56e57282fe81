"""Runs a command on one or more TPU slices from Google Cloud's queued resources.

  python launch/tpu_pod.py up --name=r1 --zone=us-east5-a --topology=v5p:4x4x4 --spot \\
      [--num_slices=2] [--project=P] [--keep] [--dry_run] -- \\
      train --config=configs/r1_qwen_7b.py --workdir=gs://BUCKET/r1

`up` creates the slices, installs the last commit on all hosts, runs the command on them, downloads
their logs to logs/NAME/ and deletes the slices (unless --keep is set). Preempted slices are created
again, and the command resumes from its last checkpoint. So the workdir and everything that the
command reads must be at URLs, which is checked (--shared_disk skips the check). After any other
failure, `up` prints the end of the log and stops; if the run had made progress, the slices are
kept. The run continues without the launcher: Ctrl-C stops only the launcher, `up` waits for the run
again, and `delete` ends it. The steps can be run one by one: create, install, run, logs, delete.
TPU7x does not have queued resources; use launch/gke.py.

--env=HF_TOKEN passes an environment variable of this machine to the hosts, in a file that only the
user can read. Hosts read the object store with the service account of the slice
(--service_account), so that no credentials are copied. Models, records and checkpoints are streamed
from the store and to it, so the boot disk of 100 GB only holds the image and the packages;
--boot_disk sets another size.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from distill_jax import cli
from distill_jax.errors import InputError, bad_value
from distill_jax.preflight import addresses, chips

ROOT = Path(__file__).parent.parent
TRIES = 3  # attempts of commands that depend on the network
LOST_CONNECTION = 255  # exit code of ssh
# The images of chips with queued resources (cloud.google.com/tpu/docs/runtimes).
RUNTIMES = {
  "v4": "tpu-ubuntu2204-base",
  "v5e": "v2-alpha-tpuv5-lite",
  "v5p": "v2-alpha-tpuv5",
  "v6e": "v2-alpha-tpuv6e",
}
# Temporary states of a queued resource or a node.
WAITING = {
  "CREATING",
  "ACCEPTED",
  "PROVISIONING",
  "WAITING_FOR_RESOURCES",
  "DELETING",
  "STARTING",
  "RESTARTING",
  "REPAIRING",
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
# The lock: after a lost connection, the second command waits for the end of the first.
RUN = (
  "trap '' HUP && exec 9>distill.lock && flock 9 && ulimit -n \"$(ulimit -Hn)\" && "
  'if [ -f distill.env ]; then . ./distill.env; fi && cd "$1" && shift && set -o pipefail && '
  '.venv/bin/distill-jax "$@" --distributed=auto 2>&1 | tee -ap ../distill.log'
)
ENVIRONMENT = "distill.env"  # file on the hosts with the variables of --env
# Progress lines begin with the verb and a number of units (distill_jax/runtime/progress.py).
PROGRESSED = 'grep -Eq "^[a-z]+ +[0-9,]*[1-9][0-9,]*/" distill.log'


def gcloud(args: argparse.Namespace, *words: str) -> list[str]:
  """Returns a gcloud command for TPUs."""
  project = [f"--project={args.project}"] if args.project else []
  return ["gcloud", "compute", "tpus", *words, f"--zone={args.zone}", *project]


def ssh(args: argparse.Namespace, script: str, *values: str, more: tuple[str, ...] = ()):
  """Returns the command that runs a script on all hosts of all slices at once."""
  command = f"--command={shlex.join(['bash', '-c', script, 'bash', *values])}"
  return gcloud(args, "queued-resources", "ssh", args.name, *EVERYWHERE, command, *more)


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
  if args.boot_disk:
    what += [f"--boot-disk=disk-size={args.boot_disk}"]
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
  logs = f"logs/{args.name}"
  fetch = ssh(args, "cat distill.log", more=(f"--output-directory={logs}",))
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
    "run": [ssh(args, RUN, folder, *args.verb)],
    "logs": [["mkdir", "-p", logs], fetch],
    "delete": [gcloud(args, "queued-resources", "delete", args.name, "--force", "--quiet")],
  }


def call(line: list[str], capture: bool = False) -> subprocess.CompletedProcess:
  return subprocess.run(line, stdout=subprocess.PIPE if capture else None, text=True)


def sure(args: argparse.Namespace, line: list[str], capture: bool = False) -> str:
  """Runs a command, with retries, and returns its output; exits if it keeps failing."""
  for i in range(TRIES):
    time.sleep(args.poll if i else 0)
    if not (done := call(line, capture)).returncode:
      return done.stdout
  sys.exit(
    f"error: {shlex.join(line[:6])} keeps failing. The slices exist and cost money until you run "
    "`delete`."
  )


def state(args: argparse.Namespace) -> str:
  """Returns the state of the slices: ABSENT, WAITING, ACTIVE (all are ready) or LOST."""

  def listing(what):
    return {
      item["name"].rpartition("/")[2]: item["state"]
      for item in json.loads(sure(args, gcloud(args, what, "list", "--format=json"), True) or "[]")
    }

  found = listing("queued-resources").get(args.name)
  if found is None:
    return "ABSENT"
  states = {found["state"]}
  if states == {"ACTIVE"}:
    many = args.num_slices > 1
    names = [f"{args.name}-{i}" for i in range(args.num_slices)] if many else [args.name]
    nodes = listing("tpu-vm")
    states = {nodes.get(name, "missing") for name in names}
  return "ACTIVE" if states == {"READY"} else "WAITING" if states <= WAITING | {"READY"} else "LOST"


def bring_up(args: argparse.Namespace, steps: dict[str, list[list[str]]]) -> None:
  """Waits until all slices are ready. Lost slices are deleted and created again."""
  created = 0
  while (now := state(args)) != "ACTIVE":
    print(f"{args.name} is {now}", file=sys.stderr, flush=True)
    if now == "LOST":
      sure(args, steps["delete"][0])
    elif now == "ABSENT" and created == TRIES:
      sys.exit(
        f"error: {args.name} was created {TRIES} times but was never ready. See the output of "
        "gcloud above."
      )
    elif now == "ABSENT":
      created += 1
      call(steps["create"][0])
    time.sleep(args.poll)


def up(args: argparse.Namespace, steps: dict[str, list[list[str]]]) -> int:
  """Runs all steps, again after each preemption; returns the exit code of the command."""
  lost = 0
  while True:
    bring_up(args, steps)
    for line in steps["install"]:
      sure(args, line)
    began = time.monotonic()
    code = call(steps["run"][0]).returncode
    if code == 0:
      break
    if code == os.EX_TEMPFAIL:
      continue
    time.sleep(args.poll)  # a preempted machine loses its connections before its state changes
    if state(args) != "ACTIVE":
      continue
    if code != LOST_CONNECTION:
      call(ssh(args, "hostname; tail -n 50 distill.log"))
      print(f"error: {args.verb[0]} exited with code {code}. Its log is above.", file=sys.stderr)
      if call(ssh(args, PROGRESSED)).returncode == 0:
        print(
          f"{args.name} is kept, because the run had made progress. It costs money until you run "
          "`up` again after a correction, or `delete`.",
          file=sys.stderr,
        )
        args.keep = True
      break
    lost = lost + 1 if time.monotonic() - began < 10 * args.poll else 0
    if lost == TRIES:
      sys.exit(
        f"error: {args.name} cannot be reached. It still exists and costs money, and the command "
        "may still be running. Run `up` again to wait for it, or `delete`."
      )
  for line in steps["logs"]:
    call(line)
  if not args.keep:
    sure(args, steps["delete"][0])
  return code


def name(text: str) -> str:
  """Checks a name on the command line."""
  if not re.fullmatch(r"[a-z][a-z0-9.:-]*[a-z0-9]", text):
    raise argparse.ArgumentTypeError(
      f"{text!r} is not a valid name. Use lower-case letters, digits, '-', '.' and ':'."
    )
  return text


def topology(text: str) -> str:
  """Checks a topology on the command line."""
  try:
    chip, _ = chips.parse(text)
  except InputError as error:
    raise argparse.ArgumentTypeError(str(error)) from error
  if chip.name not in RUNTIMES:
    raise argparse.ArgumentTypeError(
      f"{text} is not available as a queued resource. Use launch/gke.py."
    )
  return text


def main(argv: list[str] | None = None) -> None:
  """Parses the command line and runs a step, or prints its commands."""
  argv = sys.argv[1:] if argv is None else argv
  split = argv.index("--") if "--" in argv else len(argv)
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
  parser.add_argument("step", choices=["up", "create", "install", "run", "logs", "delete"])
  parser.add_argument("--name", type=name, required=True)
  parser.add_argument("--zone", type=name, required=True)
  parser.add_argument(
    "--topology", type=topology, required=True, help="topology of a slice, e.g. v5p:4x4x4"
  )
  parser.add_argument("--num_slices", type=int, default=1)
  parser.add_argument("--project", type=name, help="default: the project of gcloud")
  parser.add_argument("--spot", action="store_true", help="cheaper, but can be preempted")
  parser.add_argument("--boot_disk", type=int, help="size of the hosts' disk in GB; default: 100")
  parser.add_argument("--service_account", help="default: that of Compute Engine")
  parser.add_argument("--env", action="append", default=[], help="e.g. HF_TOKEN; may be repeated")
  parser.add_argument("--shared_disk", action="store_true", help="all hosts share local paths")
  parser.add_argument("--runtime", type=name, help="default: the usual image for the chip")
  parser.add_argument("--python", type=name, default="python3.11", help="name of the apt package")
  parser.add_argument("--poll", type=float, default=30, help="seconds between status checks")
  parser.add_argument("--keep", action="store_true", help="do not delete the slices")
  parser.add_argument("--dry_run", action="store_true", help="only print the commands")
  args = parser.parse_args(argv[:split])
  args.verb = argv[split + 1 :]
  if args.num_slices < 1:
    parser.error(str(bad_value("--num_slices", args.num_slices, "at least 1", "Correct it")))
  if args.step in ("up", "run") and not args.verb:
    parser.error("There is nothing to run. Add a verb and its flags after --, e.g. -- train ….")
  if odd := [word for word in args.verb if not word.isprintable()]:
    parser.error(f"The argument {odd[0]!r} contains a line break or control character. Remove it.")
  if unset := [name for name in args.env if name not in os.environ]:
    parser.error(f"--env is {unset[0]}; expected a variable that is set here. Export it.")
  if args.step in ("up", "run") and not args.shared_disk:
    try:
      addresses.check(args.verb, cli.parse(["distill-jax", *args.verb[1:]]), ROOT)
    except InputError as error:
      parser.error(str(error))
  steps = plan(args)
  if args.dry_run:
    if args.env:
      print(f"# {ENVIRONMENT} on the hosts: {', '.join(args.env)}")
    for step in steps if args.step == "up" else [args.step]:
      print(*map(shlex.join, steps[step]), sep="\n")
    return
  secrets = write_environment(args) if args.env else None
  try:
    if args.step == "up":
      sys.exit(up(args, steps))
    sys.exit(next((code for line in steps[args.step] if (code := call(line).returncode)), 0))
  except KeyboardInterrupt:
    sys.exit(
      f"{args.name} still exists and costs money. Run `up` again to continue, or `delete` to end "
      "it."
    )
  finally:
    if secrets is not None:
      secrets.unlink()


if __name__ == "__main__":
  main()
