"""Jinja as transformers sets it up for chat templates, which are untrusted code."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from distill_jax.errors import InputError
from distill_jax.runtime import extras
from distill_jax.types import JsonObject

with extras.needed("train"):
  import jinja2
  import jinja2.ext
  import jinja2.meta
  import jinja2.nodes
  import jinja2.parser
  import jinja2.sandbox
  import jinja2.utils

MARKS = ("\ufdd0", "\ufdd1")  # Unicode's noncharacters, for use inside a program
# A message's reasoning goes by three names; templates read the first, a few the second.
REASONING = ("reasoning_content", "thinking", "reasoning")
# What Python raises for an operation that a template has no right to.
FAULTS = (
  TypeError,
  ValueError,
  LookupError,
  AttributeError,
  ArithmeticError,
  RecursionError,
  MemoryError,
)


class _Raised(jinja2.TemplateError):
  """A template's own raise_exception."""


class _Generation(jinja2.ext.Extension):
  """`{% generation %}`, around what the assistant says: writes its body as it is."""

  tags = {"generation"}
  marks = ("", "")

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

  def _write(self, caller: Any) -> str:
    return self.marks[0] + caller() + self.marks[1]


class _MarkedGeneration(_Generation):
  """The same, with marks before and after the body."""

  marks = MARKS


class _Namespace(jinja2.utils.Namespace):
  """A namespace without underscored names, which Python might call past the sandbox."""

  def __setitem__(self, name: str, value: Any) -> None:
    super().__setitem__(_checked(name), value)


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A chat template, ready to render.

  Attributes:
    where: whose it is.
    reads: names that it reads and does not set.
    generation: whether it has `{% generation %}` blocks.
  """

  where: str
  reads: frozenset[str]
  generation: bool
  templates: tuple[jinja2.Template, jinja2.Template]  # without and with marks

  def render(self, values: JsonObject, marked: bool = False) -> str:
    """The text, or that with MARKS around each generation block."""
    try:
      text = self.templates[marked].render(values)
    except _Raised as e:
      raise InputError(f"{self.where} refuses these messages: {e}") from e
    except (jinja2.TemplateError, *FAULTS) as e:
      raise InputError(
        f"{self.where} fails on these messages ({type(e).__name__}: {e}); mend one of the two"
      ) from e
    if not marked and any(mark in text for mark in MARKS):
      raise InputError("a chat holds U+FDD0 or U+FDD1, which no text may; take them out")
    return text

  def blocks(self, text: str, marked: str) -> tuple[tuple[int, int], ...]:
    """(start, end) of the generation blocks in `text`, given what the marked template writes."""
    spans: list[tuple[int, int]] = []
    opened: list[int] = []  # a block may hold others
    at = 0
    for part in (parts := re.split(f"([{''.join(MARKS)}])", marked)):
      if part == MARKS[0]:
        opened.append(at)
      elif part == MARKS[1] and opened:
        start = opened.pop()
        if not opened and at > start:
          spans.append((start, at))
      else:
        at += len(part)
    if "".join(p for p in parts if p not in MARKS) != text or opened:
      raise InputError(
        f"{self.where} works on the text of a generation block after it is written, so its "
        "place is lost; put the block around the final text"
      )
    return tuple(spans)


@functools.lru_cache(maxsize=64)
def compiled(source: str, where: str) -> Compiled:
  """A template's source, compiled.

  Raises:
    InputError: it is no Jinja.
  """
  plain, marked = _environment(_Generation), _environment(_MarkedGeneration)
  try:
    tree = plain.parse(source)
    reads = frozenset(jinja2.meta.find_undeclared_variables(tree))
    has = next(tree.find_all(jinja2.nodes.ExtensionAttribute), None) is not None
    return Compiled(where, reads, has, (plain.from_string(source), marked.from_string(source)))
  except (jinja2.TemplateError, *FAULTS) as e:
    raise InputError(f"{where} is no Jinja that can be read ({e}); mend it") from e


@functools.cache
def _environment(generation: type[_Generation]) -> jinja2.Environment:
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[generation, jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = _tojson  # Jinja's own escapes HTML
  environment.globals |= {"raise_exception": _raise, "namespace": _namespace}
  return environment


def plain(value: Any) -> Any:
  """A copy of plain JSON types: any other object has methods that a template could call."""
  if value is None or isinstance(value, bool):
    return value
  for kind in (str, int, float):
    if isinstance(value, kind):
      return kind(value)
  if isinstance(value, Mapping):
    return {plain(k): plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [plain(v) for v in value]
  raise InputError(f"a chat holds a {type(value).__name__}; give what JSON can hold")


def message(given: Any) -> JsonObject:
  """A chat's message as transformers hands it to a template: nothing that is None, and the
  reasoning under the names that templates read."""
  if not isinstance(given, Mapping) or not isinstance(given.get("role"), str):
    raise InputError(f"a message is {given!r:.80}; it is a dictionary with a role")
  out = plain({k: v for k, v in given.items() if v is not None})
  reasoning = next((out[k] for k in REASONING if k in out), None)
  return (
    out if reasoning is None else {"thinking": reasoning, **out, "reasoning_content": reasoning}
  )


def _tojson(
  x: Any,
  ensure_ascii: bool = False,
  indent: Any = None,
  separators: Any = None,
  sort_keys: bool = False,
) -> str:
  return json.dumps(
    x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def _raise(message: str) -> None:
  raise _Raised(message)


def _namespace(*args: Any, **kwargs: Any) -> _Namespace:
  return _Namespace({_checked(k): v for k, v in dict(*args, **kwargs).items()})


def _checked(name: Any) -> Any:
  if isinstance(name, str) and name.startswith("_"):
    raise jinja2.sandbox.SecurityError(f"a namespace may hold no {name!r}")
  return name
