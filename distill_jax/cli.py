"""`distill-jax VERB --config=FILE --workdir=DIR --config.key=value [--json]`."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from distill_jax import config as configs
from distill_jax import registry
from distill_jax.errors import InputError, Preempted
from distill_jax.runtime import distributed, storage
from distill_jax.runtime.workdir import Workdir
from distill_jax.types import JsonObject

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # or read-only
WITHOUT_WORKDIR = ("preflight",)  # writes nothing
CONFIG = config_flags.DEFINE_config_file("config", None, "the config file, e.g. configs/demo.py")
WORKDIR = flags.DEFINE_string("workdir", None, "the folder of the run")
DISTRIBUTED = flags.DEFINE_string(
  "distributed", "", "joins the processes of a run: 'auto', or HOST:PORT,COUNT,INDEX"
)
PROFILE_STEPS = flags.DEFINE_string(
  "profile_steps", "", "profiles the steps FIRST:END, e.g. 10:13 for steps 10 to 12"
)
TOPOLOGY = flags.DEFINE_string("topology", None, "preflight: the TPUs, e.g. v5p:4x4x4")
NUM_SLICES = flags.DEFINE_integer("num_slices", None, "preflight: the number of such slices")
VERB = flags.DEFINE_string("verb", None, "preflight: the command to compile, train or record")
JSON = flags.DEFINE_bool("json", False, "prints one JSON object as the last line")


def main(argv: list[str] | None = None) -> None:
  """Runs one command. If it stops early, one sentence on standard error explains why.

  Exit codes: 2, the input cannot be used; 75 (EX_TEMPFAIL of sysexits.h), told to stop, run the
  command again; 1, training has gone wrong.
  """
  argv = list(sys.argv if argv is None else argv)
  hush_libtpu()
  try:
    result = run(argv)
  except InputError as error:
    sys.exit(_stop(2, f"error: {error}"))
  except Preempted as error:
    sys.exit(_stop(os.EX_TEMPFAIL, str(error)))
  except FloatingPointError as error:
    sys.exit(_stop(1, f"error: {error}"))
  except OSError as error:
    if error.errno not in DISK_FULL:
      raise
    path, reason = error.filename or WORKDIR.value, error.strerror
    message = f"{path} cannot be written ({reason}); make room and run again: finished work is kept"
    sys.exit(_stop(2, f"error: {message}"))
  if distributed.is_process_0():
    print(json.dumps(result) if JSON.value else summary(argv[1], result), flush=True)


def hush_libtpu() -> None:
  """Where there is no TPU, tells libtpu a host name and a kind of TPU, before jax loads it.

  preflight and the tests use libtpu on machines without a TPU, where it would otherwise begin
  every command with six lines of errors about the two.
  """
  if not any(Path("/dev").glob("accel*")) and not Path("/dev/vfio").exists():
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def _stop(code: int, message: str) -> int:
  """Prints why the command stops; returns its exit code."""
  print(message, file=sys.stderr, flush=True)
  return code


def run(argv: list[str]) -> JsonObject:
  """Parses the command line and runs the command inside its workdir."""
  verb = argv[1] if len(argv) > 1 else ""
  if verb not in (verbs := registry.names("commands")):
    raise InputError(f"{verb or 'no verb'!r} is not a verb; the verbs are {', '.join(verbs)}")
  config = parse(argv[:1] + argv[2:])
  command = registry.load("commands", verb)
  if verb in WITHOUT_WORKDIR:
    return command.run(config)
  if not WORKDIR.value:
    raise InputError("--workdir is missing; name the folder of the run")
  distributed.initialize(DISTRIBUTED.value)
  with storage.Synced(WORKDIR.value) as folder, Workdir(folder, config) as workdir:
    return command.run(config, workdir)


def parse(argv: list[str]) -> configs.Config:
  """Returns the resolved config of a command line.

  Raises:
    InputError: the config is missing or does not run, or a flag, key or value is wrong.
  """
  named = [arg.partition("=")[2] for arg in argv if arg.startswith("--config=")]
  if not named:
    raise InputError("--config is missing; name a file such as --config=configs/demo.py")
  file = Path(named[-1].partition(":")[0])  # FILE, or FILE:ARGUMENT
  if not file.is_file():
    raise InputError(f"the config {named[-1]} is not there; name a file such as configs/demo.py")
  sys.path.append(str(file.parent))  # it may import its neighbours
  try:
    rest = flags.FLAGS(argv)
    config = CONFIG.value
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    raise InputError(_flag_error(argv, error)) from error
  except (OSError, ImportError, SyntaxError) as error:
    raise InputError(f"the config {named[-1]} does not run: {_one_line(error)}") from error
  if len(rest) > 1:
    raise InputError(f"{rest[1]!r} is neither a verb nor a flag; flags begin with --")
  resolved = configs.resolve(config)
  flags_given: dict[str, Any] = {
    "topology": TOPOLOGY.value,
    "num_slices": NUM_SLICES.value,
    "verb": VERB.value,
  }
  flags_given = {key: value for key, value in flags_given.items() if value is not None}
  return dataclasses.replace(
    resolved,
    profile_steps=PROFILE_STEPS.value or resolved.profile_steps,
    preflight=dataclasses.replace(resolved.preflight, **flags_given),
  )


def summary(verb: str, result: JsonObject) -> str:
  """Returns a result in words for a person, or its numbers, one a line."""
  command = registry.load("commands", verb)
  if "text" in vars(command):
    return command.text(result)
  return "\n".join(f"{name}: {value}" for name, value in result.items())


def _flag_error(argv: list[str], error: Exception) -> str:
  """Returns the message for an error of absl's: the first unknown config key that it names."""
  known = sorted(_dotted_keys(configs.base(), "config"))
  for arg in argv:
    key = arg.lstrip("-").split("=")[0]
    if key.startswith("config.") and key not in known and key.split(".")[-1] in str(error):
      near = difflib.get_close_matches(key, known, 1)
      hint = f"did you mean --{near[0]}?" if near else "see distill_jax/config.py"
      return f"config key {key.removeprefix('config.')!r} is unknown; {hint}"
  return _one_line(error)


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())


def _dotted_keys(tree: ConfigDict, prefix: str) -> Iterator[str]:
  for key, value in tree.items():
    yield f"{prefix}.{key}"
    if isinstance(value, ConfigDict):
      yield from _dotted_keys(value, f"{prefix}.{key}")


if __name__ == "__main__":
  main()
