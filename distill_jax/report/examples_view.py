"""The sections of the page with examples: predictions token by token, and generations.

Every token of a text is a radio button, so that a pointer, a finger and the arrow keys select it
without a script; what the models predict there is shown next to the text.
"""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from distill_jax.report.examples import TEACHER, Examples, Generation, Prediction, Token
from distill_jax.report.numbers import text as number
from distill_jax.report.numbers import tone
from distill_jax.report.results import MODELS

HALF_HEAT = 1.0  # the KL in nats at which a token has half of the colour
LEGEND = (0.1, 0.5, 1.0, 2.0, 5.0)  # nats
SHOWN = 2000  # characters of a generation, at most
SPACE, NEWLINE, TAB, PART = "·", "↵", "⇥", "⋯"  # PART: a part of a character


class Student(NamedTuple):
  """A student whose predictions are shown.

  Attributes:
    name: Its name in the predictions.
    kind: The CSS class of its column, which is shown while the student's radio button is selected;
      "" for a column that is always shown.
    variable: The CSS variable with the colour of its KL; "--k" is the one that colours a token.
  """

  name: str
  kind: str = ""
  variable: str = "--k"


def sections(labels: Mapping[str, str], examples: Examples) -> list[tuple[str, str]]:
  """Returns the (title, HTML) of each section that has examples."""
  found = []
  if examples.texts:
    found.append(("Predictions token by token", _texts(labels, examples)))
  if examples.generations:
    parts = "".join(_generation(labels, g) for g in examples.generations)
    found.append(("Generations side by side", f'<p class="facts">Greedy decoding.</p>{parts}'))
  return found


def _texts(labels: Mapping[str, str], examples: Examples) -> str:
  names = dict.fromkeys(name for text in examples.texts for t in text for name in t.predictions)
  ordered = [name for name in names if name != TEACHER]
  ordered.sort(key=lambda name: name != "distilled")  # it is the one shown first
  students = [Student(name, f" s{i}", f"--k{i}") for i, name in enumerate(ordered)]
  picks = "".join(
    f'<input type="radio" name="student" id="s{i}"{" checked" if i == 0 else ""}>'
    f'<label for="s{i}"><i class="dot {tone(name)}"></i>{html.escape(labels.get(name, name))}'
    "</label>"
    for i, name in enumerate(ordered)
  )
  teacher = "The teacher's probabilities are exact."
  if examples.samples:
    teacher = f"The teacher's probabilities are estimated from {examples.samples} samples."
  texts = "".join(
    text_of_tokens(labels, students, f"Text {i + 1}", f"t{i}", text)
    for i, text in enumerate(examples.texts)
  )
  return (
    '<p class="facts">Held-out texts. The colour of a token is the KL divergence between teacher '
    "and student where they predict it. Point at a token, tap it, or use the arrow keys, to see "
    f"what the models predict. {teacher}</p>"
    f'<div class="view">{picks}{scale()}{texts}</div>'
  )


def scale() -> str:
  """Returns the colours of some KL divergences."""
  shown = "".join(f'<span class="t" style="--k:{_heat(kl):.2f}">{kl:g}</span>' for kl in LEGEND)
  return f'<p class="legend scale"><span>KL in nats</span>{shown}</p>'


def text_of_tokens(
  labels: Mapping[str, str],
  students: Sequence[Student],
  title: str,
  group: str,
  text: Sequence[Token],
) -> str:
  """Returns a text. At first, the token with the greatest KL of the first student is selected.

  Args:
    labels: The displayed names of models.
    students: The students of the text.
    title: The title of the text.
    group: The name of the text's radio buttons, different for each text on the page.
    text: The tokens.
  """
  first = [_kl(token, students[0].name) if students else 0.0 for token in text]
  chosen = max(range(len(text)), key=lambda i: -1.0 if math.isnan(first[i]) else first[i])
  tokens = "".join(
    _token(labels, students, token, group, i == chosen) for i, token in enumerate(text)
  )
  means = ", ".join(
    f"{labels.get(s.name, s.name)} {_mean([_kl(t, s.name) for t in text if t.predictions])}"
    for s in students
  )
  return (
    f"<h3>{html.escape(title)}: mean KL {html.escape(means)}</h3>"
    f'<div class="text" role="radiogroup" aria-label="Tokens of {html.escape(title)}">{tokens}'
    "</div>"
  )


def _mean(values: Sequence[float]) -> str:
  return number(sum(values) / len(values), 2) if values else "not measured"


def _kl(token: Token, model: str) -> float:
  return token.predictions[model].kl if model in token.predictions else 0.0


def _heat(kl: float) -> float:
  """Returns the strength of the colour for a KL divergence, from 0 to 1."""
  return 1 - 2 ** (-max(kl, 0.0) / HALF_HEAT) if math.isfinite(kl) else 1.0


def _token(
  labels: Mapping[str, str], students: Sequence[Student], token: Token, group: str, is_chosen: bool
) -> str:
  shown = _visible(token.text, in_text=True)
  if not token.predictions:
    return f'<span class="t">{shown}</span>'
  heat = ";".join(f"{s.variable}:{_heat(_kl(token, s.name)):.2g}" for s in students)
  models = [(TEACHER, ""), *((s.name, s.kind) for s in students)]
  columns = "".join(
    _column(labels.get(name, name), kind, token.text, token.predictions[name], name == TEACHER)
    for name, kind in models
    if name in token.predictions
  )
  checked = " checked" if is_chosen else ""
  return (
    f'<label><input type="radio" name="{group}"{checked}><span class="t" style="{heat}">{shown}'
    f'</span><span class="tip"><b>{_visible(token.text)}</b>{columns}</span></label>'
  )


def _column(label: str, kind: str, text: str, prediction: Prediction, is_teacher: bool) -> str:
  """Returns the most probable tokens of one model, and its probability of the text's token."""
  facts = [] if prediction.p is None else [f"{_percent(prediction.p)} for this token"]
  facts += [] if is_teacher else [f"KL {number(prediction.kl, 2)}"]
  rows = "".join(
    f"<i{' class=x' if token == text else ''}>{_visible(token)}<b>{_percent(p)}</b></i>"
    for token, p in prediction.top
  )
  return (
    f'<span class="col{kind}"><u>{html.escape(label)}</u><small>{"<br>".join(facts)}</small>{rows}'
    "</span>"
  )


def _percent(p: float) -> str:
  if not math.isfinite(p):
    return "NaN"
  return "&lt;0.1%" if p < 0.0005 else f"{100 * p:.1f}%" if p < 0.0995 else f"{100 * p:.0f}%"


def _visible(text: str, in_text: bool = False) -> str:
  """Returns the HTML of a token with visible white space.

  Args:
    text: The token.
    in_text: True in a running text, where spaces before words are plain and lines are broken.
  """
  if not text:
    return f'<q title="a part of a character">{PART}</q>'
  space = " " if in_text and not text.isspace() else SPACE
  marks = {" ": space, "\t": TAB, "\n": f"{NEWLINE}<br>" if in_text else NEWLINE}
  return "".join(marks.get(c) or html.escape(_escape(c)) for c in text)


def _escape(c: str) -> str:
  """Returns a character, or its code if it is a control or changes the order of the text."""
  return ascii(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c != "\u200d" else c


def _generation(labels: Mapping[str, str], generation: Generation) -> str:
  order = [*MODELS, *generation.texts]
  cards = "".join(
    f'<div><h3><i class="dot {tone(name)}"></i>{html.escape(labels.get(name, name))}</h3>'
    f'<p dir="auto">{_plain(text)}</p></div>'
    for name, text in sorted(generation.texts.items(), key=lambda item: order.index(item[0]))
  )
  if generation.reference:
    cards += f'<div><h3>Reference</h3><p dir="auto">{_plain(generation.reference)}</p></div>'
  return (
    f'<div class="generation"><blockquote dir="auto">{_plain(generation.prompt)}</blockquote>'
    f'<div class="cards">{cards}</div></div>'
  )


def _plain(text: str) -> str:
  """Returns the HTML of a text that may be long, empty or hostile."""
  if not text.strip():
    return f"<small>{'only white space' if text else 'empty'}</small>"
  cut = text[:SHOWN] + ("…" if len(text) > SHOWN else "")
  lines = re.sub(r"\n{3,}", "\n\n", cut.strip("\n "))
  return "".join(html.escape(c if c in "\n\t" else _escape(c)) for c in lines)
