"""Checks that the hosts of a pod can reach everything that a command reads and writes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from distill_jax.config import Config
from distill_jax.errors import InputError, bad_value

ON_ANY_HOST = ("hub:", "package:", "http:", "https:")
_ON_TEXTS = {"chain", "distill", "record", "shrink"}  # run the teacher on the corpus
_TRAINING = {"on_policy", "train"}
NOT_ON_PODS = {
  "filter": "Run it on one machine, or as an array of jobs with filter.slice",
  "pack": "Run it on one machine with many cores",
  "report": "Run it on one machine",
  "retarget": "Run it on one machine, or as an array of jobs with retarget.slice",
}
# The keys of paths, and the commands that read or write them; _addresses has the exceptions.
KEYS = {
  "teacher.source": _ON_TEXTS | {"evaluate", "generate", "on_policy", "train"},
  "teachers": {"on_policy", "train"},
  "student.source": {"distill", "evaluate", "on_policy", "retokenize", "train"},
  "data.path": _ON_TEXTS | {"evaluate"},
  "data.packed": {"chain", "evaluate", "record"},
  "data.tokenizer": _ON_TEXTS | _TRAINING | {"evaluate", "export", "generate", "retokenize"},
  "records.logprobs": {"record"},
  "records.student_tokenizer": {"record"},
  "retarget.tokenizer": _TRAINING,
  "train.records": _TRAINING | {"shrink"},
  "train.heldout": _TRAINING | {"evaluate"},
  "train.teachers": _TRAINING,
  "train.heldout_teachers": _TRAINING,
  "generate.prompts": {"generate", "on_policy"},
  "generate.records_dir": {"generate"},
  "evaluate.models": {"chain", "evaluate"},
  "evaluate.prompts": {"chain", "evaluate"},
  "export.dir": {"chain", "export"},
  "export.evaluation": {"export"},
  "export.deployment": {"chain", "export"},
  "shrink.dir": {"shrink"},
  "retokenize.tokenizer": {"retokenize"},
  "retokenize.dir": {"retokenize"},
}
TASK_VERBS = {"distill", "evaluate", "generate", "record", "train"}
_BENCHMARKING = {"chain", "evaluate"}


def check(verb: str, workdir: str, config: Config, root: Path) -> None:
  """Checks the addresses of a command.

  Addresses are URLs, names of models on the Hub, or files that the repository contains, which every
  host has.

  Args:
    verb: The command.
    workdir: The value of --workdir; "" without it.
    config: The config of the command.
    root: The folder of the repository.

  Raises:
    InputError: The command reads or writes a file of this machine, or does not run on several
      hosts.
  """
  if verb in NOT_ON_PODS:
    raise InputError(f"{verb} does not use accelerators. {NOT_ON_PODS[verb]}.")
  if workdir and "://" not in workdir:
    expected = "a URL such as gs://BUCKET/FOLDER, which all hosts share"
    raise bad_value("--workdir", workdir, expected, _ACTION)
  missing = "because the hosts do not have this machine's files"
  for key, address in _addresses(verb, config):
    if key.startswith("evals."):  # benchmarks are not read from URLs
      if not address.startswith("package:") and not _is_tracked(address, root):
        expected = f"package:NAME/FILE or a file of the repository, {missing}"
        raise bad_value(key, address, expected, f"Commit the file. {_ACTION}")
    elif not _is_on_hosts(address.removeprefix("run:"), root):
      expected = f"a URL such as gs://BUCKET/NAME, {missing}"
      raise bad_value(key, address, expected, f"Copy it there. {_ACTION}")


_ACTION = "If the hosts share a disk with this path, set --shared_disk"


def _addresses(verb: str, config: Config) -> Iterator[tuple[str, str]]:
  """Yields the keys and values of the paths that a command reads or writes."""
  unused = set()
  if verb == "train" and not config.train.online:
    unused |= {"teacher.source", "teachers"}
  if config.tasks or (verb == "record" and config.data.packed):
    unused.add("data.path")
  if verb == "evaluate" and (config.evaluate.heldout or not config.evaluate.examples):
    unused.add("train.heldout")
  for key, verbs in KEYS.items():
    if verb in verbs and key not in unused:
      section, _, name = key.partition(".")
      value = getattr(config, section)
      yield from _flat(key, getattr(value, name) if name else value)
  if verb in TASK_VERBS:
    yield from _fields("tasks", config.tasks)
  if verb in _BENCHMARKING:
    yield from _fields("evals", config.evals)
  if verb in _TRAINING:
    run = config.train.eval_benchmarks
    yield from _fields("evals", {name: config.evals[name] for name in run if name in config.evals})
  if verb == "chain":
    for name in filter(config.links.__contains__, config.chain):
      yield from _flat(f"links.{name}.student.source", config.links[name].student.source)


def _flat(key: str, value: str | Iterable[str] | Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """Yields the texts in the value of a key that are not empty."""
  if isinstance(value, str):
    if value:
      yield key, value
  elif isinstance(value, Mapping):
    for name, inner in value.items():
      yield from _flat(f"{key}.{name}", inner)
  else:
    for inner in value:
      yield from _flat(key, inner)


def _fields(section: str, entries: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """Yields the paths in the entries of `tasks` or `evals`."""
  for name, entry in entries.items():
    for field in ("path", "tokenizer"):
      yield from _flat(f"{section}.{name}.{field}", getattr(entry, field, ""))


def _is_on_hosts(address: str, root: Path) -> bool:
  return "://" in address or address.startswith(ON_ANY_HOST) or _is_tracked(address, root)


def _is_tracked(address: str, root: Path) -> bool:
  tracked = subprocess.run(
    ["git", "-C", str(root), "ls-files", "--error-unmatch", "--", address],
    capture_output=True,
    check=False,
  )
  return tracked.returncode == 0
