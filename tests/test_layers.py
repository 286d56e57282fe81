"""The import rules of the package: what may import what."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).parent.parent / "distill_jax"
# From the bottom up. A module imports its own layer and those above it in this list only.
LAYERS = (
  ("errors",),
  ("types", "schedules", "registry"),
  ("config_reference",),  # reads the source of the modules and imports none of them
  ("nn",),
  ("options",),  # every package's options.py: the sections of a config
  ("config",),
  ("runtime",),
  ("hub",),
  ("data",),
  ("models",),
  ("losses",),
  ("cross_tokenizer",),
  ("records",),
  ("augmentations", "filters", "retarget"),
  ("generation",),
  ("served",),
  ("tasks",),
  ("training",),
  ("on_policy",),
  ("preflight", "report"),
  ("evals", "efficiency", "pruning", "recipe", "retokenize", "deployment"),
  ("commands",),
  ("flags", "flag_errors"),
  ("cli",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
PACKAGES = sorted(
  {path.relative_to(ROOT).parts[0] for path in ROOT.rglob("*.py")} - {"__init__.py"}
)


def modules(name):
  """Returns the files of a package, or the one file of that name."""
  return sorted((ROOT / name).rglob("*.py")) or [ROOT / name]


def package(parts):
  """The entry of LAYERS that a module belongs to."""
  return "options" if parts[-1] == "options" else parts[0]


def imports(path):
  """(package, module) of everything that a file imports from distill_jax."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("distill_jax"):
      for alias in node.names:
        parts = [*node.module.split(".")[1:], alias.name]
        is_module = (ROOT.joinpath(*parts)).is_dir() or ROOT.joinpath(*parts).with_suffix(
          ".py"
        ).exists()
        yield tuple(parts if is_module else parts[:-1])


def wrong_imports(path):
  """Yields a sentence for every import of a file that points upwards, or into private code."""
  where = path.relative_to(ROOT)
  here = where.with_suffix("").parts
  for parts in filter(None, imports(path)):
    if parts[0] == "__init__" or parts == ("__version__",):
      continue
    if RANK[package(parts)] > RANK[package(here)]:
      yield f"{where}: {'.'.join(parts)} is in a higher layer"
    if parts[0] != here[0] and any(p.startswith("_") for p in parts):
      yield f"{where}: {'.'.join(parts)} is private to {parts[0]}"


@pytest.mark.parametrize("name", PACKAGES)
def test_imports_point_downwards(name):
  wrong = [fault for path in modules(name) for fault in wrong_imports(path)]
  assert not wrong, "\n".join(wrong)


def test_the_root_holds_the_front_door_only():
  names = {p.name for p in ROOT.iterdir() if p.suffix or not p.is_dir()}
  assert names == {
    "__init__.py",
    "cli.py",
    "config.py",
    "config_reference.py",
    "errors.py",
    "flag_errors.py",
    "flags.py",
    "py.typed",
    "registry.py",
    "schedules.py",
    "types.py",
  }


@pytest.mark.parametrize("name", PACKAGES)
def test_a_file_is_short_and_formatted_throughout(name):
  texts = {path: path.read_text() for path in modules(name)}
  assert not [path for path, text in texts.items() if len(text.splitlines()) > 350]
  assert not [path for path, text in texts.items() if "# fmt:" in text]


def test_no_test_file_imports_another_and_all_are_short():
  texts = {path: path.read_text() for path in Path(__file__).parent.rglob("*.py")}
  imports = re.compile(r"^\s*(from|import) (\w+\.)*test_\w+", re.M)
  assert not [path for path, text in texts.items() if imports.search(text)]
  assert not [path for path, text in texts.items() if len(text.splitlines()) > 400]
