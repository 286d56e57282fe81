"""Checks that the hosts of a pod can reach everything that a command reads and writes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

from distill_jax.config import Config
from distill_jax.errors import InputError, bad_value

ON_ANY_HOST = ("hub:", "package:", "http:", "https:")
NOT_ON_PODS = {
  "filter": "Run it on one machine, or as an array of jobs with filter.slice",
  "pack": "Run it on one machine with many cores",
  "report": "Run it on one machine",
  "retarget": "Run it on one machine, or as an array of jobs with retarget.slice",
}


def check(words: list[str], config: Config, root: Path) -> None:
  """Checks the addresses of a command.

  Addresses are URLs, names of models on the Hub, or files that the repository contains, which every
  host has.

  Args:
    words: The verb and its flags.
    config: The config of the command.
    root: The folder of the repository.

  Raises:
    InputError: The command reads or writes a file of this machine, or does not run on several
      hosts.
  """
  verb = words[0]
  if verb in NOT_ON_PODS:
    raise InputError(f"{verb} does not use accelerators. {NOT_ON_PODS[verb]}.")
  workdir = [word.partition("=")[2] for word in words if word.startswith("--workdir=")]
  if workdir and "://" not in workdir[-1]:
    expected = "a URL such as gs://BUCKET/FOLDER, which all hosts share"
    raise bad_value("--workdir", workdir[-1], expected, _ACTION)
  for key, address in _addresses(verb, config):
    if not _is_on_hosts(address.removeprefix("run:"), root):
      expected = (
        "a URL such as gs://BUCKET/NAME, because the hosts do not have this machine's files"
      )
      raise bad_value(key, address, expected, f"Copy it there. {_ACTION}")


_ACTION = "If the hosts share a disk with this path, set --shared_disk"


def _addresses(verb: str, config: Config) -> Iterator[tuple[str, str]]:
  """Yields the keys and values of the paths that a command reads or writes."""
  found: dict[str, str | tuple[str, ...]] = {}
  if verb in ("record", "evaluate", "generate", "distill"):
    found["teacher.source"] = config.teacher.source
  if verb in ("train", "evaluate", "shrink", "retokenize"):
    found["student.source"] = config.student.source
  if verb in ("record", "evaluate") and not config.tasks:
    found["data.path"] = "" if verb == "record" and config.data.packed else config.data.path
    found["data.packed"] = config.data.packed
  if verb in ("record", "train", "evaluate", "generate", "export"):
    found["data.tokenizer"] = config.data.tokenizer
  if verb == "record":
    found["records.logprobs"] = config.records.logprobs
    found["records.student_tokenizer"] = config.records.student_tokenizer
  if verb == "train":
    found["retarget.tokenizer"] = config.retarget.tokenizer
    found["train.records"] = config.train.records
    found["train.heldout"] = config.train.heldout
    for key in ("teachers", "heldout_teachers"):
      named = getattr(config.train, key).items()
      found |= {f"train.{key}.{name}": paths for name, paths in named}
  if verb == "evaluate":
    found |= {f"evaluate.models.{name}": path for name, path in config.evaluate.models.items()}
  if verb == "generate":
    found["generate.prompts"] = config.generate.prompts
  if verb == "export":
    found["export.dir"] = config.export.dir
  if verb == "retokenize":
    found["retokenize.tokenizer"] = config.retokenize.tokenizer
    found["retokenize.dir"] = config.retokenize.dir
  for key, value in found.items():
    for address in (value,) if isinstance(value, str) else value:
      if address:
        yield key, address


def _is_on_hosts(address: str, root: Path) -> bool:
  if "://" in address or address.startswith(ON_ANY_HOST):
    return True
  tracked = subprocess.run(
    ["git", "-C", str(root), "ls-files", "--error-unmatch", "--", address],
    capture_output=True,
    check=False,
  )
  return tracked.returncode == 0
