"""Retries of requests to a store or server, with growing delays.

Each retry is reported on standard error. Errors that cannot pass, such as a missing file or refused
access, are raised at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from distill_jax.errors import InputError, Unavailable

RETRY_SECONDS = float(os.environ.get("DISTILL_JAX_RETRY_SECONDS", "600"))
MAX_DELAY = 30.0  # longest time between two tries, in seconds
NETWORK_PACKAGES = {
  "aiobotocore",
  "aiohttp",
  "botocore",
  "gcsfs",
  "google",
  "httpcore",
  "httpcore2",
  "httpx",
  "httpx2",
  "huggingface_hub",
  "requests",
  "urllib3",
}
LOCAL_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE)
REFUSED = ("forbidden", "unauthorized", "access denied", "accessdenied", "permission denied")
# Statuses in the texts of tensorstore's and XLA's errors that do not mean damage.
PASSING = ("DEADLINE_EXCEEDED", "UNAVAILABLE")
REFUSALS = ("PERMISSION_DENIED", "UNAUTHENTICATED")
OTHER_CAUSES = (*PASSING, *REFUSALS, "RESOURCE_EXHAUSTED")
NOT_PASSING = (
  FileExistsError,
  FileNotFoundError,
  IsADirectoryError,
  NotADirectoryError,
  PermissionError,
)
GATED = (
  "If the repository is gated or private, accept its terms on the Hub and set the environment "
  "variable HF_TOKEN to a token of that account"
)
Result = TypeVar("Result")


def retry(failure: str, fn: Callable[[], Result]) -> Result:
  """Returns fn(), which is called again after errors that may pass.

  Args:
    failure: A clause that names the failure, e.g. "gs://b/x cannot be read".
    fn: The function.

  Raises:
    InputError: The store refuses access.
    Unavailable: The error has not passed after RETRY_SECONDS.
  """
  started, delay = time.monotonic(), 0.5
  while True:
    try:
      return fn()
    except Exception as e:
      if is_refused(e):
        raise refused(failure, e) from e
      if not may_pass(e):
        raise
      if time.monotonic() - started + delay > RETRY_SECONDS:
        raise Unavailable(
          f"{failure} ({reason(e)}); {RETRY_SECONDS:.0f} seconds of retries have not helped. Run "
          "the command again when the store is available; finished work is kept."
        ) from e
      print(f"{failure} ({reason(e)}). The next try is in {delay:.1f} s.", file=sys.stderr)
      time.sleep(delay * random.uniform(0.8, 1.2))  # so that hosts do not retry in step
      delay = min(2 * delay, MAX_DELAY)


def status_of(e: BaseException) -> int:
  """Returns the HTTP status of an exception; 0 if it has none."""
  for holder in (e, getattr(e, "response", None)):
    for name in ("code", "status", "status_code"):
      value = getattr(holder, name, None)
      if isinstance(value, (int, str)) and str(value).isdigit():
        return int(value)
  return 0


def is_refused(e: BaseException) -> bool:
  """Returns True for an exception that means missing credentials or permissions."""
  if isinstance(e, (InputError, *NOT_PASSING)):
    return isinstance(e, PermissionError)
  text = str(e).lower()
  return status_of(e) in (401, 403) or (isinstance(e, OSError) and text.startswith(REFUSED))


def refused(failure: str, e: BaseException) -> InputError:
  """Returns the error for a store that refuses access; see `retry`."""
  action = GATED if failure.startswith("hf://") else "Check the address and your credentials"
  return InputError(f"{failure}: the store refuses access ({reason(e)}). {action}.")


def may_pass(e: BaseException) -> bool:
  """Returns True for errors of the network or of a busy server."""
  if isinstance(e, (InputError, Unavailable, *NOT_PASSING)):
    return False
  if isinstance(e, OSError) and e.errno in LOCAL_FAULTS:
    return False
  status = status_of(e)
  if 400 <= status < 500:
    return status in (408, 425, 429)
  package = type(e).__module__.partition(".")[0]
  return isinstance(e, (OSError, EOFError)) or package in NETWORK_PACKAGES


def has_other_cause(e: BaseException, path: str) -> bool:
  """Returns True for an error of reading that an undamaged file can have.

  Args:
    e: The error.
    path: The path or URL of the file.
  """
  if any(status in str(e) for status in OTHER_CAUSES) or is_refused(e):
    return True
  if isinstance(e, OSError) and e.errno in LOCAL_FAULTS:
    return True
  return isinstance(e, MemoryError) or ("://" in path and may_pass(e))


@contextlib.contextmanager
def store_errors(failure: str, path: str) -> Iterator[None]:
  """Context manager for a library that reads or writes a store, and retries itself.

  It changes no errors if the path is not a URL.

  Args:
    failure: A clause that names the failure; see `retry`.
    path: The path or URL.

  Raises:
    InputError: The store refuses access.
    Unavailable: The block raised an error that may pass.
  """
  try:
    yield
  except (InputError, Unavailable):
    raise
  except Exception as e:
    cause: BaseException | None = e if "://" in path else None
    while cause is not None:
      if is_refused(cause) or _has_status(cause, REFUSALS):
        raise refused(failure, cause) from e
      if may_pass(cause) or _has_status(cause, PASSING) or _is_busy(cause):
        raise Unavailable(
          f"{failure} ({reason(cause)}). Run the command again when the store is available; "
          "finished work is kept."
        ) from e
      cause = cause.__cause__
    raise


def _has_status(e: BaseException, statuses: tuple[str, ...]) -> bool:
  return any(status in str(e) for status in statuses)


def _is_busy(e: BaseException) -> bool:
  """Returns True for tensorstore's error of a store with too many requests.

  XLA's error for the memory of a device has the same status, and is a RuntimeError.
  """
  return isinstance(e, ValueError) and "RESOURCE_EXHAUSTED" in str(e)


def reason(e: BaseException) -> str:
  """Returns the text of an exception on one line."""
  return " ".join(str(e).split())[:200].rstrip(".") or type(e).__name__
