"""A program and its test, in two processes of one sandbox (_jail.py); a script.

The test's process knows the secret that means "passed" and runs nothing of the program: it asks
the program's process to call its function, and what comes back is JSON. So neither what the
interpreter holds nor objects that equal everything are any help to a program. Its arguments are
the descriptors that the job is read from and the report is written to.
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


class Ended(Exception):
  """The program's process is no more."""


class Other(Exception):
  """The program returned what is no plain value."""


def encode(x):
  """Plain values as JSON: subclasses as what they are subclasses of, numpy's as Python's."""
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
  raise TypeError(f"{type(x).__name__} is no plain value")


def decode(x):
  if not isinstance(x, dict):
    return x
  ((name, parts),) = x.items()
  if name == "dict":
    return {decode(k): decode(v) for k, v in parts}
  if name == "complex":
    return complex(*parts)
  return KINDS[name](map(decode, parts))


def serve(calls, replies):
  """The program's process: first the program, then a call of its function for each line."""

  def answer(work):
    try:
      value = work()
    except BaseException as e:
      said = json.dumps(["raised", type(e).__name__])
    else:
      try:
        said = json.dumps(["returned", encode(value)])
      except BaseException:
        said = json.dumps(["other", type(value).__name__])
    print(said, file=replies, flush=True)

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

  answer(define)
  for line in calls:
    args, kwargs = decode(json.loads(line))
    answer(lambda args=args, kwargs=kwargs: names[entry](*args, **kwargs))


def verdict(calls, replies, secret, begins, source, test, entry):
  """What is reported: the secret, or why the program fails."""

  def ask(what):
    try:
      print(json.dumps(what), file=calls, flush=True)
    except BrokenPipeError:
      raise Ended from None
    line = replies.readline()
    if not line.endswith("\n"):
      raise Ended
    kind, said = json.loads(line)
    return kind, said

  def candidate(*args, **kwargs):
    kind, said = ask(encode((list(args), kwargs)))
    if kind == "returned":
      return decode(said)
    if kind == "other":
      raise Other(said)
    known = getattr(builtins, str(said), None)
    if isinstance(known, type) and issubclass(known, BaseException):
      raise known.__new__(known)
    raise type(str(said), (Exception,), {})

  try:
    kind, said = ask([source, entry])
    if kind != "returned":
      return "exited" if said in ("SystemExit", "KeyboardInterrupt") else f"{kind} {said}"
    if said is not True:
      return f"undefined {entry}"
    names: dict[str, Any] = {"__name__": "test"}
    exec(compile(begins, "prompt.py", "exec"), names)
    exec(compile(test, "test.py", "exec"), names)
    names[entry] = candidate
    names["check"](candidate)
  except AssertionError:
    return "asserted"
  except (SystemExit, KeyboardInterrupt):
    return "exited"
  except Ended:
    return "ended"
  except Other as e:
    return f"other {e}"
  except BaseException as e:
    return f"raised {type(e).__name__}"
  return secret


def how_it_ended(child):
  _, status = os.waitpid(child, 0)
  if not os.WIFSIGNALED(status):
    return "exited"
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  seconds, _ = resource.getrlimit(resource.RLIMIT_CPU)
  return "cpu" if used.ru_utime + used.ru_stime > seconds - 0.2 else "killed"


def main(job, report):
  ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # no process looks into another one
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
    said = verdict(os.fdopen(to_program[1], "w"), os.fdopen(to_test[0]), *json.load(f))
  if said == "ended":
    said = how_it_ended(child)
  os.write(report, said.encode("utf-8", "replace"))
  os.kill(child, 9)
  os._exit(0)


if __name__ == "__main__":
  main(int(sys.argv[1]), int(sys.argv[2]))
