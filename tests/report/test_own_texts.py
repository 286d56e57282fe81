"""The student's own texts: written by a diagnosis, read and shown by the report."""

import math

import numpy as np
import pytest
import tiny
from html_pages import Page

from distill_jax.data.token_bytes import reader
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.on_policy import own_texts_file
from distill_jax.report import own_texts, own_texts_view
from distill_jax.report.html_report import write_report
from distill_jax.report.own_texts import OwnText
from distill_jax.training.metric_writer import MetricsWriter

pytestmark = pytest.mark.smoke

T, K = 40, 3
PROMPT, TEXT = "What do you think of this < b > text?", "Überall"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tiny.write_tokenizer(tmp_path_factory.mktemp("bytes") / "tokenizer.json")
  return Tokenizer(path.read_bytes(), "bytes", None, None)


def texts(tokenizer, **teacher):
  """Returns Diagnosed.texts of two rows: PROMPT + TEXT, and padding."""
  ids = tokenizer.encode(PROMPT + TEXT)
  rng, T = np.random.default_rng(0), len(ids) + 3
  token, label, mask = np.zeros((2, T), int), np.zeros((2, T), int), np.zeros((2, T), bool)
  token[0, : len(ids)] = ids
  label[0, : len(ids) - 1] = ids[1:]
  mask[0, len(tokenizer.encode(PROMPT)) - 1 : len(ids) - 1] = True
  model = lambda: {
    "logp": -rng.exponential(size=(2, T)),
    "top_ids": rng.integers(0, 256, (2, T, K)),
    "top_p": np.array([0.5, 0.25, 0.0]) + np.zeros((2, T, 1)),
  }
  theirs = {**model(), "reverse_kl": np.full((2, T), 1.50004), **teacher}
  theirs = {key: x for key, x in theirs.items() if x is not None}
  found = {"token": token, "label": label, "mask": mask, "student": model()}
  return found | {"teachers": {"teacher": theirs}}


def test_the_file_holds_the_end_of_the_prompt_and_the_text(tokenizer, tmp_path):
  own_texts_file.write(tmp_path, 30, texts(tokenizer), reader(tokenizer))
  (own,) = own_texts.read(tmp_path)  # the row of padding is not a text
  assert (own.teacher, own.step) == ("teacher", 30)
  prompt = [t.text for t in own.tokens if not t.predictions]
  assert "".join(prompt) == PROMPT[-own_texts_file.CONTEXT :]
  sampled = [t for t in own.tokens if t.predictions]
  assert "".join(t.text for t in sampled) == TEXT
  assert sampled[0].text == ""  # the first of the two bytes of Ü
  student = sampled[3].predictions["student"]
  at = np.flatnonzero(texts(tokenizer)["mask"][0])[3]
  p = np.exp(texts(tokenizer)["student"]["logp"][0, at])
  assert student.p == float(f"{p:.4g}") and student.kl == 1.5
  assert [p for _, p in student.top] == [0.5, 0.25]  # an entry without mass is not shown


def test_a_teacher_whose_scores_lack_numbers(tokenizer, tmp_path):
  stored = texts(tokenizer, logp=None, top_ids=None, top_p=None, reverse_kl=None)
  own_texts_file.write(tmp_path, 0, stored, reader(tokenizer))
  (own,) = own_texts.read(tmp_path)
  teacher = own.tokens[-1].predictions["teacher"]
  assert teacher.p is None and teacher.top == ()
  assert math.isnan(own.tokens[-1].predictions["student"].kl)


def test_teachers_keep_their_latest_texts(tokenizer, tmp_path):
  first = texts(tokenizer)
  own_texts_file.write(tmp_path, 0, first, reader(tokenizer))
  other = first | {"teachers": {"math": first["teachers"]["teacher"]}}
  own_texts_file.write(tmp_path, 10, other, reader(tokenizer))
  own_texts_file.write(tmp_path, 20, other, reader(tokenizer))
  assert [(o.teacher, o.step) for o in own_texts.read(tmp_path)] == [("teacher", 0), ("math", 20)]


def test_long_texts_are_cut(tokenizer, tmp_path):
  long = texts(tokenizer)
  wide = lambda x: np.repeat(x, 50, axis=1) if x.ndim > 1 else x
  long = {k: {n: wide(x) for n, x in v.items()} if k == "student" else v for k, v in long.items()}
  long["teachers"] = {
    "teacher": {n: wide(x) for n, x in texts(tokenizer)["teachers"]["teacher"].items()}
  }
  long |= {key: wide(long[key]) for key in ("token", "label", "mask")}
  own_texts_file.write(tmp_path, 0, long, reader(tokenizer))
  (own,) = own_texts.read(tmp_path)
  assert len(own.tokens) == own_texts_file.TOKENS


@pytest.mark.parametrize(
  "text", ['{"teacher": 3}', '{"teacher": {"step": 1, "texts": [[3]]}}', "[1]", "{"]
)
def test_a_broken_file_is_refused(text, tmp_path):
  (tmp_path / own_texts_file.FILE).write_text(text)
  with pytest.raises(InputError, match=r"own_texts.json .*[Dd]elete the file\."):
    own_texts.read(tmp_path)


def test_a_file_that_cannot_be_written_is_refused(tokenizer, tmp_path):
  (tmp_path / own_texts_file.FILE).mkdir()
  with pytest.raises(InputError, match=r"own_texts\.json cannot be written"):
    own_texts_file.write(tmp_path, 0, texts(tokenizer), reader(tokenizer))


def write_run(folder, tokenizer, steps=(0, 10)):
  with MetricsWriter(folder) as metrics:
    for step in steps:
      tenths = {f"reverse_kl_tenth_{n + 1}/teacher": n + step for n in range(9)}
      tenths["reverse_kl_tenth_10/teacher"] = math.nan
      row = {"loss": 1.0, "overlap/teacher": 0.25, "student_mass/teacher": 0.5, "drift": 0.01}
      row |= {"round": step, "entropy": 2.0, "text_length": 30.0, "truncated/math": 0.5}
      metrics.write(step, row | tenths)
  own_texts_file.write(folder, steps[-1], texts(tokenizer), reader(tokenizer))


def test_the_report_shows_the_texts(tokenizer, tmp_path):
  write_run(tmp_path / "distilled", tokenizer)
  write_report(tmp_path)
  page = Page((tmp_path / "report.html").read_text())
  assert "The student's own texts" in page.words
  assert page.row("before step 0")[1:] == [*(f"{n}.00" for n in range(9)), "—"]
  assert page.row("before step 10")[1:4] == ["10.00", "11.00", "12.00"]
  assert "Text 1, before step 10: mean KL student 1.50" in page.words
  titles = {"Overlap", "Drift", "Entropy of the student", "Length of texts", "Truncated, math"}
  assert titles < set(page.words)
  groups = [attrs["name"] for tag, attrs in page.tags if tag == "input"]
  assert set(groups) == {"own0-0"}
  kinds = [attrs.get("class") for tag, attrs in page.tags if tag == "span"]
  assert "col" in kinds and "col s0" not in kinds  # no button hides the student's column


def test_a_run_of_train_has_no_such_section(tokenizer, tmp_path):
  with MetricsWriter(tmp_path / "distilled") as metrics:
    metrics.write(0, {"loss": 1.0, "entropy": 2.0})
  write_report(tmp_path)
  html = (tmp_path / "report.html").read_text()
  assert "own texts" not in html and "Entropy" not in html


def test_three_texts_are_shown_of_different_teachers_first():
  texts = [OwnText(name, 0, ()) for name in "aaabbc"]
  chosen = [own.teacher for own in own_texts_view._chosen(texts)]
  assert chosen == ["a", "b", "c"]
