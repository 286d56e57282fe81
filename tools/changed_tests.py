"""Runs the tests of the files that differ from main: `tools/changed_tests.py COMMAND...`.

A file of the package has the tests of the same path: for distill_jax/nn/fused_head.py, all of
tests/nn/test_fused_head*.py. If it has no such tests, all tests of its folder run. A changed test
file is run itself. A changed helper of the tests, such as tests/tiny.py, runs the files that
import it.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def changed_files(root: Path = ROOT, base: str = "main") -> list[str]:
  """Returns the files that differ from the branch point of `base`, new files included."""

  def git(*args):
    done = subprocess.run(["git", *args], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()

  known = subprocess.run(
    ["git", "rev-parse", "--verify", "-q", base], cwd=root, capture_output=True
  )
  start = git("merge-base", base if known.returncode == 0 else f"origin/{base}", "HEAD")[0]
  return git("diff", "--name-only", start) + git("ls-files", "--others", "--exclude-standard")


def tests_of(path: str, tests: list[str], text=lambda path: (ROOT / path).read_text()) -> set[str]:
  """Returns the test files to run for a changed file.

  Args:
    path: the changed file, relative to the root.
    tests: all test files, relative to the root.
    text: reads a test file, to find what it imports.
  """
  parts, stem = Path(path).parts, Path(path).stem
  if path in tests:
    return {path}
  if parts[0] == "tests":  # a helper, or a conftest.py
    if stem == "conftest":
      return {t for t in tests if Path(t).is_relative_to(Path(path).parent)}
    imports = re.compile(rf"^\s*(from|import) {re.escape(stem)}\b", re.M)
    return {t for t in tests if imports.search(text(t))}
  if Path(path).suffix != ".py":
    return set()
  inner = parts[1:-1] if parts[0] == "distill_jax" else parts[:-1]
  folder = "/".join(["tests", *inner])
  named = {t for t in tests if re.fullmatch(rf"{folder}/test_{stem}(_\w+)?\.py", t)}
  return named or {t for t in tests if inner and t.startswith(f"{folder}/")}


def main(command: list[str]) -> int:
  tests = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py"))
  always = {"tests/test_layers.py", "tests/test_prose.py"}  # they read every file
  changed = changed_files()
  found = sorted(always.union(*(tests_of(path, tests) for path in changed)))
  print("\n".join(found), flush=True)
  return subprocess.run([*command, *found], cwd=ROOT).returncode


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
