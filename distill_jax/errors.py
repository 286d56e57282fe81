"""Errors that the command line reports in one sentence."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any


class InputError(ValueError):
  """A config, file or workdir that cannot be used.

  The message states the problem and what to do about it. Where a config key, a flag or a field of
  a file is at fault it has the form `KEY is VALUE; expected EXPECTED. ACTION.`, which `bad_value`
  writes. The command line prints the message and exits with code 2.
  """


class Preempted(Exception):
  """The machine is being reclaimed. All work is saved; the same command resumes the run."""


class Unavailable(Exception):
  """A store or server that did not become available. Finished work is kept; run again later."""


def bad_value(key: str, value: Any, expected: str, action: str) -> InputError:
  """Returns the error for a key whose value cannot be used.

  Args:
    key: A config key, flag, argument or field, e.g. "train.steps".
    value: The value found. Strings are quoted in the message; paths are not.
    expected: What would be valid, e.g. "a positive integer", without a full stop.
    action: What the user should do, as an imperative without a full stop.

  Example:
    >>> print(bad_value("train.steps", 0, "a positive integer", "Set the number of steps"))
    train.steps is 0; expected a positive integer. Set the number of steps.
  """
  found = str(value) if isinstance(value, Path) else repr(value)
  return InputError(f"{key} is {found}; expected {expected}. {action}.")


def check_choice(key: str, value: Any, choices: Collection[str], action: str) -> None:
  """Raises the error of `bad_value` if the value of a key is not one of the choices.

  Args:
    key: A config key, flag, argument or field.
    value: The value found.
    choices: The valid values.
    action: What the user should do, as an imperative without a full stop.
  """
  if value not in choices:
    raise bad_value(key, value, f"one of {', '.join(choices)}", action)
