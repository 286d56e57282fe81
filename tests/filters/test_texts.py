"""Filters that judge a text without an answer key: format, length, repetition, perplexity."""

import numpy as np
import pytest
from tiny_samples import a_sample, judge, kinds

from distill_jax.filters import repetition
from distill_jax.filters.samples import Unjudgeable

pytestmark = pytest.mark.smoke


def test_format():
  texts = {
    "<think>a</think>b": None,
    "a</think>b": None,
    "<think>a</think><think>b</think>c": "several reasoning blocks",
    "<think>a": "reasoning is not closed",
    "b": "no reasoning",
    "x<think>a</think>b": "text before the reasoning",
    "<think> </think>b": "empty reasoning",
    "<think>a</think> ": "no answer after the reasoning",
    "<think>so we 所以我们 compute</think>4": "mixed language",
    "<think>α + β = 𝑥, naïve</think>4": None,
  }
  assert dict(zip(texts, kinds("format", [a_sample(t) for t in texts]), strict=True)) == texts
  assert kinds("format", [a_sample("a</think>b")], opened="text") == ["reasoning is not opened"]
  twice = kinds("format", [a_sample("<think>a</think>b")], opened="prompt")
  assert twice == ["reasoning is opened twice"]
  assert kinds("format", [a_sample("所以")], close="", scripts=()) == [None]


def test_length():
  samples = [a_sample("ab"), a_sample("abc" * 9), a_sample("abcd", reason="length"), a_sample(" ")]
  assert kinds("length", samples, max_chars=9) == [None, "too long", "cut off", "too short"]
  assert kinds("length", [a_sample()], min_tokens=4) == ["too short"]
  assert isinstance(judge("length", [a_sample(token_count=None)], max_tokens=4)[0], Unjudgeable)


def test_repetition():
  words = [f"w{i}" for i in range(100)]
  samples = [
    a_sample(" ".join(words)),
    a_sample("a b c d e " * 20),
    a_sample("x\n" * 9),
    a_sample(reason="repetition"),
  ]
  want = [None, "repeated words", "repeated lines", "stopped at a repetition"]
  assert kinds("repetition", samples) == want
  assert repetition.repeated(words[:10] + words[50:60] + words[:10], 10) == pytest.approx(1 / 3)
  assert repetition.repeated([], 10) == repetition.repeated(["a"], 10) == 0


def test_perplexity():
  samples = [a_sample(logprob_mean=x) for x in (-np.log(4), -np.log(20), 0.0, -1e9)]
  want = [None, "perplexity too high", "perplexity too low", "perplexity too high"]
  assert kinds("perplexity", samples, at_least=1.5, at_most=10.0) == want
  for value in (None, float("nan"), 0.5, True):
    assert isinstance(judge("perplexity", [a_sample(logprob_mean=value)])[0], Unjudgeable)
