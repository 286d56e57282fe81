"""A gcloud with slices of two hosts each, as a script: fake_gcloud.py FOLDER ARGUMENTS.

FOLDER has log.jsonl, the arguments of all calls, and memory.json, what is to happen:

  state, nodes: the state of the queued resource, and those of its slices by name
  runs: what each run does: an exit code, or one of the words in `run`
  fails, skips: commands, as [group, verb or part of an argument], whose next call exits with 1, or
    with 0 without reaching a host, as gcloud's does if it cannot prepare a node

Each host is a folder in FOLDER/hosts, in which the scripts of the launcher are run.
"""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE, WORDS = Path(sys.argv[1]), sys.argv[4:]  # without "compute tpus"
MEMORY = json.loads((HERE / "memory.json").read_text())
DISTILL_JAX = "#!/bin/sh\ncat ../says\nexit $(cat ../code)\n"


def main():
  with (HERE / "log.jsonl").open("a") as f:
    f.write(json.dumps(sys.argv[2:]) + "\n")
  for code, key in enumerate(("skips", "fails")):
    if MEMORY[key] and is_meant(*MEMORY[key][0]):
      MEMORY[key].pop(0)
      return code
  if WORDS[1] == "ssh":
    return ssh(next(w for w in WORDS if w.startswith("--command=")).removeprefix("--command="))
  if WORDS[1] == "scp" and any("distill.env" in w for w in WORDS):
    MEMORY["env"] = Path(WORDS[2]).read_text()
    for host in hosts():
      (host / "distill.env").write_text(MEMORY["env"])
  if WORDS[1] == "create":
    count = [w.partition("=")[2] for w in WORDS if w.startswith("--node-count=")]
    names = [f"r1-{i}" for i in range(int(count[0]))] if count else ["r1"]
    MEMORY.update(state="ACTIVE", nodes=dict.fromkeys(names, "READY"))
  if WORDS[1] == "delete":
    MEMORY["state"] = None
    shutil.rmtree(HERE / "hosts", ignore_errors=True)
  if WORDS[:2] == ["queued-resources", "list"]:
    rented = [{"name": "x/other", "state": {"state": "SUSPENDED"}}]
    rented += [{"name": "x/r1", "state": {"state": MEMORY["state"]}}] if MEMORY["state"] else []
    print(json.dumps(rented))
  if WORDS[:2] == ["tpu-vm", "list"]:
    print(json.dumps([{"name": f"x/{n}", "state": s} for n, s in MEMORY["nodes"].items()]))
  return 0


def is_meant(group, word):
  return WORDS[0] == group and (WORDS[1] == word or any(word in text for text in WORDS[2:]))


def hosts():
  """The folders of the hosts that the command addresses."""
  names = MEMORY["nodes"] if WORDS[0] == "queued-resources" else [WORDS[2]]
  folders = [HERE / "hosts" / f"{name}-w-{i}" for name in names for i in range(2)]
  for folder in folders:
    folder.mkdir(parents=True, exist_ok=True)
  return folders


def ssh(command):
  """Runs a command on all hosts; returns the first exit code that is not 0."""
  folder = shlex.split(command)[4] if "distill_jax-" in command else ""
  if "apt-get" in command:
    for host in hosts():
      program = host / folder / ".venv" / "bin" / "distill-jax"
      program.parent.mkdir(parents=True, exist_ok=True)
      program.write_text(DISTILL_JAX)
      program.chmod(0o755)
      (host / folder / ".installed").touch()
    return 0
  if "exec 9" in command:
    return run(command, MEMORY["runs"].pop(0))
  return everywhere(command)


def run(command, code):
  if code == "preempted":
    MEMORY["nodes"][max(MEMORY["nodes"])] = "PREEMPTED"
    return 255
  if code == "suspended":
    MEMORY["state"] = "SUSPENDED"
    return 1
  if code == "lost":
    return 255
  if code == "refused":  # by an interface of Google Cloud, before any host is reached
    return 1
  if code == "unreached":
    return 0
  for i, host in enumerate(hosts()):
    shown = code == "progressed" and i == 0  # only process 0 prints its progress
    (host / "says").write_text("train  1,024/4,096 tokens  25%\n" if shown else "hello\n")
    (host / "code").write_text("2" if code == "progressed" else str(code))
  return everywhere(command)


def everywhere(command):
  sys.stdout.flush()
  codes = [subprocess.run(["bash", "-c", command], cwd=host).returncode for host in hosts()]
  return next(filter(None, codes), 0)


code = main()
(HERE / "memory.json").write_text(json.dumps(MEMORY))
sys.exit(code)
