r"""Multiple-choice questions with options A, B, C, … that are answered in text."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from distill_jax.errors import InputError
from distill_jax.evals._rows import LETTERS
from distill_jax.filters import SampleFilter, answers
from distill_jax.filters.samples import Sample, Unjudgeable, answer_part, text_field

CHOOSE = (
  "{question}\n\nPlease reason step by step, and give the letter of the right option within "
  "\\boxed{}."
)
CAPITAL = r"((?!I(?:['’]|\s+(?!because|since|as\b|and\b)[a-z]))[A-Z])"  # but not the word "I"
OPTION = r"(?:(?<!answer )(?i:option|choice)\s+\(?)?"
LETTER = rf"[(\[]?\\?(?:text|mathrm|mathbf|textbf)?\{{?\(?\s*{OPTION}{CAPITAL}\s*[)\]}}.:]*"
BOXED = re.compile(rf"{LETTER}(?:\W.*)?", re.DOTALL)
STATED = re.compile(
  r"(?i:\banswer(?:\s+is)?|\b(?:correct|right|best)\s+(?:option|choice)(?:\s+is|:))"
  rf"\W{{0,6}}?\s*{LETTER}(?![A-Za-z])"
)
ALONE = re.compile(rf"{LETTER}\s*")
MARK = re.compile(r"(?<!\w)\(?([A-Z])[.)](?:\s+|$)")
OPTION_LINE = re.compile(rf"{MARK.pattern}(?![a-z])\S")  # not "C. elegans" and not "A) is wrong"


def with_options(question: str, texts: Sequence[str]) -> str:
  """Returns a question followed by its options, one per line, e.g. "A) 42".

  Raises:
    InputError: If there are more options than letters.
  """
  if len(texts) > len(LETTERS):
    raise InputError(f"The question has {len(texts)} options; expected at most {len(LETTERS)}.")
  lines = (f"{letter}) {text.strip()}" for letter, text in zip(LETTERS, texts, strict=False))
  return "\n".join([question.strip(), "", *lines])


def final_letter(text: str) -> str:
  r"""Returns the letter that a text gives as its answer, or "".

  This is the letter in the last \boxed{…}, else after the last "answer:", "answer is" or "correct
  option is", else the whole text if it is a single letter or one line with a single option, e.g.
  "B) 42". Reasoning and emphasis with asterisks are ignored.
  """
  text = answer_part(text).replace("*", "").strip()
  is_line = "\n" not in text
  text = " ".join(text.split())
  box = answers.boxed(text)
  if box is not None:
    match = BOXED.fullmatch(box) or STATED.search(box)
    return match[1] if match else ""
  if last := STATED.findall(text):
    return last[-1]
  if match := ALONE.fullmatch(text):
    return match[1]
  marked = set(MARK.findall(text)) if is_line and OPTION_LINE.match(text) else ()
  return min(marked) if len(marked) == 1 else ""


@dataclasses.dataclass(frozen=True)
class Judge(SampleFilter):
  """Rejects answers whose letter differs from the answer key in the field `answer`."""

  def reject_reason(self, sample: Sample) -> str | None:
    key = text_field(sample, "answer")
    if isinstance(key, Unjudgeable):
      return key
    if len(key) != 1 or key not in LETTERS:
      return Unjudgeable(f"the key cannot be parsed: {key!r:.40}")
    letter = final_letter(sample["text"])
    if not letter:
      return "no final answer"
    return None if letter == key else f"wrong: {letter!r}, but the key is {key!r}"
