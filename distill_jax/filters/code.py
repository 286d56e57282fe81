"""Keeps programs that pass their tests, which run in a sandbox (_jail.py).

Tests have HumanEval's form (arXiv:2107.03374): `prompt` is the beginning of a program that the
sample completes, `test` defines `check(candidate)`, and `entry_point` is the name of the function
to check. Test and program run in two processes (_runner.py). The test sees only plain values that
the program's function returns, and the functions that the prompt defines. Its process reports
success with a secret that the program's process does not know, so exit codes, output and the
interpreter's state cannot fake a pass.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from distill_jax.errors import InputError, bad_value
from distill_jax.filters._base import SampleFilter
from distill_jax.filters.samples import Sample, Unjudgeable, answer_part, prompt_field, text_field

JAIL, RUNNER = (Path(__file__).with_name(name) for name in ("_jail.py", "_runner.py"))
FENCED = re.compile(
  r"^([ \t]*)(?:[^\s`][^`\n]*(?=```(?i:py)))?(`{3,}|~{3,})([^`\n]*)\n"  # "Code: ```python"
  r"(.*?)(?:^(?!\1[ \t])[ \t]*\2[`~]*[ \t]*$|(?:\2)?\Z)",
  re.MULTILINE | re.DOTALL,
)
PYTHON = re.compile(r"[ \t{.]*(?:py(?:thon)?[\d.]*\b.*)?", re.IGNORECASE)  # info string of a block
FUTURE = re.compile(r"^from __future__ import (?:\([^)]*\)|[^\n(]*)$", re.MULTILINE)
SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/alternatives", "/etc/ld.so.cache")
MAX_REPORT = 4096  # maximum length of a program's report, in bytes
ENV = {
  "PATH": "/usr/bin:/bin",
  "LANG": "C.UTF-8",
  "OMP_NUM_THREADS": "1",
  "OPENBLAS_NUM_THREADS": "1",
}


@dataclasses.dataclass(frozen=True)
class Filter(SampleFilter):
  """Rejects programs that fail their tests."""

  prompt: str = "prompt"
  """Field of the prompt's line with the beginning of the program. If it contains chat messages, the
  sample must be the whole program."""
  test: str = "test"
  """Field of the prompt's line with the test, Python code that defines check(candidate)."""
  entry_point: str = "entry_point"
  """Field of the prompt's line with the name of the function to check."""
  cpu_seconds: int = 10
  """CPU time limit of one program, in seconds."""
  wall_seconds: float = 30.0
  """Wall-clock limit of one program, in seconds."""
  memory: int = 2**30
  """Memory limit of one process (its address space), in bytes."""
  processes: int = 4
  """Maximum number of processes and threads of one program."""
  disk: int = 2**24
  """Maximum size of the files that one program writes, in bytes. They are kept in memory and
  deleted with the program."""
  isolated: bool = True
  """True to run programs in Linux namespaces, as a user without rights, without network and
  processes other than their own, and with no files but their own, Python's and /usr; some machines
  do not permit this. False to limit only time, memory and file sizes, for
  programs that you trust."""
  python: str = ""
  """Python interpreter for the programs. "": the running one."""

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, int | float) and field.name != "isolated" and value <= 0:
        raise bad_value(field.name, value, "a positive number", "Increase it")

  def prepare(self) -> str:
    if reason := self.run("def one(): return 1", "def check(f): assert f() == 1", "one"):
      raise InputError(
        f"The sandbox fails on a correct program ({reason}). Raise the limits of the code filter."
      )
    return ""

  def reject_reason(self, sample: Sample) -> str | None:
    test, entry = text_field(sample, self.test), text_field(sample, self.entry_point)
    for part in (test, entry):
      if isinstance(part, Unjudgeable):
        return part
    if not entry.isidentifier():
      return Unjudgeable(f"no {self.entry_point}: {entry!r:.60} is not a Python name")
    try:
      ast.parse(test)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
      return Unjudgeable(f"the test cannot be parsed: {e}")
    prompt = prompt_field(sample, self.prompt)
    prelude = prompt if isinstance(prompt, str) and _parses(prompt) else ""
    return self.run(program(prompt, sample["text"], entry), test, entry, prelude)

  def run(self, source: str, test: str, entry: str, prelude: str = "") -> str | None:
    """Runs a program and its test.

    Args:
      source: The program.
      test: Python code that defines check(candidate).
      entry: The name of the function to check.
      prelude: Code with further definitions for the test, e.g. the prompt's functions.

    Returns:
      The reason why the program fails, or None if check(candidate) returns without an error.

    Raises:
      InputError: If the sandbox cannot be created on this machine.
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
        limits |= {"runner": RUNNER.read_text(), **visible(self.python or sys.executable)}
        try:
          ended = self._jail(limits, job_file.fileno(), report_to)
        finally:
          os.close(report_to)
          os.set_blocking(report_from, False)
          try:
            report = os.read(report_from, MAX_REPORT).decode(errors="replace")
          except BlockingIOError:  # a process of the program is still running
            report = ""
          os.close(report_from)
    if report == secret:
      return None
    if report == "cpu":
      return f"timeout: {self.cpu_seconds} s of CPU time"
    return ended or _reason(report)

  def _jail(self, limits: dict[str, Any], *fds: int) -> str:
    """Runs the sandbox until the program ends or is killed.

    Returns:
      The reason why the program was killed, or "" if it ended by itself.
    """
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
      return f"timeout: {self.wall_seconds} s of wall-clock time"
    finally:
      if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    if process.returncode == 125:
      raise InputError(
        f"The sandbox cannot be created ({error.decode(errors='replace').strip()[-200:]}). Use a "
        "machine that permits Linux namespaces or, for programs that you trust, set isolated=False."
      )
    if process.returncode == 124:
      return f"timeout: {self.cpu_seconds} s of CPU time"
    return "killed" if process.returncode else ""


@functools.cache
def visible(python: str) -> dict[str, Any]:
  """Returns what a program may read: SYSTEM, and the folders in which its Python is installed.

  Args:
    python: The command of the interpreter.

  Returns:
    `python`, the path of the interpreter; `visible`, the paths that may be read; and `links`, the
    symbolic links that lead to them, as pairs (path, target).

  Raises:
    InputError: The interpreter does not run.
  """
  script = "import json, sys; print(json.dumps([sys.executable, sys.prefix, sys.base_prefix]))"
  try:
    found = subprocess.run([python, "-I", "-c", script], env=ENV, capture_output=True, check=True)
  except (OSError, subprocess.CalledProcessError) as e:
    raise bad_value("python", python, "a Python interpreter that runs", "Correct the path") from e
  executable, *prefixes = json.loads(found.stdout)
  links: dict[str, str] = {}
  places = {_follow(path, links) for path in (*SYSTEM, *prefixes)}
  places = {place for place in places if Path(place).exists() and place != "/"}
  _follow(executable, links)
  outer = [p for p in places if not any(p.startswith(f"{other}/") for other in places)]
  inside = tuple(f"{place}/" for place in outer)
  needed = [(path, target) for path, target in links.items() if not path.startswith(inside)]
  return {"python": executable, "visible": sorted(outer), "links": sorted(needed)}


def _follow(path: str, links: dict[str, str]) -> str:
  """Returns a path without symbolic links; adds the links that it meets, with their targets."""
  place, parts = Path("/"), [*Path(path).parts]
  while parts:
    part, *parts = parts
    place = place.parent if part == ".." else place / part
    if place.is_symlink():
      target = place.readlink()
      links[str(place)] = str(target)
      place, parts = place.parent, [*target.parts, *parts]
  return str(place)


def program(prompt: Any, text: str, entry: str) -> str:
  """Returns the whole program of a sample.

  Its code is the last Python block that defines `entry`, else the last Python block, else the whole
  answer; see `python_blocks`. The prompt is put before it, except if the prompt is not code and the
  sample defines `entry` itself.

  Args:
    prompt: The beginning of the program; ignored unless it is a string.
    text: The sample's text, with or without reasoning.
    entry: The name of the function to check.
  """
  answer = answer_part(text)
  blocks = python_blocks(answer)
  whole = [block for block in blocks if _defines(block, entry)]
  source = [answer, *blocks, *whole][-1]
  prompt = prompt if isinstance(prompt, str) else ""
  if _defines(source, entry):  # the program may still use the prompt's imports and definitions
    return _joined(prompt, source) if _parses(prompt) else source
  return prompt + source


def python_blocks(text: str) -> list[str]:
  """Returns the contents of a text's fenced blocks that are Python or name no language.

  Fences are lines of at least three backticks or tildes; "```python" may also end another line. The
  indentation of the opening fence is removed from its block, e.g. in a list; fences that are
  indented further belong to the block.
  """
  found = []
  for indent, _, info, block in FENCED.findall(text.replace("\r\n", "\n").rstrip()):
    lines = block.split("\n")
    if all(line.startswith(indent) or not line.strip() for line in lines):
      block = "\n".join(line.removeprefix(indent) for line in lines)
    if PYTHON.fullmatch(info):
      found.append(block)
  return found


def _joined(prompt: str, source: str) -> str:
  """Returns two parts of a program as one, with the __future__ imports of both at its beginning."""
  whole = f"{prompt}\n{source}"
  if not FUTURE.search(source):
    return whole
  return "\n".join([*FUTURE.findall(whole), FUTURE.sub("", whole)])


def _defines(source: str, entry: str) -> bool:
  return bool(re.search(rf"^(?:async\s+)?(?:def|class)\s+{re.escape(entry)}\b", source, re.M))


def _parses(source: str) -> bool:
  try:
    ast.parse(source)
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return False
  return True


def _reason(report: str) -> str:
  """Returns the reason to reject a sample, given _runner.py's report."""
  kind, _, detail = report.partition(" ")
  return {
    "asserted": "failed the test",
    "unparsed": f"not Python: {detail}",
    "undefined": f"does not define the entry point: {detail}",
    "other": f"returned a value that is not plain: {detail}",
    "raised": f"raised: {detail}",
    "killed": "killed",
  }.get(kind, "exited before the test finished")
