"""Explains a verb, a config key, a config section or an entry.

Everything it prints is read from the source: the docstrings of the commands and the declarations
of the config keys. See config_reference.py.

Example:
  distill-jax help train.steps
"""

from __future__ import annotations

import ast
import textwrap

from distill_jax import __version__, config_reference
from distill_jax.config_reference import ClassRef, Field
from distill_jax.errors import InputError
from distill_jax.registry import ENTRY_CLASSES

WIDTH = 96
USAGE = """\
distill-jax {version}: knowledge distillation in JAX.

Usage:
  distill-jax distill --teacher=SOURCE --data=FILE_OR_FOLDER --workdir=DIR [--student=SOURCE]
  distill-jax VERB --config=FILE --workdir=DIR [--config.KEY=VALUE ...] [--json]
  distill-jax help [VERB | KEY | SECTION | ENTRY]
"""
MORE = """\
Examples:
  distill-jax help train            the verb `train`, and every config key that it reads
  distill-jax help train.steps      one key; its last part is enough if that is unique
  distill-jax help optim            a section of the config
  distill-jax help losses           the losses; `help kd` explains one of them
  distill-jax help learning_rate    the keys that mention the learning rate
  distill-jax help config           every key of the config"""


def answer(words: list[str]) -> str:
  """Returns the help text for the words after `distill-jax help`.

  Raises:
    InputError: A word is not a verb, a key, a section or an entry.
  """
  if words == ["--version"]:
    return __version__
  if not words:
    return overview()
  return "\n\n".join(explain(word) for word in words)


def explain(word: str) -> str:
  """Returns the help text for one word."""
  if word in config_reference.entries("commands"):
    return verb_text(word)
  if word == "config":
    return "\n".join(list_line(key.dotted, key.field) for key in config_reference.all_keys())
  found = config_reference.find(word)
  if not found and (keys := config_reference.mentions(word)):
    lines = [f"{word!r} is not a key. These keys have it in their names or meanings:", ""]
    return "\n".join([*lines, *(list_line(key.dotted, key.field) for key in keys)])
  if not found:
    near = config_reference.nearest(word, tuple(config_reference.entries("commands")))
    hint = f"Did you mean {' or '.join(near)}?" if near else "`distill-jax help config` lists keys."
    raise InputError(f"{word!r} is not a verb or a config key. {hint}")
  return "\n\n".join(key_text(name) for name in found)


def overview() -> str:
  """Returns the text of `distill-jax --help`: the verbs, the flags and examples."""
  verbs = config_reference.entries("commands")
  rows = [f"  {verb:<12}{first_sentence(command_doc(verb))}" for verb in verbs]
  flag_rows = [f"  --{name:<16}{text}" for name, text in flags()]
  return "\n".join(
    [USAGE.format(version=__version__), "Verbs:", *rows, "", "Flags:", *flag_rows, "", MORE]
  )


def command_doc(verb: str) -> str:
  """Returns the docstring of a command."""
  return config_reference.doc_of(f"{config_reference.PACKAGE}.commands.{verb}")


def first_sentence(doc: str) -> str:
  """Returns the first sentence of a docstring, without the name in backquotes that it explains."""
  sentence = " ".join(doc.split("\n\n")[0].split())
  name, _, rest = sentence.partition(": ")
  return rest if name.startswith("`") and rest else sentence


def flags() -> list[tuple[str, str]]:
  """Returns (name, meaning) of every flag, as flags.py declares them."""
  path = config_reference.ROOT / "flags.py"
  found = []
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2].startswith(
      "DEFINE"
    ):
      name, _, text = (ast.literal_eval(argument) for argument in node.args[:3])
      found.append((name, text))
  return found


def verb_text(verb: str) -> str:
  """Returns what a verb does, reads and writes, an example, and the keys of its sections."""
  parts = [command_doc(verb)]
  for section in verb_sections(verb):
    parts.append(section_text(section))
  return "\n\n".join(parts)


def verb_sections(verb: str) -> list[str]:
  """Returns the sections and keys that a verb reads: the paragraph `Config:` of its docstring."""
  _, _, after = command_doc(verb).partition("\nConfig: ")
  return [name.strip(" \n.") for name in after.split("\n\n")[0].split(",") if name]


def key_text(name: str) -> str:
  """Returns the text of a dotted key, a section or an entry."""
  if name in config_reference.sections() or name in ENTRY_CLASSES:
    return section_text(name)
  (key,) = (key for key in config_reference.all_keys() if key.dotted == name)
  return field_text(key.dotted, key.field)


def section_text(name: str) -> str:
  """Returns a section with its keys, or a package of entries with a line for each."""
  if name in ENTRY_CLASSES:
    return entries_text(name)
  if (ref := config_reference.sections().get(name)) is None:
    return key_text(name)
  package, _, entry = name.partition(".")
  doc = config_reference.doc_of(ref)
  if package in ENTRY_CLASSES:
    doc = first_paragraph(config_reference.doc_of(ref.module))
    doc += f"\n\nc.{package}.NAME = {example_of(package, entry)}  # in a config file"
  return "\n\n".join([f"[{name}]\n{doc}", *fields_text(name, ref)])


def example_of(package: str, entry: str) -> str:
  """Returns the expression that makes an entry in a config file."""
  return f'config.{ENTRY_CLASSES[package].lower()}("{entry}", KEY=VALUE, ...)'


def fields_text(prefix: str, ref: ClassRef) -> list[str]:
  """Returns the keys of a section; the sections in it are named, not explained."""
  return [field_text(f"{prefix}.{field.name}", field) for field in config_reference.fields_of(ref)]


def first_paragraph(doc: str) -> str:
  """Returns a docstring up to its first empty line."""
  return doc.split("\n\n")[0]


def entries_text(package: str) -> str:
  """Returns the entries of a package, a line each, with the key of the config that holds them."""
  (key,) = (key for key in config_reference.all_keys() if key.dotted == package)
  rows = [
    f"  {name:<18}{first_sentence(config_reference.doc_of(f'distill_jax.{package}.{name}'))}"
    for name in config_reference.entries(package)
  ]
  example = example_of(package, config_reference.entries(package)[0])
  return "\n".join([field_text(package, key.field), "", *rows, "", f"c.{package}.NAME = {example}"])


def field_text(dotted: str, field: Field) -> str:
  """Returns a key with its type, default and meaning."""
  doc = field.doc
  if field.section is not None:
    below = f"{dotted}.NAME" if field.is_dict else dotted
    doc = f"{doc} `distill-jax help {below}` lists its keys.".strip()
  text = textwrap.fill(doc, WIDTH, initial_indent="    ", subsequent_indent="    ")
  return "\n".join(filter(None, [list_line(dotted, field), text]))


def list_line(dotted: str, field: Field) -> str:
  """Returns `KEY: TYPE = DEFAULT`."""
  kind = "number or schedule" if field.type == "Schedule" else field.type
  default = "" if field.section is not None and not field.is_dict else f" = {field.default}"
  return f"{dotted}: {kind}{default if field.default else ''}"
