"""Texts that a student has sampled in a run of `on_policy`: the content of own_texts.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from distill_jax.errors import InputError
from distill_jax.on_policy.own_texts_file import FILE
from distill_jax.report.examples import Token, token_of
from distill_jax.runtime import json_io, storage

STUDENT = "student"  # its name in the predictions


class OwnText(NamedTuple):
  """A text that the student has sampled, after the end of its prompt.

  Attributes:
    teacher: The teacher of the text.
    step: The step before which the text was compared with the teacher.
    tokens: The tokens, with the predictions of "teacher" and STUDENT.
  """

  teacher: str
  step: int
  tokens: Sequence[Token]


def read(folder: Path) -> tuple[OwnText, ...]:
  """Reads the texts in the folder of a run; returns () if it has none.

  Raises:
    InputError: The file is broken.
  """
  path = storage.fetched(folder / FILE)
  if not path.is_file():
    return ()
  tree = json_io.read_object(path, "delete the file")
  try:
    return tuple(
      OwnText(teacher, int(found["step"]), tuple(map(token_of, text)))
      for teacher, found in tree.items()
      for text in found["texts"]
    )
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    problem = f"{type(error).__name__}: {error}".rstrip(".")
    raise InputError(
      f"{path} does not hold texts as `on_policy` writes them ({problem}). Delete the file."
    ) from error
