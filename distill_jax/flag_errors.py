"""Messages for what absl, ml_collections and config files raise."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

from distill_jax import config_reference as reference
from distill_jax.errors import InputError

RAISED = (  # by flags, by a ConfigDict, or by the mistakes in a config file
  ArithmeticError,
  AssertionError,
  AttributeError,
  LookupError,
  NameError,
  TypeError,
  ValueError,
)


def value_of(flag: str, argv: list[str]) -> str:
  """Returns the last value of a flag on a command line; "" without one."""
  pairs = zip(argv, [*argv[1:], ""], strict=True)
  named = [after for arg, after in pairs if arg == f"--{flag}"]
  named += [arg.partition("=")[2] for arg in argv if arg.startswith(f"--{flag}=")]
  return named[-1] if named else ""


def message(argv: list[str], error: Exception) -> str:
  """Returns the message for an error of a command line: the first key or value that it names."""
  text = " ".join(map(str, error.args)) or str(error)
  file = Path(value_of("config", argv).partition(":")[0])
  if (found := _in_config_file(file, error)) is not None:
    return found
  for arg in argv:
    key, _, value = arg.removeprefix("--config.").partition("=")
    if not arg.startswith("--config.") or not any(part in text for part in key.split(".")):
      continue
    if (found := _of_override(key, value, text)) is not None:
      return found
  if "get_config" in text:
    return "The config file has no function get_config. Start from a file such as configs/demo.py."
  if unknown := re.match(r"Unknown command line flag '([^']*)'(?:.*: (\w+))?", text):
    hint = f"Did you mean --{unknown[2]}?" if unknown[2] else "`distill-jax help` lists the flags."
    return f"--{unknown[1]} is not a flag. {hint}"
  return one_line(error)


def one_line(error: object) -> str:
  """Returns the text of an error without line ends."""
  return " ".join(str(error).split())


def _of_override(key: str, value: str, text: str) -> str | None:
  """Returns the message for --config.KEY=VALUE; None if the error is about something else."""
  field = reference.settable(key)
  if field is None:
    near = reference.nearest_setting(key)
    hint = f"Did you mean --config.{near}?" if near else "`distill-jax help config` lists keys."
    if key.startswith("losses.") and not near:
      entry, _, name = key.rpartition(".")
      setting = f'--config.{entry}.parameters="{{{name!r}: {value}}}"'
      hint = f"A parameter of the divergence is set by {setting}."
    return f"Config key {key!r} does not exist. {hint}"
  if f"--config.{key}=" in text:
    if "dots in field names" in text:
      return f"{key} is {value!r}; expected names without dots. Rename the entry."
    kind = reference.type_of(field)
    return f"{key} is {value!r}; expected {kind}. `distill-jax help {key}` explains it."
  entry = key.rpartition(".")[0]
  if f"'{entry.rpartition('.')[2]}'" in text:  # a key of an entry that the config lacks
    hint = _meant(text).rstrip() or "The config file names the entries."
    return f"Config key {key!r} does not exist: the config has no entry {entry!r}. {hint}"
  return None


def _in_config_file(file: Path, error: BaseException) -> str | None:
  """Returns the message for an error that a config file raised; None for another error."""
  found: tuple[BaseException, traceback.FrameSummary] | None = None
  cause: BaseException | None = error
  while cause is not None:  # ml_collections and absl replace the first error
    frames = traceback.extract_tb(cause.__traceback__)
    if lines := [frame for frame in frames if _is_in_folder(frame.filename, file)]:
      found = cause, lines[-1]
    cause = cause.__context__
  if found is None:
    return None
  first, frame = found
  if isinstance(first, InputError):
    return str(first)
  where, line, text = f"line {frame.lineno} of {frame.filename}", frame.line or "", str(first)
  kind = re.search(r"cannot be casted to type <class '(?:\w+\.)*(\w+)'>", text)
  if kind and (setting := re.match(r"\w+\.([\w.]+) = (.+)", line)):
    expected = reference.TYPE_NAMES.get(kind[1], "a section with keys")
    return f"{setting[1]} is {setting[2]}; expected {expected}. Correct {where}."
  if isinstance(first, AttributeError) and isinstance(first.args[0], KeyError):  # of a ConfigDict
    name = str(first.args[0].args[0]).split("'")[1]
    dotted = re.search(rf"\w+\.((\w+\.)*{name})\b", line)
    entry = dotted[1] if dotted else name
    return f"The config has no entry {entry}. {_meant(text)}Correct {where}."
  reason = f"{type(first).__name__}: {text}"
  return one_line(f"The config {file} does not run: {reason.rstrip('.')} ({where}).")


def _is_in_folder(file: str, config: Path) -> bool:
  """Returns True for a config file and for the files next to it, which it may import."""
  return Path(file).resolve().parent == config.resolve().parent


def _meant(text: str) -> str:
  """Returns the suggestion in a message of ml_collections, with a space; "" without one."""
  named = re.search(r'Did you mean "(\w+)"', text)
  return f"Did you mean {named[1]!r}? " if named else ""
