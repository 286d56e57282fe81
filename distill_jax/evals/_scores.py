"""Scores of generative benchmarks: pass@k and majority votes, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000  # number of bootstrap samples
KS = (1, 10, 100)  # values of k for pass@k, in addition to the number of samples

Number = dict[str, float]  # value, low, high


def interval(per_question: Sequence[float], seed: int = 0) -> Number:
  """Returns the mean over questions with its 95% bootstrap confidence interval.

  The percentile bootstrap resamples questions (each with all its samples) with replacement,
  RESAMPLES times. If all questions have the same value, the interval is that value.

  Args:
    per_question: One value per question.
    seed: The seed of the bootstrap.
  """
  values, rng = np.asarray(per_question, np.float64), np.random.default_rng(seed)
  means = [np.mean(values[rng.integers(len(values), size=len(values))]) for _ in range(RESAMPLES)]
  low, high = np.percentile(means, [2.5, 97.5])
  return {"value": float(np.mean(values)), "low": float(low), "high": float(high)}


def pass_at(k: int, n: int, right: int) -> float:
  """Returns the unbiased estimate of pass@k, 1 - C(n - right, k) / C(n, k).

  This is the probability that at least one of k samples is correct, if k samples are drawn from n
  samples of which `right` are correct (arXiv:2107.03374, equation 1).
  """
  return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(answers: Sequence[str], right: Sequence[bool]) -> float:
  """Returns the score of the majority vote on one question: 1.0 if it is correct, else 0.0.

  Tied answers share the point.

  Args:
    answers: The answer of each sample, with one spelling for equal answers; "" does not vote.
    right: True for correct samples.
  """
  votes: dict[str, list[bool]] = {}
  for answer, verdict in zip(answers, right, strict=True):
    if answer:
      votes.setdefault(answer, []).append(verdict)
  max_votes = max(map(len, votes.values()), default=0)
  shares = [sum(v) / len(v) for v in votes.values() if len(v) == max_votes]
  return sum(shares) / len(shares) if shares else 0.0


def passed(
  right: Sequence[Sequence[bool]], answers: Sequence[Sequence[str]] | None
) -> dict[str, Number]:
  """Returns the scores of a benchmark, each with its confidence interval.

  Args:
    right: For each question, a list that is True for each correct sample.
    answers: For each question, the answers of its samples, with one spelling for equal answers.
      None: no majority votes.

  Returns:
    "pass@k" for k in KS and for k = n, and "maj@n", where n is the minimum number of samples per
    question. pass@1 is DeepSeek-R1's (arXiv:2501.12948): the mean over the samples of a question,
    and then over questions.
  """
  n = min(map(len, right))
  ks = sorted({k for k in (*KS, n) if k <= n})
  out = {f"pass@{k}": interval([pass_at(k, len(r), sum(r)) for r in right]) for k in ks}
  if answers is not None and n > 1:
    votes = zip(answers, right, strict=True)
    out[f"maj@{n}"] = interval([majority(a[:n], r[:n]) for a, r in votes])
  return out
