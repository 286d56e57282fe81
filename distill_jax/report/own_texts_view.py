"""The section of the page about texts that a student has sampled in a run of `on_policy`."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from distill_jax.on_policy.diagnosis import TENTHS
from distill_jax.report import examples_view
from distill_jax.report.examples_view import Student
from distill_jax.report.numbers import cell, text
from distill_jax.report.own_texts import STUDENT, OwnText
from distill_jax.report.runs import ReportedRun

TEXTS = 3  # of a run, of different teachers first
TENTH = "reverse_kl_tenth_"


def sections(labels: Mapping[str, str], runs: Mapping[str, ReportedRun]) -> list[tuple[str, str]]:
  """Returns the (title, HTML) of the section; [] without a run of `on_policy`."""
  parts = [_run(labels.get(name, name), i, run) for i, (name, run) in enumerate(runs.items())]
  return [("The student's own texts", "".join(parts))] if any(parts) else []


def _run(label: str, number: int, run: ReportedRun) -> str:
  """Returns the part of one run; "" if its student has not sampled texts."""
  rows = list(_tenths(run))
  shown = _chosen(run.own_texts)
  if not rows and not shown:
    return ""
  out = f"<h3>{html.escape(label)}</h3>"
  if rows:
    head = "".join(f'<th scope="col">{n + 1}</th>' for n in range(TENTHS))
    out += (
      '<p class="facts">KL(student || teacher) in nats per token, at each tenth of the texts. A '
      "rise from left to right shows errors that lead to further errors.</p>"
      f'<div class="wide"><table class="results" style="--models:{TENTHS}"><thead><tr><td>Tenth'
      f"</td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
  if shown:
    texts = "".join(
      examples_view.text_of_tokens(
        {}, [Student(STUDENT)], _title(i, own), f"own{number}-{i}", own.tokens
      )
      for i, own in enumerate(shown)
    )
    out += (
      '<p class="facts">The colour of a token is KL(student || teacher) where the student has '
      "sampled it; with stored scores it is log q(token) - log p(token), whose mean over texts is "
      "the same. Each text begins with the end of its prompt.</p>"
      f'<div class="view">{examples_view.scale()}{texts}</div>'
    )
  return out


def _title(i: int, own: OwnText) -> str:
  teacher = "" if own.teacher == "teacher" else f" for the teacher {own.teacher}"
  return f"Text {i + 1}{teacher}, before step {own.step:,}"


def _chosen(texts: Sequence[OwnText]) -> list[OwnText]:
  """Returns at most TEXTS texts, the first one of each teacher before the second ones."""
  by_teacher: dict[str, list[OwnText]] = {}
  for own in texts:
    by_teacher.setdefault(own.teacher, []).append(own)
  ranked = [(i, own) for found in by_teacher.values() for i, own in enumerate(found)]
  return [own for _, own in sorted(ranked, key=lambda pair: pair[0])][:TEXTS]


def _tenths(run: ReportedRun) -> Iterator[str]:
  """Yields the first and the last row of each teacher."""
  teachers = [key.removeprefix(f"{TENTH}1/") for key in run.series if key.startswith(f"{TENTH}1/")]
  for teacher in teachers:
    series = [run.series.get(f"{TENTH}{n + 1}/{teacher}") for n in range(TENTHS)]
    assert series[0] is not None
    for i in dict.fromkeys((0, len(series[0]) - 1)):
      step = int(series[0][i, 0])
      cells = "".join(f"<td>{_cell(xy, i)}</td>" for xy in series)
      name = "" if teacher == "teacher" else f"{html.escape(teacher)}, "
      yield f'<tr><th scope="row">{name}before step {step:,}</th>{cells}</tr>'


def _cell(series: np.ndarray | None, i: int) -> str:
  """Returns the value of a row; NaN is a tenth without tokens."""
  if series is None or i >= len(series) or math.isnan(series[i, 1]):
    return "—"
  return cell(text(float(series[i, 1]), 2))
