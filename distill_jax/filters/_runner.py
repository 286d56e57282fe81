"""A script that runs a program and its test in two processes of one sandbox (_jail.py).

The test's process knows the secret that means "passed" and runs no code of the program. It requests
calls of the program's function from the program's process and receives the results as JSON. So a
program cannot pass by reading the interpreter's memory or by returning objects that equal
everything. The script's arguments are two file descriptors: it reads the job from the first and
writes the report to the second.
"""

import builtins
import ctypes
import json
import os
import resource
import sys
from typing import Any

PR_SET_DUMPABLE = 4
SCALARS = (bool, int, float, str)
KINDS: dict[str, Any] = {kind.__name__: kind for kind in (list, tuple, set, frozenset, bytes)}


class ProgramEnded(Exception):
  """The program's process has ended."""


class NotPlain(Exception):
  """The program returned something that is not a plain value."""


def encode(x):
  """Returns a plain value in a form for JSON that keeps its type.

  Instances of subclasses become instances of the base class, and numpy values Python values.

  Raises:
    TypeError: If the value is not plain.
  """
  if hasattr(x, "tolist"):
    x = x.tolist()
  if x is None:
    return None
  for scalar in SCALARS:
    if isinstance(x, scalar):
      return scalar(x)
  if isinstance(x, dict):
    return {"dict": [[encode(k), encode(v)] for k, v in x.items()]}
  if isinstance(x, complex):
    return {"complex": [x.real, x.imag]}
  for name, kind in KINDS.items():
    if isinstance(x, kind):
      return {name: [encode(y) for y in x]}
  raise TypeError(f"{type(x).__name__} is not a plain value")


def decode(x):
  """Returns the plain value that `encode` encoded."""
  if not isinstance(x, dict):
    return x
  ((name, parts),) = x.items()
  if name == "dict":
    return {decode(k): decode(v) for k, v in parts}
  if name == "complex":
    return complex(*parts)
  return KINDS[name](map(decode, parts))


def serve(calls, replies):
  """Runs the program and then calls its function once per line of `calls`.

  This is the main function of the program's process.
  """

  def reply(function, *args, **kwargs):
    try:
      value = function(*args, **kwargs)
    except BaseException as e:
      line = json.dumps(["raised", type(e).__name__])
    else:
      try:
        line = json.dumps(["returned", encode(value)])
      except BaseException:
        line = json.dumps(["other", type(value).__name__])
    print(line, file=replies, flush=True)

  source, entry = json.loads(calls.readline())
  names: dict[str, Any] = {"__name__": "sample"}
  try:
    code = compile(source, "sample.py", "exec")
  except (SyntaxError, ValueError) as e:
    print(json.dumps(["unparsed", str(e)[:200]]), file=replies, flush=True)
    return

  def define():
    exec(code, names)
    return entry in names

  def call(args, kwargs):
    return names[entry](*args, **kwargs)

  reply(define)
  for line in calls:
    reply(call, *decode(json.loads(line)))


def verdict(calls, replies, secret, prelude, source, test, entry):
  """Runs the test in its own process.

  Returns:
    The report: the secret if the program passes, else the reason why it fails.
  """

  def send(request):
    try:
      print(json.dumps(request), file=calls, flush=True)
    except BrokenPipeError:
      raise ProgramEnded from None
    line = replies.readline()
    if not line.endswith("\n"):
      raise ProgramEnded
    kind, result = json.loads(line)
    return kind, result

  def candidate(*args, **kwargs):
    kind, result = send(encode((list(args), kwargs)))
    if kind == "returned":
      return decode(result)
    if kind == "other":
      raise NotPlain(result)
    known = getattr(builtins, str(result), None)  # the name of an exception
    if isinstance(known, type) and issubclass(known, BaseException):
      raise known.__new__(known)
    raise type(str(result), (Exception,), {})

  try:
    kind, result = send([source, entry])
    if kind != "returned":
      return "exited" if result in ("SystemExit", "KeyboardInterrupt") else f"{kind} {result}"
    if result is not True:
      return f"undefined {entry}"
    names: dict[str, Any] = {"__name__": "test"}
    exec(compile(prelude, "prompt.py", "exec"), names)
    exec(compile(test, "test.py", "exec"), names)
    names[entry] = candidate
    names["check"](candidate)
  except AssertionError:
    return "asserted"
  except (SystemExit, KeyboardInterrupt):
    return "exited"
  except ProgramEnded:
    return "ended"
  except NotPlain as e:
    return f"other {e}"
  except BaseException as e:
    return f"raised {type(e).__name__}"
  return secret


def how_it_ended(child):
  """Returns how the program's process ended: "exited", "cpu" or "killed"."""
  _, status = os.waitpid(child, 0)
  if not os.WIFSIGNALED(status):
    return "exited"
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  seconds, _ = resource.getrlimit(resource.RLIMIT_CPU)
  return "cpu" if used.ru_utime + used.ru_stime > seconds - 0.2 else "killed"


def main(job, report):
  """Forks the program's process, runs the test, and writes the report."""
  ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # a process cannot inspect another one
  to_program, to_test = os.pipe(), os.pipe()
  child = os.fork()
  if not child:
    for fd in (job, report, to_program[1], to_test[0]):
      os.close(fd)
    serve(os.fdopen(to_program[0]), os.fdopen(to_test[1], "w"))
    os._exit(0)
  os.close(to_program[0])
  os.close(to_test[1])
  with os.fdopen(job) as f:
    outcome = verdict(os.fdopen(to_program[1], "w"), os.fdopen(to_test[0]), *json.load(f))
  if outcome == "ended":
    outcome = how_it_ended(child)
  os.write(report, outcome.encode("utf-8", "replace"))
  os.kill(child, 9)
  os._exit(0)


if __name__ == "__main__":
  main(int(sys.argv[1]), int(sys.argv[2]))
