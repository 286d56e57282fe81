"""A script that compares answers with their keys.

It reads one JSON array ["key", "answer"] per line and writes one verdict per line. Its argument is
the CPU time limit per line in seconds. A fork of the script, which need not import sympy again,
does the work: the kernel ends it at the limit (SIGPROF), even if sympy never returns to Python.
Then the script writes the verdict "timeout" or "crashed" and forks again.
"""

import json
import logging
import os
import resource
import signal
import sys
from typing import TextIO

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

MEMORY = 4 * 2**30
CONFIG = (LatexExtractionConfig(), ExprExtractionConfig())


def read(answer: str) -> list:
  """Returns an answer as sympy expressions, or [] if it cannot be parsed."""
  parsed = parse(f"${answer}$", CONFIG, parsing_timeout=None)
  return [] if all(isinstance(x, str) for x in parsed) else parsed


def compare(key: str, answer: str) -> str:
  """Returns "equal", "other" (not equal) or "key" (the key cannot be parsed)."""
  gold = read(key)
  if not gold:
    return "key"
  parsed = read(answer)
  return "equal" if parsed and verify(gold, parsed, timeout_seconds=None) else "other"


def serve(seconds: float, answers: TextIO) -> None:
  """Reads lines from standard input and writes a verdict for each."""
  resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  with open(0, encoding="utf-8", closefd=False) as lines:
    for line in lines:
      signal.setitimer(signal.ITIMER_PROF, seconds)
      verdict = compare(*json.loads(line))
      signal.setitimer(signal.ITIMER_PROF, 0)
      print(verdict, file=answers, flush=True)


def main(seconds: float) -> None:
  """Forks processes that serve, until the input ends."""
  logging.disable()  # math-verify warns that its own time limits are off
  answers = sys.stdout
  sys.stdout = sys.stderr
  compare("x", r"\frac{1}{2}")  # loads what sympy and its parsers load at their first use
  print("ready", file=answers, flush=True)
  while True:
    child = os.fork()
    if not child:
      serve(seconds, answers)
      os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and not os.WEXITSTATUS(status):
      return
    timeout = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF
    print("timeout" if timeout else "crashed", file=answers, flush=True)


if __name__ == "__main__":
  main(float(sys.argv[1]))
