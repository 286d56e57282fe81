"""examples.json: read with its faults, and shown on the page, hostile texts included."""

import json
import math
import re

import pytest
from html_pages import Page

from distill_jax.errors import InputError
from distill_jax.report import examples, examples_view
from distill_jax.report.examples import Examples, Generation, Prediction, Token
from distill_jax.report.html_report import write_report

pytestmark = pytest.mark.smoke

HOSTILE = "</span></script><img src=x onerror=alert(1)>&\u202e\x00"


def token(text, kl=1.0, top=" the", **students):
  """Returns a token; the teacher and every student predict `top` most."""
  row = ((top, 0.5), (HOSTILE, 0.25), ("\n", 0.125), ("\\xc3", 0.0625), ("", 0.0001))
  models = {"teacher": Prediction(0.5, row, 0.0), "distilled": Prediction(0.25, row, kl)}
  return Token(text, models | {n: Prediction(None, row, x) for n, x in students.items()})


TEXT = (
  Token("Once", {}),
  token(" the", 0.5, hard=3.0),
  token(HOSTILE, 4.0, hard=1.0),
  token("\n", math.nan, hard=1.0),
  token("", 0.0, hard=1.0),
  token("\t ", 0.25, hard=1.0),
)
EXAMPLES = Examples(
  (TEXT,),
  (Generation(HOSTILE, {"distilled": "y" * 3000, "teacher": HOSTILE, "start": " \n"}, "שלום"),),
  samples=63,
)


def page(found):
  html = "".join(part for _, part in examples_view.sections({"hard": "Hard labels"}, found))
  return html, Page(html)


def test_the_file_holds_the_examples(tmp_path):
  (tmp_path / examples.FILE).write_text(json.dumps(EXAMPLES.to_json(), allow_nan=False))
  found = examples.read(tmp_path)
  assert repr(found) == repr(EXAMPLES)  # NaN is not equal to itself
  assert examples.read(tmp_path / "none") == Examples()


@pytest.mark.parametrize(
  "change, problem",
  [
    (lambda tree: tree.pop("texts"), "KeyError: 'texts'"),
    (lambda tree: tree["texts"][0][1].pop("predictions"), "KeyError: 'predictions'"),
    (lambda tree: tree["texts"][0][0].update(text=3), "TypeError: A text is 3"),
    (lambda tree: tree.update(texts=[[3]]), "TypeError: .*subscriptable"),
    (lambda tree: tree.update(generations=[{"prompt": "a", "texts": []}]), "AttributeError"),
    (
      lambda tree: tree["texts"][0][1]["predictions"]["teacher"]["top"].append(["a", 48.7]),
      "ValueError: A probability is 48.7",
    ),
  ],
)
def test_a_broken_file_is_named(tmp_path, change, problem):
  tree = EXAMPLES.to_json()
  change(tree)
  (tmp_path / examples.FILE).write_text(json.dumps(tree))
  expected = rf"examples.json does not hold examples .*\({problem}.*\). Run evaluate again\."
  with pytest.raises(InputError, match=expected):
    examples.read(tmp_path)
  (tmp_path / examples.FILE).write_text('{"texts": [')
  with pytest.raises(InputError, match=r"examples.json is not JSON .* Run evaluate again\."):
    examples.read(tmp_path)


def test_hostile_texts_are_escaped():
  html, found = page(EXAMPLES)
  for tag, attributes in found.tags:
    assert tag not in ("script", "img")
    assert not any(name.startswith("on") for name in attributes)
  assert "\u202e" not in html and "\x00" not in html
  assert r"\u202e\x00" in html


def test_tokens_are_coloured_and_selectable_without_a_mouse():
  html, found = page(EXAMPLES)
  radios = [a for t, a in found.tags if t == "input" and a["name"] == "t0"]
  assert len(radios) == 5 and all(a["type"] == "radio" for a in radios)
  assert ["checked" in a for a in radios] == [False, True, False, False, False]  # KL 4 is greatest
  # Half of the colour at 1 nat: 1 - 2 ** -kl, of the distilled student (k0) and the other (k1).
  colours = [a["style"] for t, a in found.tags if t == "span" and "--k0" in a.get("style", "")]
  assert colours[:3] == ["--k0:0.29;--k1:0.88", "--k0:0.94;--k1:0.5", "--k0:1;--k1:0.5"]
  assert "KL NaN" in html and "estimated from 63 samples" in html
  assert "mean KL distilled NaN, Hard labels 1.40" in html


def test_white_space_and_parts_of_characters_are_visible():
  html, _ = page(EXAMPLES)
  tokens = re.findall(r'<span class="t" style="--k0[^>]*>(.*?)</span><span class="tip"><b>', html)
  assert tokens[0] == " the" and tokens[2] == "↵<br>"
  assert "⋯" in tokens[3] and tokens[4] == "⇥·"
  assert "<i class=x>·the<b>50%</b></i>" in html and "<b>&lt;0.1%</b>" in html


def test_generations_are_in_the_order_of_models_and_cut():
  html, found = page(Examples((), EXAMPLES.generations))
  words = found.words
  order = [words.index(name) for name in ("teacher", "start", "distilled", "Reference")]
  assert order == sorted(order) and "only white space" in words and "שלום" in words
  assert "y" * examples_view.SHOWN + "…" in words and len(html) < 4_000


def test_the_page_shows_examples_within_its_size(tmp_path):
  """The arithmetic of examples.py: about 250 bytes per token and model."""
  words = ["".join(chr(97 + (i * j) % 26) for j in range(6)) for i in range(examples.TOP)]
  top = tuple((f" {word}", 0.2) for word in words)
  models = ("teacher", "distilled", "hard", "other")
  text = tuple(
    Token(" words", {name: Prediction(0.2, top, 1.0) for name in models})
    for _ in range(examples.TOKENS)
  )
  html, _ = page(Examples((text,) * 3))
  assert len(html) < 3 * examples.TOKENS * 4 * 250
  (tmp_path / examples.FILE).write_text(json.dumps(EXAMPLES.to_json()))
  model = {"ce": 3.0, "kl": 1.0, "agreement": 0.5}
  write_report(tmp_path, {"models": {"teacher": model, "distilled": model}, "tokens": 5}, runs={})
  whole = Page((tmp_path / "report.html").read_text())
  assert "Predictions token by token" in whole.words and "Generations side by side" in whole.words
