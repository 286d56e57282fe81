"""Runs a command on one or more TPU slices from Google Cloud's queued resources.

  python launch/tpu_pod.py up --name=r1 --zone=us-east5-a --topology=v5p:4x4x4 --spot \\
      [--num_slices=2] [--project=P] [--keep] [--dry_run] -- \\
      train --config=configs/r1_qwen_7b.py --workdir=gs://BUCKET/r1 \\
      --config.train.records=gs://BUCKET/qwen2 --config.train.heldout=gs://BUCKET/qwen2/heldout

`up` creates the slices, installs the last commit on all hosts, runs the command on them, writes
the log of each slice to logs/NAME/SLICE.log and deletes the slices (unless --keep is set).
Preempted slices are created again, and the command resumes from its last checkpoint. So the workdir
and everything that the command reads must be at URLs, which is checked (--shared_disk skips the
check). After exit code 75 the command is run again, unless it ends so three times in a row within
20 minutes each. After any other failure `up` stops; if the run had made progress, or its logs do
not come back, the slices are kept. The run continues without the launcher: Ctrl-C stops only the
launcher, `up` waits for the run again, and `delete` ends it. The steps can be run one by one:
create, install, run, logs, delete. TPU7x does not have queued resources; use launch/gke.py.

--env=HF_TOKEN passes an environment variable of this machine to the hosts, in a file that only the
user can read. Hosts read the object store with the service account of the slice
(--service_account), so that no credentials are copied. Models, records and checkpoints are streamed
from the store and to it, so the boot disk of 100 GB only holds the image and the packages.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tpu_commands import ENDED, ENVIRONMENT, ROOT, RUNTIMES, gcloud, plan, slices, write_environment

from distill_jax import cli, flags
from distill_jax.errors import InputError, bad_value
from distill_jax.preflight import addresses, chips

TRIES = 3  # attempts of commands that depend on the network
LOST_CONNECTION = 255  # exit code of ssh
UNREACHABLE_SECONDS = 5 * 60  # connections lost sooner than this, TRIES in a row, end the launcher
SHORT_SECONDS = 20 * 60  # so do runs that stop with exit code 75 sooner than this
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

# Progress lines begin with the verb and a number of units (distill_jax/runtime/progress.py).
PROGRESSED = re.compile(r"^\S+: [a-z_]+ +[0-9,]*[1-9][0-9,]*/", re.MULTILINE)


def call(line: list[str], capture: bool = False) -> subprocess.CompletedProcess:
  stdout = subprocess.PIPE if capture else None
  return subprocess.run(line, stdout=stdout, text=True, errors="replace")


def tries(args: argparse.Namespace) -> Iterator[None]:
  """Yields TRIES times, with pauses between."""
  for i in range(TRIES):
    time.sleep(args.poll if i else 0)
    yield


def sure(args: argparse.Namespace, line: list[str], capture: bool = False) -> str:
  """Runs a command, with retries, and returns its output; exits if it keeps failing."""
  for _ in tries(args):
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
    nodes = listing("tpu-vm")
    states = {nodes.get(name, "missing") for name in slices(args)}
  return "ACTIVE" if states == {"READY"} else "WAITING" if states <= WAITING | {"READY"} else "LOST"


def bring_up(args: argparse.Namespace, steps: dict[str, list[list[str]]]) -> None:
  """Waits until all slices are ready. Lost slices are deleted and created again."""
  created = code = 0
  while (now := state(args)) != "ACTIVE":
    print(f"{args.name} is {now}", file=sys.stderr, flush=True)
    if now == "LOST":
      sure(args, steps["delete"][0])
    elif now == "ABSENT" and created == TRIES:
      why = f"could not be created: gcloud exited with code {code}"
      never = f"was created {TRIES} times but was never ready"
      sys.exit(f"error: {args.name} {why if code else never}. See the output of gcloud above.")
    elif now == "ABSENT":
      created += 1
      code = call(steps["create"][0]).returncode
    time.sleep(args.poll)


def install(args: argparse.Namespace, steps: dict[str, list[list[str]]]) -> bool:
  """Installs the commit on all hosts; returns True if all slices confirm it."""
  if any(call(line).returncode for line in steps["install"]):
    return False
  checks = [call(line, capture=True) for line in steps["check"]]
  return all(done.stdout and not done.returncode for done in checks)


def prepare(args: argparse.Namespace, steps: dict[str, list[list[str]]]) -> None:
  """Waits until all slices are ready, and installs the commit on their hosts."""
  for _ in tries(args):
    bring_up(args, steps)
    if install(args, steps):
      return
  sys.exit(
    f"error: The installation on {args.name} keeps failing. The slices exist and cost money until "
    "you run `delete`."
  )


def run(line: list[str]) -> int:
  """Runs the command on the hosts and prints its output.

  Returns:
    The exit code, or LOST_CONNECTION if no host reports that the command has ended.
  """
  has_ended = False
  with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, errors="replace") as process:
    assert process.stdout is not None
    for text in process.stdout:
      print(text, end="", flush=True)
      has_ended |= ENDED in text
  return process.returncode if has_ended else LOST_CONNECTION


def fetch(args: argparse.Namespace, steps: dict[str, list[list[str]]]) -> list[str]:
  """Writes the log of each slice to logs/NAME/SLICE.log, with the name of the host in each line.

  Returns:
    The log of each slice; "" for a slice of which a host cannot be reached.
  """
  folder = Path("logs", args.name)
  folder.mkdir(parents=True, exist_ok=True)
  logs = []
  for node, line in zip(slices(args), steps["logs"], strict=True):
    for _ in tries(args):
      done = call(line, capture=True)
      if done.stdout:
        (folder / f"{node}.log").write_text(done.stdout)
      if complete := done.stdout and not done.returncode:
        break
    logs.append(done.stdout if complete else "")
  return logs


def up(args: argparse.Namespace, steps: dict[str, list[list[str]]]) -> int:
  """Runs all steps, again after each preemption; returns the exit code of the command."""
  lost = short = 0  # in a row
  while True:
    prepare(args, steps)
    began = time.monotonic()
    code = run(steps["run"][0])
    if code == 0:
      break
    seconds = time.monotonic() - began
    time.sleep(args.poll)  # a preempted machine loses its connections before its state changes
    if state(args) != "ACTIVE":
      lost = short = 0
      continue
    lost = lost + 1 if code == LOST_CONNECTION and seconds < UNREACHABLE_SECONDS else 0
    short = short + 1 if code == os.EX_TEMPFAIL and seconds < SHORT_SECONDS else 0
    if lost == TRIES:
      sys.exit(
        f"error: {args.name} cannot be reached. It still exists and costs money, and the command "
        "may still be running. Run `up` again to wait for it, or `delete`."
      )
    if code not in (LOST_CONNECTION, os.EX_TEMPFAIL) or short == TRIES:
      break
  logs = fetch(args, steps)
  if code:
    minutes = SHORT_SECONDS // 60
    often = f" {TRIES} times in a row, within {minutes} minutes each" if short else ""
    print(
      f"error: {args.verb[0]} exited with code {code}{often}. Its output is above and in "
      f"logs/{args.name}.",
      file=sys.stderr,
    )
    if why := reason_to_keep(logs):
      print(
        f"{args.name} is kept, because {why}. It costs money until you run `up` again after a "
        "correction, or `delete`.",
        file=sys.stderr,
      )
      args.keep = True
  elif not all(logs):
    print(f"The logs of {args.name} are incomplete.", file=sys.stderr)
  if not args.keep:
    sure(args, steps["delete"][0])
  return code


def reason_to_keep(logs: list[str]) -> str:
  """Returns why the slices of a failed run with these logs are not deleted; "" to delete them."""
  if not all(logs):
    return "its logs are incomplete"
  return "the run had made progress" if any(map(PROGRESSED.search, logs)) else ""


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
      config = cli.parse(["distill-jax", *args.verb[1:]])
      addresses.check(args.verb[0], flags.WORKDIR.value or "", config, ROOT)
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
    if args.step == "install":
      sys.exit(0 if install(args, steps) else "error: Not all hosts confirm the installation.")
    if args.step == "logs":
      incomplete = "error: The logs of some hosts could not be fetched."
      sys.exit(0 if all(fetch(args, steps)) else incomplete)
    line = steps[args.step][0]
    sys.exit(run(line) if args.step == "run" else call(line).returncode)
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
