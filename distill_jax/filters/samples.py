"""Helpers for filters: the fields of samples."""

from __future__ import annotations

from typing import Any, NamedTuple

Sample = dict[str, Any]
THINK_END = "</think>"


class Unjudgeable(str):
  """The reason why a sample cannot be judged, e.g. a missing answer key."""


class Judged(NamedTuple):
  """A sample and the reason to reject it, or None to keep it."""

  sample: Sample
  reason: str | None


def prompt_field(sample: Sample, field: str) -> Any:
  """Returns a field of the prompt's line, else of the sample, else None."""
  about = sample.get("about")
  if isinstance(about, dict) and field in about:
    return about[field]
  return sample.get(field)


def text_field(sample: Sample, field: str) -> str | Unjudgeable:
  """Returns a field (see `prompt_field`) as text; a number is converted to text."""
  value = prompt_field(sample, field)
  if isinstance(value, int | float) and not isinstance(value, bool):
    return str(value)
  if isinstance(value, str):
    return value
  return Unjudgeable(f"no {field}: it is {value!r:.60}, but must be text")


def number_field(sample: Sample, field: str) -> float | Unjudgeable:
  """Returns a numeric field of the sample."""
  value = sample.get(field)
  if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
    return float(value)
  return Unjudgeable(f"no {field}: it is {value!r:.60}, but must be a number")


def prompt_text(sample: Sample) -> str:
  """Returns the prompt as text; the contents of chat messages are joined by newlines."""
  prompt = sample.get("prompt")
  if isinstance(prompt, str):
    return prompt
  messages = prompt if isinstance(prompt, list) else []
  contents = [m.get("content") for m in messages if isinstance(m, dict)]
  return "\n".join(s for s in contents if isinstance(s, str))


def answer_part(text: str) -> str:
  """Returns the part of a text after its reasoning (after the last "</think>")."""
  return text.rpartition(THINK_END)[2]
