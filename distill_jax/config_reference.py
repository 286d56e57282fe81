"""The reference of the config: every key with its type, default and meaning.

It is read from the source of the dataclasses with `ast`. Nothing is imported, so that
`distill-jax help` starts in a fraction of a second. The meaning of a key is the string literal
below its field:

  steps: int = 1000
  \"\"\"Number of training steps.\"\"\"
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from distill_jax.registry import ENTRY_CLASSES

ROOT = Path(__file__).parent
PACKAGE = ROOT.name
TYPE_NAMES = {
  "bool": "True or False",
  "int": "an integer",
  "float": "a number",
  "str": "a string",
  "tuple": "a tuple",
  "dict": "a dictionary",
  "Schedule": "a number",
}
LEAVES = ("Schedule",)  # dataclasses that a config file writes as one value


@dataclasses.dataclass(frozen=True)
class ClassRef:
  """A class of the package, by module and name."""

  module: str
  name: str


class Field(NamedTuple):
  """A key of a config section.

  Attributes:
    name: The key.
    type: The declared type, e.g. "tuple[int, ...]".
    default: The default as a config file writes it; "" if the key has none.
    doc: The attribute docstring; "" without one.
    section: The dataclass that holds the keys below this one; None for a plain value.
    is_dict: True if `section` describes the values of a dict by name, as in `links`.
  """

  name: str
  type: str
  default: str
  doc: str
  section: ClassRef | None = None
  is_dict: bool = False


class Key(NamedTuple):
  """A dotted key of the config, e.g. "optim.peak_lr" or "losses.kd.weight"."""

  dotted: str
  field: Field


CONFIG = ClassRef(f"{PACKAGE}.config", "Config")


def fields_of(cls: type | ClassRef) -> list[Field]:
  """Returns the fields of a dataclass of this package, inherited ones first."""
  ref = cls if isinstance(cls, ClassRef) else ClassRef(cls.__module__, cls.__qualname__)
  return list(_fields(ref))


@functools.cache
def _fields(ref: ClassRef) -> tuple[Field, ...]:
  node = _class(ref)
  fields: dict[str, Field] = {}
  for base in reversed(node.bases):
    if (parent := _resolve(ref.module, base)) is not None:
      fields |= {field.name: field for field in _fields(parent)}
  if not _is_dataclass(node):
    return tuple(fields.values())
  for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
    doc = _string(after)
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
      if (field := _field(ref.module, statement, doc)) is not None:
        fields[field.name] = field
    elif isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) in fields:
      known = fields[ast.unparse(statement.targets[0])]
      default = _default(ref.module, statement.value)
      fields[known.name] = known._replace(default=default, doc=doc or known.doc)
  return tuple(fields.values())


def _field(module: str, node: ast.AnnAssign, doc: str) -> Field | None:
  """Returns the field that an annotated assignment declares; None for a class variable."""
  assert isinstance(node.target, ast.Name)
  type_name = ast.unparse(node.annotation)
  if type_name.startswith(("ClassVar", "typing.ClassVar")):
    return None
  default = _default(module, node.value) if node.value is not None else ""
  section, is_dict = _section(module, node.annotation)
  return Field(node.target.id, type_name, default, doc, section, is_dict)


def _section(module: str, annotation: ast.expr) -> tuple[ClassRef | None, bool]:
  """Returns the dataclass that a type names, and whether it is the value type of a dict."""
  is_dict = isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "dict"
  if is_dict:
    assert isinstance(annotation, ast.Subscript) and isinstance(annotation.slice, ast.Tuple)
    annotation = annotation.slice.elts[1]
  ref = _resolve(module, annotation)
  if ref is None or ref.name in LEAVES or not _is_dataclass(_class(ref)):
    return None, False
  return ref, is_dict


def _default(module: str, node: ast.expr) -> str:
  """Returns a default as a config file writes it."""
  if isinstance(node, ast.Call):
    called = ast.unparse(node.func)
    if called.endswith("field"):
      values = {keyword.arg: keyword.value for keyword in node.keywords}
      if "default" in values:
        return _default(module, values["default"])
      if (factory := values.get("default_factory")) is not None:
        return {"dict": "{}", "list": "[]", "tuple": "()"}.get(ast.unparse(factory), "")
      return ""
    if called.endswith("constant") and node.args:  # a schedule
      return ast.unparse(node.args[0])
  if isinstance(node, ast.Name) and (value := _constant(module, node.id)) is not None:
    return ast.unparse(value)
  return ast.unparse(node)


def doc_of(ref: ClassRef | str) -> str:
  """Returns the docstring of a class or a module; "" without one."""
  node = _class(ref) if isinstance(ref, ClassRef) else _tree(ref)
  return ast.get_docstring(node) or ""


def entries(package: str) -> list[str]:
  """Returns the entries of `distill_jax.<package>`, as `registry.names` does, with no import."""
  shared = _constant(f"{PACKAGE}.{package}", "SHARED")
  skipped = ("__init__", "options", *(ast.literal_eval(shared) if shared is not None else ()))
  stems = (path.stem for path in (ROOT / package).glob("*.py"))
  return sorted(stem for stem in stems if not stem.startswith("_") and stem not in skipped)


def entry_class(package: str, name: str) -> ClassRef:
  """Returns the dataclass of an entry, such as the `Loss` of losses/kd.py."""
  return ClassRef(f"{PACKAGE}.{package}.{name}", ENTRY_CLASSES[package])


def sections() -> dict[str, ClassRef]:
  """Returns the dataclass of every section by its dotted key, e.g. "train" or "losses.kd".

  The names in a dict, which the user chooses, are written NAME: "links.NAME.shrink". An entry has
  the name of its module.
  """
  return dict(_walk("", CONFIG)) | {
    f"{package}.{name}": entry_class(package, name)
    for package in ENTRY_CLASSES
    for name in entries(package)
  }


def _walk(prefix: str, ref: ClassRef) -> Iterator[tuple[str, ClassRef]]:
  for field in fields_of(ref):
    if field.section is not None:
      dotted = f"{prefix}{field.name}" + (".NAME" if field.is_dict else "")
      yield dotted, field.section
      yield from _walk(f"{dotted}.", field.section)


@functools.cache
def all_keys() -> tuple[Key, ...]:
  """Returns every dotted key of the config and of the entries."""
  found = [Key(field.name, field) for field in fields_of(CONFIG)]
  for prefix, ref in sections().items():
    found += [Key(f"{prefix}.{field.name}", field) for field in fields_of(ref)]
  return tuple(found)


def find(name: str) -> list[str]:
  """Returns the dotted keys and sections that a user's word can stand for, the best ones alone.

  The word is a whole dotted key ("train.steps"), a section ("train"), an entry ("kd"), or the end
  of a dotted key ("steps").
  """
  name = name.removeprefix("--").removeprefix("config.").split("=")[0]
  known = [*(key.dotted for key in all_keys()), *sections(), *ENTRY_CLASSES]
  if name in known:
    return [name]
  package, _, rest = name.partition(".")
  if package in ENTRY_CLASSES and "." in rest:  # with the user's own name of an entry
    own = rest.partition(".")[2]
    return [k for k in known if k.startswith(f"{package}.") and k.split(".", 2)[2:] == [own]]
  named = [entry for entry in sections() if entry.endswith(f".{name}")]
  if entry_names := [e for e in named if e.partition(".")[0] in ENTRY_CLASSES]:
    return entry_names
  return list(dict.fromkeys([*named, *(k for k in known if k.endswith(f".{name}"))]))


def mentions(name: str) -> list[Key]:
  """Returns the keys with a word in their names, or with the phrase in their meanings.

  Args:
    name: The word, e.g. "lr", or the words of a phrase with "_" between them.
  """
  phrase = re.escape(name.replace("_", " "))
  word, text = re.compile(rf"(^|[._]){phrase}($|[._])"), re.compile(rf"\b{phrase}\b", re.I)
  return [
    k for k in all_keys() if word.search(k.dotted) or text.search(" ".join(k.field.doc.split()))
  ]


def nearest(name: str, extra: tuple[str, ...] = ()) -> list[str]:
  """Returns up to three known names that a misspelt one resembles, the most similar first.

  Args:
    name: The word as the user wrote it.
    extra: Names besides those of the config, e.g. the verbs.
  """
  known = {*(key.dotted for key in all_keys()), *sections(), *extra}
  if "." not in name:
    known |= {dotted.rpartition(".")[2] for dotted in known}
  return difflib.get_close_matches(name, sorted(known), 3)


def settable(key: str) -> Field | None:
  """Returns the field that --config.KEY sets, or None for an unknown key.

  The name of an entry is the user's: "losses.soft.weight" is a key of any of the losses.
  """
  package, _, rest = key.partition(".")
  name, _, own = rest.partition(".")
  if package not in ENTRY_CLASSES and package != "links":
    return next((k.field for k in all_keys() if k.dotted == key), None)
  if package == "links":
    return next((k.field for k in all_keys() if k.dotted == f"links.NAME.{own}"), None)
  fields = (f for entry in entries(package) for f in fields_of(entry_class(package, entry)))
  return next((field for field in fields if field.name == own), None) if name else None


def nearest_setting(key: str) -> str:
  """Returns the key that --config.KEY resembles most; "" without one."""
  package, _, rest = key.partition(".")
  name, _, own = rest.partition(".")
  if package in ENTRY_CLASSES:
    names = {f.name for e in entries(package) for f in fields_of(entry_class(package, e))}
    near = difflib.get_close_matches(own, sorted(names), 1)
    return f"{package}.{name}.{near[0]}" if near else ""
  known = [k.dotted for k in all_keys() if k.dotted.partition(".")[0] not in ENTRY_CLASSES]
  near = difflib.get_close_matches(key, known, 1)
  return near[0] if near else ""


def type_of(field: Field) -> str:
  """Returns the type of a field in words, e.g. "an integer"."""
  return TYPE_NAMES.get(field.type, field.type)


@functools.cache
def _tree(module: str) -> ast.Module:
  return ast.parse(_path(module).read_text(encoding="utf-8"))


def _path(module: str) -> Path:
  path = ROOT.joinpath(*module.split(".")[1:])
  return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _class(ref: ClassRef) -> ast.ClassDef:
  for node in _tree(ref.module).body:
    if isinstance(node, ast.ClassDef) and node.name == ref.name:
      return node
  raise KeyError(f"{ref.module} has no class {ref.name}")


def _resolve(module: str, node: ast.expr) -> ClassRef | None:
  """Returns the class of this package that an expression names in a module; None for others."""
  if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
    target = _imported(module, node.value.id)
    return _named(".".join(target), node.attr) if target else None
  return _named(module, node.id) if isinstance(node, ast.Name) else None


def _named(module: str, name: str) -> ClassRef | None:
  """Returns the class that a name stands for in a module, defined there or imported."""
  if not module.startswith(f"{PACKAGE}.") or not _path(module).exists():
    return None
  if any(isinstance(n, ast.ClassDef) and n.name == name for n in _tree(module).body):
    return ClassRef(module, name)
  target = _imported(module, name)
  return _named(*target) if target else None


def _imported(module: str, name: str) -> tuple[str, str] | None:
  """Returns (module, name) of a name that a module imports from elsewhere."""
  for node in _tree(module).body:
    if isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        if (alias.asname or alias.name) == name:
          return node.module, alias.name
  return None


def _constant(module: str, name: str) -> ast.expr | None:
  """Returns the value that a module assigns to a name, defined there or imported; or None."""
  for node in _tree(module).body:
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
      return node.value
    if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
      return node.value
  target = _imported(module, name)
  if target is None or not target[0].startswith(PACKAGE) or not _path(target[0]).exists():
    return None
  return _constant(*target)


def _is_dataclass(node: ast.ClassDef) -> bool:
  return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _string(node: Any) -> str:
  """Returns the text of a string literal that is a statement; "" for anything else."""
  value = node.value if isinstance(node, ast.Expr) else None
  if isinstance(value, ast.Constant) and isinstance(value.value, str):
    return inspect.cleandoc(value.value)
  return ""
