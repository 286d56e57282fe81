"""`distill-jax VERB --config=FILE --workdir=DIR --config.key=value [--json]`.

Only the standard library is imported at the top. So `--help` and `--version` are fast, and a Python
or jax that is too old is reported before any module that needs a newer one is imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from distill_jax import registry
from distill_jax.errors import InputError, Preempted, Unavailable

if TYPE_CHECKING:
  from distill_jax.config import Config
  from distill_jax.types import JsonObject

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # or read-only
WITHOUT_WORKDIR = ("preflight",)  # writes nothing
WITHOUT_LOCK = ("inspect", "report")  # read a workdir that another command may be using
CONFIG_OF_RUN = ("inspect",)  # take the config of the run in the workdir, unless one is given
WITHOUT_CONFIG = ("completion", "help")  # print a text
OWN_CONFIG = ("distill",)  # makes a config from its flags, unless one is given
HELP_FLAGS = ("--help", "-h", "-help")
PYTHON = (3, 11)
PACKAGES = {"jax": (0, 10, 2), "flax": (0, 12, 8)}  # the oldest versions, as in pyproject.toml


def main(argv: list[str] | None = None) -> None:
  """Runs one command. If it stops early, one sentence on standard error explains why.

  Exit codes: 2, the input cannot be used; 75 (EX_TEMPFAIL of sysexits.h), the run was interrupted
  or a store is unavailable, and the same command resumes it; 1, training diverged.
  """
  argv = list(sys.argv if argv is None else argv)
  try:
    check_versions()
    if (words := help_words(argv[1:])) is not None:
      print_lines(registry.load("commands", words[0]).answer(words[1:]))
      return
    hush_libtpu()
    result = run(argv)
  except InputError as error:
    _stop(2, f"error: {error}")
  except (Preempted, Unavailable) as error:
    _stop(os.EX_TEMPFAIL, str(error))
  except FloatingPointError as error:
    _stop(1, f"error: {error}")
  except OSError as error:
    if error.errno not in DISK_FULL:
      raise
    path, reason = error.filename or "the workdir", error.strerror
    action = "Make room and run again; finished work is kept."
    _stop(2, f"error: {path} cannot be written ({reason}). {action}")
  from distill_jax import flags
  from distill_jax.runtime import distributed

  if distributed.is_process_0():
    print(json.dumps(result) if flags.JSON.value else summary(argv[1], result), flush=True)


def check_versions() -> None:
  """Refuses a Python, jax or flax that is too old.

  Raises:
    InputError: the first of them, with the version that is needed.
  """
  if sys.version_info < PYTHON:
    found = ".".join(map(str, sys.version_info[:3]))
    raise InputError(
      f"Python is {found}; expected {'.'.join(map(str, PYTHON))} or newer. Make a virtual "
      "environment with a newer Python and install distill-jax there."
    )
  for package, oldest in PACKAGES.items():
    wanted = ".".join(map(str, oldest))
    try:
      found = metadata.version(package)
    except metadata.PackageNotFoundError:
      found = "not installed"
    if found == "not installed" or _release(found) < oldest:
      install = f"pip install '{package}>={wanted}'"
      raise InputError(f"{package} is {found}; expected {wanted} or newer. Run `{install}`.")


def _release(version: str) -> tuple[int, ...]:
  """Returns the numbers of a version, e.g. (0, 10, 2) for "0.10.2.dev1"."""
  numbers = []
  for part in version.split("."):
    if not part.isdigit():
      break
    numbers.append(int(part))
  return tuple(numbers)


def help_words(words: list[str]) -> list[str] | None:
  """Returns the words of a request for help, version or completion; None for any other command."""
  if "--version" in words:
    return ["help", "--version"]
  if not words or words[0] in HELP_FLAGS:
    return ["help"]
  if words[0] in WITHOUT_CONFIG:
    return [word for word in words if word not in HELP_FLAGS]
  if any(word in HELP_FLAGS for word in words):
    return ["help", words[0]]
  return None


def print_lines(text: str) -> None:
  """Prints a text, and ends quietly where the reader, such as `head`, closes the pipe early."""
  try:
    print(text, flush=True)
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def hush_libtpu() -> None:
  """Gives libtpu a host name and a kind of TPU on a machine without one, before jax loads it.

  preflight and the tests use libtpu on machines without a TPU, where it would otherwise begin
  every command with six lines of errors about the two.
  """
  if not any(Path("/dev").glob("accel*")) and not Path("/dev/vfio").exists():
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def _stop(code: int, message: str) -> NoReturn:
  """Prints why the command stops, and ends the process."""
  print(message, file=sys.stderr, flush=True)
  if distributed := sys.modules.get("distill_jax.runtime.distributed"):
    distributed.leave(code)  # if it is not imported, there is only one process
  sys.exit(code)


def run(argv: list[str]) -> JsonObject:
  """Parses the command line and runs the command inside its workdir."""
  check_verb(argv[1])
  if argv[1] in OWN_CONFIG and not any(arg.startswith("--config=") for arg in argv):
    return run_configured(registry.load("commands", argv[1]), argv[:1] + argv[2:])
  words = argv[:1] + argv[2:]
  if argv[1] in CONFIG_OF_RUN:
    words[1:1] = config_of_run(words)  # before its overrides
  config = parse(words)  # first, because the imports of a command take seconds
  from distill_jax import flags
  from distill_jax.runtime import compile_cache, distributed, storage
  from distill_jax.runtime.claim import claimed
  from distill_jax.runtime.workdir import Workdir

  command = registry.load("commands", argv[1])
  writes = "needs_workdir" not in vars(command) or command.needs_workdir(config)
  if argv[1] in WITHOUT_WORKDIR or not writes:
    return command.run(config)
  if not flags.WORKDIR.value:
    raise InputError("--workdir is missing. Name the folder of the run, e.g. --workdir=runs/demo.")
  distributed.initialize(flags.DISTRIBUTED.value)
  if argv[1] in WITHOUT_LOCK:
    with storage.Synced(flags.WORKDIR.value, argv[1]) as folder:
      return command.run(config, folder)
  path, part = flags.WORKDIR.value, command.part(config) if "part" in vars(command) else ""
  compile_cache.use(path)
  with (
    claimed(path, part),
    storage.Synced(path, part) as folder,
    Workdir(folder, config, part) as workdir,
  ):
    return command.run(config, workdir)


def config_of_run(argv: list[str]) -> list[str]:
  """Returns the flag with the config of the run in the workdir; [] if the user names a config."""
  from distill_jax import flag_errors

  workdir = flag_errors.value_of("workdir", argv)
  if flag_errors.value_of("config", argv) or not workdir:
    return []
  file = Path(__file__).parent / "runtime" / "config_of_run.py"
  return [f"--config={file}:{workdir}"]


def run_configured(command: Any, argv: list[str]) -> JsonObject:
  """Runs a command that makes its own config from flags, with the overrides of the user."""
  from absl import flags as absl_flags

  from distill_jax import flags
  from distill_jax.runtime import compile_cache, distributed, storage
  from distill_jax.runtime.claim import claimed
  from distill_jax.runtime.workdir import Workdir

  overrides = [arg for arg in argv if arg.startswith("--config.")]
  _read_flags([arg for arg in argv if arg not in overrides])
  for name in ("teacher", "data", "workdir"):
    if not absl_flags.FLAGS[name].value:
      raise InputError(f"--{name} is missing. `distill-jax help distill` explains the flags.")
  distributed.initialize(flags.DISTRIBUTED.value)
  request = command.Request(
    teacher=flags.TEACHER.value,
    student=flags.STUDENT.value,
    data=flags.DATA.value,
    workdir=flags.WORKDIR.value,
    overridden=frozenset(a.split("=")[0].removeprefix("--config.") for a in overrides),
  )
  compile_cache.use(request.workdir)
  with claimed(request.workdir), storage.Synced(request.workdir) as folder:
    config = command.configure(
      request, folder, lambda file: parse([argv[0], f"--config={file}", *overrides])
    )
    with Workdir(folder, config) as workdir:
      return command.run(config, workdir)


def check_verb(verb: str) -> None:
  """Refuses a word that is not a verb, and names the nearest one."""
  verbs = registry.names("commands")
  if verb in verbs:
    return
  near = difflib.get_close_matches(verb, verbs, 1)
  hint = f"Did you mean {near[0]!r}?" if near else "`distill-jax help` explains them."
  if verb.startswith("-"):
    hint = "Put flags after the verb."
  raise InputError(f"{verb!r} is not a verb; expected one of {', '.join(verbs)}. {hint}")


def parse(argv: list[str]) -> Config:
  """Returns the resolved config of a command line.

  Raises:
    InputError: the config is missing or does not run, or a flag, key or value is wrong.
  """
  from absl import flags as absl_flags

  from distill_jax import config as configs
  from distill_jax import flag_errors, flags

  if not (named := flag_errors.value_of("config", argv)):
    raise InputError("--config is missing. Name a file, e.g. --config=configs/demo.py.")
  file = Path(named.partition(":")[0])  # FILE, or FILE:ARGUMENT
  if not file.is_file():
    raise InputError(f"The config {named} does not exist. {_nearest_file(file)}")
  sys.path.append(str(file.parent))  # it may import its neighbours
  for name in [name for name in absl_flags.FLAGS if name.startswith("config.")]:
    delattr(absl_flags.FLAGS, name)  # an override of a config that was read before
  try:
    config = _read_flags(argv)
  except (OSError, ImportError, SyntaxError) as error:
    raise InputError(f"The config {named} does not run: {flag_errors.one_line(error)}.") from error
  resolved = configs.resolve(config)
  flags_given: dict[str, Any] = {
    "topology": flags.TOPOLOGY.value,
    "num_slices": flags.NUM_SLICES.value,
    "verb": flags.VERB.value,
  }
  flags_given = {key: value for key, value in flags_given.items() if value is not None}
  return dataclasses.replace(
    resolved,
    profile_steps=flags.PROFILE_STEPS.value or resolved.profile_steps,
    preflight=dataclasses.replace(resolved.preflight, **flags_given),
  )


def _read_flags(argv: list[str]) -> Any:
  """Sets the flags of a command line; returns the ConfigDict of --config, or None without it.

  Raises:
    InputError: A flag, key or value is wrong, or a word is not a flag.
  """
  from absl import flags as absl_flags

  from distill_jax import flag_errors, flags

  try:
    rest = absl_flags.FLAGS(argv)
    config = flags.CONFIG.value
  except (absl_flags.Error, *flag_errors.RAISED) as error:
    raise InputError(flag_errors.message(argv, error)) from error
  if len(rest) > 1:
    raise InputError(f"{rest[1]!r} is neither a verb nor a flag. Flags begin with --.")
  return config


def summary(verb: str, result: JsonObject) -> str:
  """Returns a result in words for a person, or its numbers, one a line."""
  command = registry.load("commands", verb)
  if "text" in vars(command):
    return command.text(result)
  return "\n".join(f"{name}: {value}" for name, value in result.items())


def _nearest_file(file: Path) -> str:
  """Returns what to do about a config file that does not exist."""
  folders = (file, file.parent, Path("configs"))
  files = (path for folder in folders for path in folder.glob("*.py"))
  there = [str(path) for path in files if not path.name.startswith("_")]
  near = difflib.get_close_matches(str(file), there, 1)
  return f"Did you mean {near[0]}?" if near else "Name a file such as configs/demo.py."


if __name__ == "__main__":
  main()
