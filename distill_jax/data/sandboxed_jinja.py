"""A sandboxed Jinja environment for chat templates, which are untrusted code.

The environment has the filters and functions of transformers' environment.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distill_jax.errors import InputError
from distill_jax.runtime import extras

if TYPE_CHECKING:  # the workers of `pack` must not import jax
  from distill_jax.types import JsonObject

with extras.needed("train"):
  import jinja2
  import jinja2.ext
  import jinja2.meta
  import jinja2.nodes
  import jinja2.parser
  import jinja2.sandbox
  import jinja2.utils

MARKS = ("\ufdd0", "\ufdd1")  # Unicode noncharacters, which are reserved for internal use
# Three names of the key with a message's reasoning. Most templates read the first, some the second.
REASONING = ("reasoning_content", "thinking", "reasoning")
# Python exceptions that an invalid operation in a template can raise.
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
  """The exception of a template's call of raise_exception."""


class _Generation(jinja2.ext.Extension):
  """The tag `{% generation %}` around the assistant's text; writes its body unchanged."""

  tags = {"generation"}
  marks = ("", "")

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

  def _write(self, caller: Any) -> str:
    return self.marks[0] + caller() + self.marks[1]


class _MarkedGeneration(_Generation):
  """The tag `{% generation %}`, with marks written before and after its body."""

  marks = MARKS


class _Namespace(jinja2.utils.Namespace):
  """A namespace without names that start with "_", which Python could call outside the sandbox."""

  def __setitem__(self, name: str, value: Any) -> None:
    super().__setitem__(_checked(name), value)


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled chat template.

  Attributes:
    where: The name of the template, for messages.
    reads: The names of the variables that it reads and does not set.
    generation: True if it has `{% generation %}` blocks.
    templates: The template without and with marks around generation blocks.
  """

  where: str
  reads: frozenset[str]
  generation: bool
  templates: tuple[jinja2.Template, jinja2.Template]

  def render(self, values: JsonObject, marked: bool = False) -> str:
    """Renders the template.

    Args:
      values: The variables.
      marked: True to put MARKS around each generation block.

    Raises:
      InputError: If the template raises an exception or fails, or if its text contains MARKS.
    """
    try:
      text = self.templates[marked].render(values)
    except _Raised as e:
      raise InputError(f"{self.where} rejects these messages: {str(e).rstrip('.')}.") from e
    except (jinja2.TemplateError, *FAULTS) as e:
      raise InputError(
        f"{self.where} fails on these messages ({type(e).__name__}: {e}). Correct the template or "
        "the messages."
      ) from e
    if not marked and any(mark in text for mark in MARKS):
      raise InputError(
        "A chat contains U+FDD0 or U+FDD1, which are not allowed in text. Remove them."
      )
    return text

  def blocks(self, text: str, marked: str) -> tuple[tuple[int, int], ...]:
    """Returns the (start, end) character offsets of the generation blocks in a rendered text.

    Args:
      text: The text rendered without marks.
      marked: The text rendered with marks.

    Raises:
      InputError: If the template changes the text of a block after it is written.
    """
    spans: list[tuple[int, int]] = []
    opened: list[int] = []  # blocks may be nested
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
        f"{self.where} changes the text of a generation block after the block, so the place of the "
        "text is unknown. Put the block around the final text."
      )
    return tuple(spans)


@functools.lru_cache(maxsize=64)
def compiled(source: str, where: str) -> Compiled:
  """Compiles a template.

  Args:
    source: The Jinja source.
    where: The name of the template, for messages.

  Raises:
    InputError: If the source is not valid Jinja.
  """
  plain, marked = _environment(_Generation), _environment(_MarkedGeneration)
  try:
    tree = plain.parse(source)
    reads = frozenset(jinja2.meta.find_undeclared_variables(tree))
    has = next(tree.find_all(jinja2.nodes.ExtensionAttribute), None) is not None
    return Compiled(where, reads, has, (plain.from_string(source), marked.from_string(source)))
  except (jinja2.TemplateError, *FAULTS) as e:
    raise InputError(f"{where} is not valid Jinja ({str(e).rstrip('.')}). Correct it.") from e


@functools.cache
def _environment(generation: type[_Generation]) -> jinja2.Environment:
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[generation, jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = _tojson  # Jinja's filter escapes HTML
  environment.globals |= {"raise_exception": _raise, "namespace": _namespace}
  return environment


def plain(value: Any) -> Any:
  """Returns a copy of a JSON value in plain Python types.

  Other objects are refused, since they have methods that a template could call.

  Raises:
    InputError: If the value is not a JSON value.
  """
  if value is None or isinstance(value, bool):
    return value
  for kind in (str, int, float):
    if isinstance(value, kind):
      return kind(value)
  if isinstance(value, Mapping):
    return {plain(k): plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [plain(v) for v in value]
  raise InputError(
    f"A chat contains a value of type {type(value).__name__}; expected only JSON values."
  )


def message(given: Any) -> JsonObject:
  """Returns a message in the form that transformers passes to a template.

  Keys with the value None are removed, and the reasoning is available under both names that
  templates read.

  Raises:
    InputError: If the message is not a dict with a role.
  """
  if not isinstance(given, Mapping) or not isinstance(given.get("role"), str):
    raise InputError(f"A message is {given!r:.80}; expected a dict with a role.")
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
    raise jinja2.sandbox.SecurityError(f"a namespace must not contain {name!r}")
  return name
