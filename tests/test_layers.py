"""The import rules of the package: what may import what."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "distill_jax"
# From the bottom up. A module imports its own layer and those above it in this list only.
LAYERS = (
  ("errors",),
  ("types", "schedules", "registry"),
  ("nn",),
  ("options",),  # every package's options.py: the sections of a config
  ("config",),
  ("runtime",),
  ("hub",),
  ("data",),
  ("models",),
  ("losses",),
  ("records",),
  ("augmentations", "filters"),
  ("generation",),
  ("tasks",),
  ("training",),
  ("preflight", "report"),
  ("evals", "efficiency", "pruning"),
  ("commands",),
  ("cli",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


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


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
  here = path.relative_to(ROOT).with_suffix("").parts
  for parts in filter(None, imports(path)):
    if parts[0] == "__init__" or parts == ("__version__",):
      continue
    assert RANK[package(parts)] <= RANK[package(here)], f"{'.'.join(parts)} is in a higher layer"
    if parts[0] != here[0]:
      private = [p for p in parts if p.startswith("_")]
      assert not private, f"{'.'.join(parts)} is private to {parts[0]}"


def test_the_root_holds_the_front_door_only():
  names = {p.name for p in ROOT.iterdir() if p.suffix or not p.is_dir()}
  assert names == {
    "__init__.py",
    "cli.py",
    "config.py",
    "errors.py",
    "py.typed",
    "registry.py",
    "schedules.py",
    "types.py",
  }


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_short_and_formatted_throughout(path):
  lines = path.read_text().splitlines()
  assert len(lines) <= 350
  assert not [line for line in lines if "# fmt:" in line]
