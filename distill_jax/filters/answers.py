r"""Final answers in texts: the last \boxed{…}, the text after "####", or the last number."""

from __future__ import annotations

import re
from fractions import Fraction

BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\?[{}]")
FRACTION = r"\\[dt]?frac\s*(?:\{-?\d+\}|\d)\s*(?:\{\d+\}|\d)"
WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
DIGITS = rf"{WHOLE}(?:\.\d+)?|\.\d+"
MIXED = rf"{WHOLE}(?:[ ]?{FRACTION}|[ ]\d+/\d+)"
NUMBER = re.compile(
  rf"(?<![\w.\\])(?:-[€£¥]?)?\$?(?:{MIXED}|{FRACTION}|(?:{DIGITS})(?:/\d+)?)(?:\\?%)?"
)
GROUPS = re.compile(r"(?<=\d)(?:\\[,!;:\s]|\{,\}|~)(?=\d{3}(?!\d))")  # 1\,000, 1{,}000
TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
MINUS = re.compile(
  r"[\u2212\ufe63\uff0d]|(?<![\w)}])\u2013(?=[.$]?\d)"
)  # the en dash in 3–5 is kept
WORD = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{2,}")  # but not a TeX command
UNITS = re.compile(r"(?<=[\d%])(?:\s+[a-z]+)+\.?$")
PLAIN_FRACTION = re.compile(rf"(-?)({WHOLE})?\\frac(?:\{{(-?\d+)\}}|(\d))(?:\{{(\d+)\}}|(\d))")
SPACED = re.compile(rf"(?<![\w.,/])({WHOLE})\s+(\d+)/(\d+)\b")  # 3 1/2
MAX_LENGTH = 4000  # of a number to convert; Python's limit is 4,300 digits


def boxed(text: str) -> str | None:
  r"""Returns the content of the last complete \boxed{…} or \fbox{…} that is not empty, or None."""
  found, content = -1, None
  starts: list[int] = []  # of the contents of open boxes; -1 for other open braces
  for brace in BRACE.finditer(text):
    if brace[0] == "}":
      start = starts.pop() if starts else -1
      inside = text[start : brace.start()].strip() if start > found else ""
      if inside:
        found, content = start, inside
    elif brace[0] not in (r"\{", r"\}"):
      starts.append(brace.end() if brace[0] != "{" else -1)
  return content


def final(text: str, box_only: bool = False) -> str | None:
  r"""Returns the final answer in a text, or None.

  The answer is the content of the last \boxed{…}, else the line after the last "####" (see
  `hash_line`), else the last number.

  Args:
    text: The text, without the reasoning.
    box_only: True to accept only \boxed{…}.
  """
  text = MINUS.sub("-", text)
  answer = boxed(text)
  if answer is not None or box_only:
    return answer
  if (answer := hash_line(text)) is not None:
    return answer
  numbers = NUMBER.findall(text)
  return numbers[-1] if numbers else None


def hash_line(text: str) -> str | None:
  """Returns the line after the last "####", or None if it is a Markdown heading.

  A line is a heading if it has words, except for units after a number, and other lines follow it.
  """
  _, mark, after = text.rpartition("####")
  line, _, rest = after.strip().partition("\n")
  line = line.replace("**", "").strip("* \t\r")
  is_heading = rest and WORD.search(UNITS.sub("", TEXT.sub("", line)))
  return line if mark and line and not is_heading else None


def key(text: str) -> str:
  r"""Returns the answer in an answer key.

  The key may be a solution with the answer in \boxed{…} or after "####". Otherwise, the whole key
  is the answer.
  """
  text = MINUS.sub("-", text)
  inside = boxed(text)
  if inside is not None:
    return inside
  return text.rpartition("####")[2].strip()


def unwrapped(answer: str) -> str:
  r"""Returns the content of an answer that is a single \text{…}, or the answer unchanged."""
  match = TEXT.fullmatch(answer.strip())
  return match[1].strip() if match else answer


def mixed(answer: str) -> str:
  r"""Returns an answer with mixed numbers as in TeX, e.g. "3\frac{1}{2}" for "3 1/2"."""
  return SPACED.sub(r"\1\\frac{\2}{\3}", answer)


def canonical(answer: str) -> str:
  r"""Returns one spelling for equivalent spellings of an answer.

  For example, "0.5", "1/2" and "\frac{1}{2}" all become "1/2". Unlike the filter `math`, this does
  not evaluate expressions. Numbers of MAX_LENGTH characters and more keep their spelling.
  """
  s = mixed(TEXT.sub(r"\1", GROUPS.sub("", MINUS.sub("-", answer.strip()))))
  s = re.sub(r"\\(?:left|right|!|,|;|\s)|\^\s*\{?\\circ\}?|°|\\?[$%]|[€£¥\s]", "", s)
  s = s.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").rstrip(".")
  if len(s) >= MAX_LENGTH:
    return s.casefold()
  if match := PLAIN_FRACTION.fullmatch(s):
    sign, whole, a, b, c, d = match.groups()
    above = int(a or b) + int((whole or "0").replace(",", "")) * int(c or d)
    s = f"{sign}{above}/{c or d}".replace("--", "")
  if re.fullmatch(rf"-?(?:{DIGITS})(?:/\d+)?", s):
    numerator, _, denominator = s.replace(",", "").partition("/")
    if not denominator or int(denominator):
      return str(Fraction(numerator) / int(denominator or 1))
  return s.casefold()
