"""Writes a config as a file in the form of configs/, with the keys that differ from the default."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from distill_jax import config as configs
from distill_jax.config import Config
from distill_jax.registry import ENTRY_CLASSES
from distill_jax.types import JsonObject

ENTRY_FUNCTIONS = {"losses": "loss", "filters": "filter", "evals": "benchmark", "tasks": "task"}
ENTRY_FUNCTIONS["augmentations"] = "augmentation"


def text(config: Config, doc: str, comments: dict[str, str]) -> str:
  """Returns the source of a config file.

  Args:
    config: The config that the file gives.
    doc: The docstring of the file.
    comments: Comments by dotted key, written behind the key.
  """
  lines = []
  for key, code in _assignments(config):
    comment = f"  # {comments[key]}" if key in comments else ""
    lines.append(f"  c.{key} = {code}{comment}")
  body = "\n".join(lines)
  return (
    f'"""{doc.rstrip()}\n"""\n\nfrom distill_jax import config\n\n\n'
    f"def get_config():\n  c = config.base()\n{body}\n  return c\n"
  )


def _assignments(config: Config) -> Iterator[tuple[str, str]]:
  """Yields (dotted key, source of its value) of every key that is not at its default."""
  tree, defaults = configs.to_dict(config), configs.to_dict(Config())
  for section, value in tree.items():
    if section in ENTRY_CLASSES:
      yield from ((f"{section}.{name}", _entry(section, e)) for name, e in value.items())
    elif section == "links":
      yield from (
        (f"links.{name}", f"config.link(**{source(link)})") for name, link in value.items()
      )
    else:
      yield from _leaves(section, value, defaults[section], getattr(config, section))


def _leaves(key: str, value: Any, default: Any, node: Any) -> Iterator[tuple[str, str]]:
  """Yields the keys below a section; a dict that is a value, such as student.changes, is one."""
  if dataclasses.is_dataclass(node):
    for name, inner in value.items():
      yield from _leaves(f"{key}.{name}", inner, default[name], getattr(node, name))
  elif value != default:
    yield key, source(value)


def _entry(package: str, fields: JsonObject) -> str:
  """Returns the call that makes an entry, with the keys that are not at their default."""
  module_key = ENTRY_CLASSES[package].lower()
  name = fields[module_key]
  function = ENTRY_FUNCTIONS[package]
  defaults = getattr(configs, function)(name).to_dict()
  changed = {
    key: code
    for key, value in fields.items()
    if key != module_key and (code := _value(value)) != source(defaults[key])
  }
  arguments = "".join(f", {key}={code}" for key, code in changed.items())
  return f'config.{function}("{name}"{arguments})'


def _value(value: Any) -> str:
  """Returns the source of a value; a constant schedule is a number."""
  if isinstance(value, dict) and set(value) == {"points", "shape"}:
    points = value["points"]
    if len(points) == 1:
      return source(points[0][1])
    inner = ", ".join(f"({step!r}, {y!r})" for step, y in points)
    return f"config.schedule({inner}, shape={source(value['shape'])})"
  return source(value)


def source(value: Any) -> str:
  """Returns the source of a plain value, with strings in double quotes if they are printable."""
  if isinstance(value, str):
    code = json.dumps(value, ensure_ascii=False)
    return code if code.isprintable() else repr(value)
  if isinstance(value, list | tuple):
    inner = ", ".join(map(source, value))
    return f"({inner},)" if len(value) == 1 else f"({inner})"
  if isinstance(value, dict):
    return "{" + ", ".join(f"{source(k)}: {source(v)}" for k, v in value.items()) + "}"
  return repr(value)
