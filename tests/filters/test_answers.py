"""Filters that judge answers (math, exact and regex), and the extraction of answers."""

import pytest
from tiny_samples import a_sample, judge, kinds

from distill_jax.errors import InputError
from distill_jax.filters import answers, math
from distill_jax.filters.samples import Unjudgeable

EQUAL = [
  (r"\frac12", "0.5"),
  ("1/2", r"\dfrac{1}{2}"),
  (r"336^\circ", "336"),
  ("336", r"336^\circ"),
  ("1,000", "1000"),
  (r"5\text{ cm}", "5"),
  (r"\{1,2\}", r"\{2,1\}"),
  ("3", "x=3"),
  (r"\sqrt{8}", r"2\sqrt2"),
  ("x^2+2x+1", "(x+1)^2"),
  (r"\text{B}", "B"),
  ("72", "72.00"),
  ("18", r"\$18"),
  ("18", "18 dollars"),
  (r"3\frac{1}{2}", "7/2"),
  (r"\frac{\pi}{2}", r"0.5\pi"),
  ("Paris", "paris"),
  ("Paris", r"\text{paris}"),
  (r"\text{No}", "no"),
  (r"\text{June 20}", "June 20"),
  ("So 70 + 2 = 72.\n#### 72", "72"),
  ("1000", "1{,}000"),
  (r"1\,000", "1000"),
  (r"\frac{1}{2}", "0.5."),
  ("50", r"50\%"),
  ("[0,1)", "[0, 1)"),
  (r"(0,1)\cup(2,3)", r"(0,1) \cup (2,3)"),
  (r"5\text{ cm}^2", "5"),
  (r"Thus \boxed{\frac{3}{4}}.", "0.75"),
  ("–5", "-5"),
  ("3.5", "3 1/2"),
  ("3 1/2 cups", r"\frac{7}{2}"),
  ("18", "€18"),
  ("-18", "-£18"),
]
OTHER = [
  ("72", "73"),
  ("(1,2)", "(2,1)"),
  ("Paris", "Pairs"),
  (r"\frac12", r"\frac13"),
  ("1000", "1"),
  ("x^2+1", "(x+1)^2"),
  ("No", "On"),
  ("[0,1)", "[0,1]"),
  ("1,2", "1"),
  (r"\text{(C)}", "(D)"),
  ("2", "-2"),
  (r"\sqrt{2}", "1.41"),
  ("1.5", "3 1/2"),
  ("31/2", "3 1/2"),
]


def test_math_accepts_equal_answers_only():
  pairs = [*EQUAL, *OTHER]
  samples = [
    a_sample(rf"I try \boxed{{1234}} first. Then \boxed{{{a}}}, done in 7.", answer=key, sample=i)
    for i, (key, a) in enumerate(pairs)
  ]
  want = [None] * len(EQUAL) + ["wrong"] * len(OTHER)
  assert list(zip(pairs, kinds("math", samples), strict=True)) == list(
    zip(pairs, want, strict=True)
  )


def test_math_extracts_the_final_answer():
  texts = ["It is 5, no: 72.", "#### 72", "<think>\\boxed{72}</think> It is 71", "no idea", "$72"]
  samples = [a_sample(t, answer="#### 72", sample=i) for i, t in enumerate(texts)]
  assert kinds("math", samples) == [None, None, "wrong", "no final answer", None]
  boxed = kinds("math", samples, box_only=True)
  assert boxed == ["no final answer"] * 5


def test_math_reports_a_key_that_cannot_be_parsed():
  keys = ["", r"\frac{", "???", None, ["4"], 4, 4.0]
  whys = judge("math", [a_sample(answer=key, sample=i) for i, key in enumerate(keys)])
  assert [isinstance(why, Unjudgeable) for why in whys] == [True] * 5 + [False] * 2
  assert whys[5:] == [None, None] and "key cannot be parsed" in whys[1]


def test_math_survives_answers_that_crash_or_hang_sympy():
  bombs = [r"\boxed{9^{9^{9^{9}}}+1}", r"\boxed{\binom{10^9}{5\cdot 10^8}}", r"\boxed{4}"]
  whys = kinds(
    "math", [a_sample(t, answer="4", sample=i) for i, t in enumerate(bombs)], seconds=1.0
  )
  assert whys[2] is None and all(whys[:2])
  slow = a_sample(r"\boxed{10^{10^{7}}!}", answer="4")
  assert kinds("math", [slow], seconds=0.5)[0] in ("timeout", "crashed", "wrong")


@pytest.mark.parametrize(
  ("text", "answer"),
  [
    ("#### Step 1: add\n12 + 30 = 42\n\n#### Final answer\n\nThe total is 42.", "42"),
    ("#### Step 2: subtract\nThe answer is 7.", "7"),
    ("#### 1. Add\nIt is 5\n#### 2. Subtract\nSo 7.", "7"),
    ("#### **18**", "18"),
    ("#### **18**\n\nIn 2 steps.", "18"),
    ("#### 18 dollars a day\n\nIn 2 steps.", "18 dollars a day"),
    ("####\n\\frac{1}{2}\nThat is 50 of 100.", "\\frac{1}{2}"),
    ("12 + 6\n#### x = 18\nQuestion: 5?", "x = 18"),
    ("It rhymes.\n#### Paris", "Paris"),
    ("It is 7.\n####", "7"),
    ("####", None),
    ("So x is 3 1/2.", "3 1/2"),
    ("So x is $-1,003\\frac{1}{2}$.", "-1,003\\frac{1}{2}"),
    ("On line 3\n1/2 of them.", "1/2"),
    ("It lost -€1/2, or -€18", "-€18"),
    (r"It is \boxed{5}, as asked within \boxed{}.", "5"),
    (r"Within \boxed{ }, as asked: 5", "5"),
    (r"} \boxed{1} \boxed{\boxed{2}3} \boxed{4 {5}", "2"),
    ("The answer is −5.", "-5"),
    ("The answer is **–$5**.", "-$5"),
    ("#### －5", "-5"),
    (r"\boxed{−\frac{1}{2}}", r"-\frac{1}{2}"),
    ("It is 2 – 5 or 2–5.", "5"),
    (r"\boxed{New York–London, 3–5}", "New York–London, 3–5"),
  ],
)
def test_the_final_answer_of_a_text(text, answer):
  assert answers.final(text) == answer


@pytest.mark.parametrize(
  ("a", "b"),
  [
    ("0.5", r"\frac{1}{2}"),
    ("1,000", "1000.0"),
    (r"336^\circ", "336"),
    (r"\text{ B}", "b"),
    (r"\$18", "18"),
    (r"1\,000", "1{,}000"),
    ("-3/6", r"-\frac12"),
    ("2/0", "2/0"),
    ("10%", r"10\%"),
    ("−5", "-5"),
    ("–.5", "-0.5"),
    ("3 1/2", "3.5"),
    (r"-1,003\dfrac{1}{2}", "$-1003 1/2"),
    ("£3 1/2", "7/2"),
    ("€18", "18"),
    ("1." + "3" * 3000, "1." + "3" * 3000 + "0"),
    ("0." + "3" * 5000, " 0." + "3" * 5000),
    ("3" * 5000, "$" + "3" * 5000),
  ],
)
def test_equal_answers_have_one_canonical_form(a, b):
  assert answers.canonical(a) == answers.canonical(b)
  assert answers.canonical(a) != answers.canonical("7")


@pytest.mark.parametrize(
  "answer",
  ["x = 5", "5 cm", r"5\text{ cm}^2", r"\text{5}", "€5.00", r"t=\frac{10}{2}\text{ s}", "5."],
)
def test_votes_count_what_math_considers_equal_as_one_answer(answer):
  assert math.spelling(answer) == math.spelling("5") == "5"
  assert len({math.spelling(x) for x in ("5", "x+5", "5x", "2x=5", "-5", "25", "")}) == 7


def test_a_list_is_not_a_mixed_number():
  assert answers.canonical(r"5, \frac{1}{2}") != answers.canonical("5.5")


def test_boxes_may_nest_and_the_last_complete_one_counts():
  assert answers.boxed(r"\boxed{1} \boxed{\frac{a}{\{b\}}} \boxed{cut") == r"\frac{a}{\{b\}}"
  assert answers.boxed("none") is None
  assert answers.boxed(r"\boxed{" * 10_000 + "5}") == "5"  # in linear time


def test_exact():
  samples = [a_sample(t, answer="New York") for t in ("new  york.", "York", "I think:\nNew York")]
  assert kinds("exact", samples) == [None, "wrong", "wrong"]
  assert kinds("exact", samples, of="last line") == [None, "wrong", None]
  assert kinds("exact", [a_sample("it is 7", answer="x #### 7")], of="final") == [None]
  assert isinstance(judge("exact", [a_sample(answer=" ")])[0], Unjudgeable)


def test_regex():
  samples = [a_sample("Answer: 4\nok"), a_sample("4"), a_sample("Answer: 4\nAs an AI")]
  whys = kinds("regex", samples, must=("^Answer: \\d+$",), must_not=("as an ai", "AI"))
  assert whys == [None, "lacks ^Answer", "has AI"]
  with pytest.raises(InputError, match=r"^must is '\('; expected a valid regular expression"):
    judge("regex", [], must=("(",))
