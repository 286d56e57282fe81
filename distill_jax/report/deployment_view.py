"""The savings of a student, as a section of the page and of the model card."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator

from distill_jax.report.deployment import STUDENT, Deployment, ModelFile
from distill_jax.report.numbers import percent, size, text

TITLE = "What a student saves"
NONE = "–"


@dataclasses.dataclass(frozen=True)
class Table:
  """A table, and the sentences that explain it.

  Attributes:
    head: The titles of the columns after the first.
    rows: Rows of a name, the CSS class of its dot ("" without one), and cells.
    about: The explanation.
  """

  head: tuple[str, ...]
  rows: tuple[tuple[str, str, tuple[str, ...]], ...]
  about: str


def section(d: Deployment) -> str:
  """Returns the section of the page, in HTML."""
  return f"<p>{html.escape(headline(d))}</p>" + "".join(map(_html, _tables(d)))


def markdown(d: Deployment) -> list[str]:
  """Returns the lines of the section of a model card, in Markdown."""
  lines = [f"## {TITLE}", "", headline(d)]
  for table in _tables(d):
    lines += ["", "| | " + " | ".join(table.head) + " |", "|---" * (len(table.head) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, _, cells in table.rows]
    lines += ["", table.about]
  return lines


def headline(d: Deployment) -> str:
  """Returns a sentence about the student's smallest file of those that were timed."""
  timed = [f for f in d.files if f.model == STUDENT and f.speedup is not None]
  if not timed:
    return "No file of the student was timed."
  f = min(timed, key=lambda f: f.bytes)
  kl = "" if f.kl_to_float is None else f", at a KL of {f.kl_to_float:.2g} to the float32 student"
  return (
    f"As {f.format}, the student takes {size(f.bytes, 'B')}, "
    f"{percent(d.bytes_ratio_to_teacher(f))} of its teacher's {d.reference} file, and generates "
    f"{f.speedup:.2f} times as many tokens per second{kl}."
  )


def _tables(d: Deployment) -> Iterator[Table]:
  yield Table(
    (
      "file",
      "of the teacher's",
      "KL to float32",
      "memory",
      "tokens per second",
      "speed-up",
      "same format",
    ),
    tuple((f"{f.model.capitalize()}, {f.format}", _tone(f), _cells(d, f)) for f in d.files),
    f"Measured on {d.machine} with {d.runtime}: {d.new} tokens after a prompt of {d.prompt}, per "
    f"second of processor time, the median of {d.rounds} rounds in which teacher and student take "
    f"turns. Shares and speed-ups compare with the teacher ({d.teacher}) in {d.reference}, the "
    "last column with the teacher in the same format. KL: nats per token from the predictions of "
    "the same model in float32, on "
    f"{d.tokens:,} tokens of {d.text}.",
  )
  if d.bounds:
    formats = [f"as {format}" for format, _ in d.bounds[0].files]
    batches = [f"speed-up, batch {n:,}" for n, _ in d.bounds[0].speedups]
    yield Table(
      ("weights", "of the teacher's", *formats, *batches),
      tuple(
        (
          f"{b.student} of {b.teacher}",
          "",
          (
            size(b.student_bytes, "B"),
            percent(b.student_bytes / b.teacher_bytes),
            *(size(n, "B") for _, n in b.files),
            *(f"{x:.1f}×" for _, x in b.speedups),
          ),
        )
        for b in d.bounds
      ),
      "Computed from published shapes, not measured: weights as they are published, and the ratio "
      f"of upper bounds on decoded tokens per second and {d.chip} chip, with {d.context:,} tokens "
      "of context.",
    )


def _cells(d: Deployment, f: ModelFile) -> tuple[str, ...]:
  return (
    size(f.bytes, "B"),
    percent(d.bytes_ratio_to_teacher(f)),
    NONE if f.kl_to_float is None else f"{f.kl_to_float:.2g}",
    NONE if f.memory_bytes is None else size(f.memory_bytes, "B"),
    NONE if f.tokens_per_second is None else text(f.tokens_per_second, 1),
    *(NONE if x is None else f"{x:.2f}×" for x in (f.speedup, f.speedup_in_format)),
  )


def _tone(f: ModelFile) -> str:
  return "distilled" if f.model == STUDENT else "teacher"


def _html(table: Table) -> str:
  head = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in table.head)
  body = ""
  for name, tone, cells in table.rows:
    dot = f'<i class="dot {tone}"></i> ' if tone else ""
    body += f'<tr><th scope="row">{dot}{html.escape(name)}</th>'
    body += "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
  return (
    f'<div class="wide"><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody>'
    f'</table></div><p class="facts">{html.escape(table.about)}</p>'
  )
