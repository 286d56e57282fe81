"""pass@k, majority votes, confidence intervals, and the letters of options."""

import itertools
import math

import numpy as np
import pytest

from distill_jax.evals import _option_letter, _scores

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize(
  ("n", "right", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 3, 2), (3, 3, 3)]
)
def test_pass_at_k_is_the_fraction_of_draws_with_a_correct_sample(n, right, k):
  draws = list(itertools.combinations([True] * right + [False] * (n - right), k))
  assert _scores.pass_at(k, n, right) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_scores_of_a_benchmark():
  right = [[True, False, False, False], [True, True, True, True], [False] * 4]
  answers = [["2", "3", "3", ""], ["1"] * 4, ["5", "5", "6", "6"]]
  out = _scores.passed(right, answers)
  assert list(out) == ["pass@1", "pass@4", "maj@4"]
  assert out["pass@1"]["value"] == pytest.approx((0.25 + 1 + 0) / 3)
  assert out["pass@4"]["value"] == pytest.approx(2 / 3)
  assert out["maj@4"]["value"] == pytest.approx(1 / 3)  # "3" outvotes the correct "2"
  assert list(_scores.passed([[True], [False]], [["1"], ["2"]])) == ["pass@1"]
  twelve = _scores.passed([[True] + [False] * 11], None)
  assert twelve["pass@10"]["value"] == pytest.approx(10 / 12) and "maj@12" not in twelve


def test_majority_votes():
  assert _scores.majority(["a", "a", "b"], [True, True, False]) == 1
  assert _scores.majority(["a", "b", "b"], [True, False, False]) == 0
  assert _scores.majority(["a", "b", ""], [True, False, False]) == 0.5  # a tie; "" does not vote
  assert _scores.majority(["", ""], [False, False]) == 0


def test_interval_is_a_percentile_bootstrap_over_questions():
  x = np.array([1.0] * 30 + [0.0] * 70)
  got = _scores.interval(x)
  assert got == _scores.interval(x) and got["value"] == pytest.approx(0.3)
  # The mean of 100 draws from x is binomial: its 2.5th and 97.5th percentiles are exact.
  share, total, ends = [math.comb(100, i) * 0.3**i * 0.7 ** (100 - i) for i in range(101)], 0, []
  for i, p in enumerate(share):
    if total < 0.025 <= total + p or total < 0.975 <= total + p:
      ends.append(i / 100)
    total += p
  assert got["low"] == pytest.approx(ends[0], abs=0.011)
  assert got["high"] == pytest.approx(ends[1], abs=0.011)
  # Questions are resampled, not samples, so equal values per question give an interval of 0.
  assert _scores.interval([0.5] * 20) == {"value": 0.5, "low": 0.5, "high": 0.5}


@pytest.mark.parametrize(
  ("text", "letter"),
  [
    ("So it is \\boxed{C}.", "C"),
    ("\\boxed{\\text{B}}", "B"),
    ("\\boxed{(D)}", "D"),
    ("\\boxed{A) water}", "A"),
    ("\\boxed{Dog}", ""),
    ("\\boxed{42}", ""),
    ("Not A, not B.\n**Answer: D**", "D"),
    ("The answer is (B).", "B"),
    ("First I thought the answer is A. The correct answer is: C", "C"),
    ("C", "C"),
    ("(A)", "A"),
    ("<think>The answer is A</think>Answer: B", "B"),
    ("<think>\\boxed{A}</think>I do not know.", ""),
    ("An answer Depends on it", ""),
    ("the answer a man gave", ""),
    ("**B**", "B"),
    ("B. Paris", "B"),
    ("(B) 42", "B"),
    ("B) 42 K", "B"),
    ("The correct answer is option B.", "B"),
    ("**Answer:** Option C", "C"),
    ("So the correct choice is\n\n(D).", "D"),
    ("\\boxed{Answer: B}", "B"),
    ("\\boxed{\\text{Option (C)}}", "C"),
    ("As within \\boxed{}: the answer is B", "B"),
    ("The answer is I think B", ""),
    ("The answer: I'm not sure", ""),
    ("The answer is I because all others are wrong.", "I"),
    ("The answer is a matter of taste", ""),
    ("Let us look at answer option A first.", ""),
    ("A. Paris\nB. Rome\nC. Oslo", ""),
    ("A) 3 B) 4 C) 5", ""),
    ("A. First I add the numbers.\nThen I am done.", ""),
    ("A) is wrong.", ""),
    ("C. elegans has 302 neurons.", ""),
    ("A vector of length 3.", ""),
  ],
)
def test_the_letter_of_an_answer(text, letter):
  assert _option_letter.final_letter(text) == letter


def test_the_judge_compares_letters():
  judge = _option_letter.Judge()
  sample = lambda text, answer: {"text": text, "about": {"answer": answer}}
  assert judge.reject_reason(sample("\\boxed{B}", "B")) is None
  assert judge.reject_reason(sample("\\boxed{B}", "C")) == "wrong: 'B', but the key is 'C'"
  assert judge.reject_reason(sample("who knows", "C")) == "no final answer"
  assert "cannot be parsed" in judge.reject_reason(sample("\\boxed{B}", "both"))
