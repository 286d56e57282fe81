"""A script that compares answers with their keys.

It reads one JSON array ["key", "answer"] per line and writes one verdict per line. Its argument is
the CPU time limit per line in seconds: the kernel ends the process at the limit (SIGPROF), even if
sympy never returns to Python.
"""

import json
import logging
import resource
import signal
import sys

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


def main(seconds: float) -> None:
  """Reads lines from standard input and writes a verdict for each to standard output."""
  logging.disable()  # math-verify warns that its own time limits are off
  resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  answers = sys.stdout
  sys.stdout = sys.stderr
  print("ready", file=answers, flush=True)
  for line in sys.stdin:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    verdict = compare(*json.loads(line))
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(verdict, file=answers, flush=True)


if __name__ == "__main__":
  main(float(sys.argv[1]))
