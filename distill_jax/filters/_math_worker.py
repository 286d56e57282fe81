"""Compares answers with their keys; a script that reads ["key", "answer"] a line.

Its argument is the CPU seconds that one answer may take: the kernel ends the process (SIGPROF)
after them, wherever sympy is.
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
  """Returns what sympy parses an answer to; [] if it cannot."""
  parsed = parse(f"${answer}$", CONFIG, parsing_timeout=None)
  return [] if all(isinstance(x, str) for x in parsed) else parsed


def compare(key: str, answer: str) -> str:
  """Returns equal | other | key (the key cannot be parsed)."""
  gold = read(key)
  if not gold:
    return "key"
  parsed = read(answer)
  return "equal" if parsed and verify(gold, parsed, timeout_seconds=None) else "other"


def main(seconds: float) -> None:
  logging.disable()  # it warns that its own time limits, which need the main thread, are off
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
