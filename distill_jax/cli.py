"""`distill-jax VERB --config=FILE --workdir=DIR --config.key=value [--json]`."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from distill_jax import config as configs
from distill_jax import registry
from distill_jax.errors import InputError, Preempted
from distill_jax.runtime import distributed, storage
from distill_jax.runtime.workdir import Workdir

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # disks that take no more
WITHOUT_WORKDIR = ("preflight",)  # writes nothing
CONFIG = config_flags.DEFINE_config_file("config", None, "the config file, as configs/demo.py")
WORKDIR = flags.DEFINE_string("workdir", None, "the folder of the run")
DISTRIBUTED = flags.DEFINE_string(
  "distributed", "", "joins the processes of a run: 'auto', or HOST:PORT,COUNT,INDEX"
)
PROFILE = flags.DEFINE_string("profile_steps", "", "profiles steps FIRST to END-1, as 10:13")
TOPOLOGY = flags.DEFINE_string("topology", "", "preflight: of TPUs, as v5p:4x4x4")
SLICES = flags.DEFINE_integer("num_slices", 1, "preflight: so many slices of that topology")
VERB = flags.DEFINE_string("verb", "train", "preflight: of train or of record")
JSON = flags.DEFINE_bool("json", False, "print one JSON object as the last line")


def main(argv: list[str] | None = None) -> None:
  """Runs one verb; one sentence says why it stops before its end.

  Exit code 2: the input cannot be used. 75: told to stop, run me again (EX_TEMPFAIL of
  sysexits.h). 1: training has gone wrong.
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
    if error.errno not in FULL:
      raise
    where = error.filename or WORKDIR.value
    why = f"error: {where} cannot be written ({error.strerror}); make room and run again: what is"
    sys.exit(_stop(2, f"{why} finished is kept"))
  if distributed.is_process_0():
    print(json.dumps(result) if JSON.value else summary(argv[1], result), flush=True)


def hush_libtpu() -> None:
  """Where there is no TPU, tells libtpu a host and a kind, before jax loads it.

  preflight and the tests want libtpu on machines without a TPU, and there it would start
  every command with six lines of errors about these two.
  """
  if not any(Path("/dev").glob("accel*")) and not Path("/dev/vfio").exists():
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def _stop(code: int, why: str) -> int:
  print(why, file=sys.stderr, flush=True)
  return code


def run(argv: list[str]) -> dict[str, Any]:
  """Parses the command line and calls the verb inside its workdir."""
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
  """The resolved config of a command line; a wrong flag, key or value is refused."""
  named = [a.partition("=")[2] for a in argv if a.startswith("--config=")]
  if not named:
    raise InputError("--config is missing; name a file such as --config=configs/demo.py")
  if not Path(named[-1].partition(":")[0]).is_file():
    raise InputError(f"the config {named[-1]} is not there; name a file such as configs/demo.py")
  sys.path.append(str(Path(named[-1].partition(":")[0]).parent))  # it may import its neighbours
  try:
    rest = flags.FLAGS(argv)
    given = CONFIG.value
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    raise InputError(_flag_error(argv, error)) from error
  except (OSError, ImportError, SyntaxError) as error:
    raise InputError(f"the config {named[-1]} does not run: {_one_line(error)}") from error
  if len(rest) > 1:
    raise InputError(f"{rest[1]!r} is neither a verb nor a flag; flags begin with --")
  asked = configs.PreflightOptions(TOPOLOGY.value, SLICES.value, VERB.value)
  return dataclasses.replace(configs.resolve(given), profile_steps=PROFILE.value, preflight=asked)


def summary(verb: str, result: dict[str, Any]) -> str:
  """The numbers of a result, a line each, for a person."""
  command = registry.load("commands", verb)
  if "text" in vars(command):
    return command.text(result)
  return "\n".join(f"{name}: {value}" for name, value in result.items())


def _flag_error(argv: list[str], error: Exception) -> str:
  known = sorted(_keys(configs.base(), "config"))
  for arg in argv:
    key = arg.lstrip("-").split("=")[0]
    if key.startswith("config.") and key not in known and str(error).find(key.split(".")[-1]) >= 0:
      near = difflib.get_close_matches(key, known, 1)
      hint = f"did you mean --{near[0]}?" if near else "see distill_jax/config.py"
      return f"config key {key.removeprefix('config.')!r} is unknown; {hint}"
  return _one_line(error)


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())


def _keys(tree: Any, at: str):
  for key, value in tree.items():
    yield f"{at}.{key}"
    if hasattr(value, "items"):
      yield from _keys(value, f"{at}.{key}")


if __name__ == "__main__":
  main()
