"""From verdicts to numbers: pass@k and majority votes, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
KS = (1, 10, 100)  # of pass@k, beside all samples

Number = dict[str, float]  # value, low, high


def interval(per_question: Sequence[float], seed: int = 0) -> Number:
  """The mean over questions, and its 95% percentile bootstrap interval.

  Questions are resampled with replacement, each with all its samples: 2,000 times, seeded. Where
  all questions have the same value, the interval is that point.
  """
  values, rng = np.asarray(per_question, np.float64), np.random.default_rng(seed)
  means = [np.mean(values[rng.integers(len(values), size=len(values))]) for _ in range(RESAMPLES)]
  low, high = np.percentile(means, [2.5, 97.5])
  return {"value": float(np.mean(values)), "low": float(low), "high": float(high)}


def pass_at(k: int, n: int, right: int) -> float:
  """The chance that of k samples, drawn from n of which `right` are, one is right.

  1 - C(n - right, k) / C(n, k), without bias (arXiv:2107.03374, equation 1).
  """
  return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(answers: Sequence[str], right: Sequence[bool]) -> float:
  """1.0 if the answer that most samples give is right, else 0.0; ties share the point.

  Args:
    answers: spelt in one way; "" is no answer, and has no vote.
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
  """The numbers of a set.

  Args:
    right: of each question, whether each of its samples is.
    answers: what each says, in one spelling; None: such answers are not voted on.

  Returns:
    pass@1, the mean over a question's samples and then over questions: DeepSeek-R1's pass@1
    (arXiv:2501.12948), which is pass_at(1); pass@k of KS and of as many samples as all
    questions have; maj@n. Each with its interval.
  """
  n = min(map(len, right))
  ks = sorted({k for k in (*KS, n) if k <= n})
  out = {f"pass@{k}": interval([pass_at(k, len(r), sum(r)) for r in right]) for k in ks}
  if answers is not None and n > 1:
    votes = zip(answers, right, strict=True)
    out[f"maj@{n}"] = interval([majority(a[:n], r[:n]) for a, r in votes])
  return out
