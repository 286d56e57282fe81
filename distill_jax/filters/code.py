"""Programs that pass their tests, run in a sandbox (_jail.py).

Tests have HumanEval's form: `prompt` begins a program that the sample ends, `test` defines
check(candidate), and `entry_point` names what is checked. Test and program run in two processes
(_runner.py): the test sees what the program's function returns, plain values alone, and what the
prompt defines, and the verdict is a secret that only its process knows. Exit codes, prints, and
whatever a program finds in its interpreter count for nothing.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from distill_jax.errors import InputError
from distill_jax.filters import _base
from distill_jax.filters.samples import (
  Judged,
  Sample,
  Unjudgeable,
  answer_part,
  judge_in_parallel,
  text_field,
)
from distill_jax.types import JsonObject

JAIL, RUNNER = (Path(__file__).with_name(name) for name in ("_jail.py", "_runner.py"))
FENCE = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
MAX_REPORT = 4096  # bytes that are read of a program's report
ENV = {
  "PATH": "/usr/bin:/bin",
  "LANG": "C.UTF-8",
  "OMP_NUM_THREADS": "1",
  "OPENBLAS_NUM_THREADS": "1",
}


@dataclasses.dataclass(frozen=True)
class Filter(_base.Filter):
  """Rejects programs that fail their tests.

  Attributes:
    prompt, test, entry_point: fields of the prompt's line. A prompt of chat messages begins no
      program.
    cpu_seconds, wall_seconds: of one program.
    memory: bytes of address space of one process.
    processes: and threads, at once.
    disk: bytes of files, which are in memory and go with the program.
    isolated: no network, no files but its own, no processes of others: Linux namespaces, which
      some machines permit to nobody. False: time, memory and size of files are limited, nothing
      else is: for programs that you trust.
    python: the interpreter; "": this one.
    workers: programs at once.
  """

  prompt: str = "prompt"
  test: str = "test"
  entry_point: str = "entry_point"
  cpu_seconds: int = 10
  wall_seconds: float = 30.0
  memory: int = 2**30
  processes: int = 4
  disk: int = 2**24
  isolated: bool = True
  python: str = ""
  workers: int = 2

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, int | float) and field.name != "isolated" and value <= 0:
        raise InputError(f"a code filter's {field.name} is {value}; it is above 0")

  def select(self, samples: Iterable[Sample]) -> Iterator[Judged]:
    if reason := self.run("def one(): return 1", "def check(f): assert f() == 1", "one"):
      raise InputError(
        f"the sandbox does not run a program that is right ({reason}); set other limits"
      )
    yield from judge_in_parallel(self._reject_reason, samples, self.workers)

  def _reject_reason(self, sample: Sample) -> str | None:
    test, entry = text_field(sample, self.test), text_field(sample, self.entry_point)
    for part in (test, entry):
      if isinstance(part, Unjudgeable):
        return part
    if not entry.isidentifier():
      return Unjudgeable(f"no {self.entry_point}: {entry!r:.60} is no name")
    try:
      ast.parse(test)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
      return Unjudgeable(f"the test cannot be parsed: {e}")
    prompt = sample["prompt"] if self.prompt == "prompt" else text_field(sample, self.prompt)
    prelude = prompt if isinstance(prompt, str) and _parses(prompt) else ""
    return self.run(program(prompt, sample["text"], entry), test, entry, prelude)

  def run(self, source: str, test: str, entry: str, prelude: str = "") -> str | None:
    """Runs a program and its test. Returns why it fails; None where check(entry) returns.

    Args:
      source: the program.
      test: defines check(candidate).
      entry: the name of the function that is checked.
      prelude: defines what the test may use too, such as the prompt's functions.

    Raises:
      InputError: the sandbox cannot be made on this machine.
    """
    secret = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="distill-jax-") as folder:
      Path(folder).chmod(0o755)
      job = Path(folder) / "job.json"
      job.write_text(json.dumps([secret, prelude, source, test, entry]))
      report_from, report_to = os.pipe()
      with job.open("rb") as job_file:
        job.unlink()
        limits = dataclasses.asdict(self) | {
          "folder": folder,
          "fds": [job_file.fileno(), report_to],
        }
        limits |= {"python": self.python or sys.executable, "runner": RUNNER.read_text()}
        try:
          ended = self._jail(limits, job_file.fileno(), report_to)
        finally:
          os.close(report_to)
          os.set_blocking(report_from, False)
          try:
            report = os.read(report_from, MAX_REPORT).decode(errors="replace")
          except BlockingIOError:  # some process of the program is still there
            report = ""
          os.close(report_from)
    if report == secret:
      return None
    if report == "cpu":
      return f"timeout: {self.cpu_seconds} s of computing"
    return ended or _reason(report)

  def _jail(self, limits: JsonObject, *fds: int) -> str:
    """Runs the program to its end, whatever it does. Returns how it was ended, or ""."""
    process = subprocess.Popen(
      [sys.executable, "-I", "-S", str(JAIL), json.dumps(limits)],
      pass_fds=fds,
      env=ENV,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      start_new_session=True,
    )
    try:
      _, error = process.communicate(timeout=self.wall_seconds)
    except subprocess.TimeoutExpired:
      return f"timeout: {self.wall_seconds} s of the clock"
    finally:
      if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    if process.returncode == 125:
      raise InputError(
        f"the sandbox cannot be made here ({error.decode(errors='replace').strip()[-200:]}); run "
        "where namespaces are permitted, or, for programs that you trust, set isolated=False"
      )
    if process.returncode == 124:
      return f"timeout: {self.cpu_seconds} s of computing"
    return "killed" if process.returncode else ""


def program(prompt: Any, text: str, entry: str) -> str:
  """Returns the whole program of a sample: its last block of Python, or else all of its text."""
  answer = answer_part(text)
  blocks = FENCE.findall(answer)
  whole = [block for block in blocks if _defines(block, entry)]
  source = [answer, *blocks, *whole][-1]
  prompt = prompt if isinstance(prompt, str) else ""
  if _defines(source, entry):  # what the prompt imports and defines is still wanted, if it is code
    return f"{prompt}\n{source}" if _parses(prompt) else source
  return prompt + source


def _defines(source: str, entry: str) -> bool:
  return bool(re.search(rf"^(?:async\s+)?(?:def|class)\s+{re.escape(entry)}\b", source, re.M))


def _parses(source: str) -> bool:
  try:
    ast.parse(source)
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return False
  return True


def _reason(report: str) -> str:
  """Returns the reason to reject a sample, of _runner.py's report."""
  kind, _, detail = report.partition(" ")
  return {
    "asserted": "failed the test",
    "unparsed": f"not Python: {detail}",
    "undefined": f"does not define what is checked: {detail}",
    "other": f"returned no plain value: {detail}",
    "raised": f"raised: {detail}",
    "killed": "killed",
  }.get(kind, "ended before the check was done")
