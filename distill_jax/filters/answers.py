r"""Final answers in text: the last \boxed{…}, what follows "####", or the last number."""

from __future__ import annotations

import re
from fractions import Fraction

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
FRACTION = r"\\[dt]?frac\s*(?:\{-?\d+\}|\d)\s*(?:\{\d+\}|\d)"
DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
NUMBER = re.compile(rf"(?<![\w.\\])-?\$?(?:{FRACTION}|(?:{DIGITS})(?:/\d+)?)(?:\\?%)?")
GROUPS = re.compile(r"(?<=\d)(?:\\[,!;:\s]|\{,\}|~)(?=\d{3}(?!\d))")  # 1\,000, 1{,}000
TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
PLAIN_FRACTION = re.compile(r"(-?)\\frac(?:\{(-?\d+)\}|(\d))(?:\{(\d+)\}|(\d))")


def boxed(text: str) -> str | None:
  r"""What the last whole \boxed{…} holds."""
  content = None
  for match in BOX.finditer(text):
    depth = 1
    for at in range(match.end(), len(text)):
      depth += {"{": 1, "}": -1}.get(text[at], 0) * (text[at - 1] != "\\")
      if not depth:
        content = text[match.end() : at].strip()
        break
  return content


def final(text: str, box_only: bool = False) -> str | None:
  """The final answer that a text gives; None where it gives none."""
  answer = boxed(text)
  if answer is not None or box_only:
    return answer or None
  if "####" in text:
    lines = text.rpartition("####")[2].strip().splitlines()
    return lines[0].strip() if lines else None
  numbers = NUMBER.findall(text)
  return numbers[-1] if numbers else None


def key(text: str) -> str:
  """The answer in an answer key, which may be a worked solution."""
  inside = boxed(text)
  if inside is not None:
    return inside
  return text.rpartition("####")[2].strip()


def unwrapped(answer: str) -> str:
  r"""What \text{…} holds where an answer is nothing else."""
  match = TEXT.fullmatch(answer.strip())
  return match[1].strip() if match else answer


def canonical(answer: str) -> str:
  """One spelling for answers that are plainly equal: 0.5, 1/2 and \\frac{1}{2} are "1/2"."""
  s = TEXT.sub(r"\1", GROUPS.sub("", answer.strip()))
  s = re.sub(r"\\(?:left|right|!|,|;|\s)|\^\s*\{?\\circ\}?|°|\\?[$%]|\s", "", s)
  s = s.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").rstrip(".")
  if match := PLAIN_FRACTION.fullmatch(s):
    sign, a, b, c, d = match.groups()
    s = f"{sign}{a or b}/{c or d}".replace("--", "")
  if re.fullmatch(rf"-?(?:{DIGITS})(?:/\d+)?", s):
    above, _, below = s.replace(",", "").partition("/")
    if not below or int(below):
      return str(Fraction(above) / int(below or 1))
  return s.casefold()
