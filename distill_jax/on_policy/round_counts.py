"""Numbers of the texts of a round: how they ended, their lengths and their rewards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from distill_jax.errors import InputError, bad_value
from distill_jax.on_policy.options import OnPolicyOptions
from distill_jax.types import JsonObject

TRUNCATED, REPETITION = "length", "repetition"  # reasons why a text ended
LIMITS = {"max_truncated": TRUNCATED, "max_repetition": REPETITION}  # by the key of `on_policy`
ADVICE = {
  TRUNCATED: "Raise generate.max_new_tokens and generate.cache_len in another --workdir",
  REPETITION: "Lower optim.peak_lr in another --workdir",
}


def count(
  reasons: Sequence[str], lengths: Sequence[int], rewards: Sequence[float], seconds: float
) -> JsonObject:
  """Returns the counts of some texts.

  Args:
    reasons: Why each text ended.
    lengths: The number of sampled tokens of each text.
    rewards: The reward of each text; () without rewards.
    seconds: The time in which they were sampled.
  """
  return {
    "reasons": dict(Counter(reasons)),
    "lengths": [*lengths],
    "rewards": [*rewards],
    "seconds": seconds,
  }


def join(counts: Iterable[JsonObject]) -> JsonObject:
  """Returns the counts of several groups of texts as one."""
  reasons: Counter[str] = Counter()
  joined = count((), (), (), 0.0)
  for part in counts:
    reasons.update(part["reasons"])
    for key in ("lengths", "rewards", "seconds"):
      joined[key] += part[key]
  return joined | {"reasons": dict(sorted(reasons.items()))}


def summary(by_teacher: Mapping[str, JsonObject]) -> JsonObject:
  """Returns the numbers of a round, from the counts of each teacher's texts.

  Returns:
    texts and tokens (their numbers), seconds (of sampling), reasons (the number of texts by the
    reason why they ended), truncated and repetition (fractions of the texts), length (mean, median,
    p90 and max, in tokens), reward (the mean; only with rewards), and the same for each of the
    `teachers`.
  """
  teachers = {name: _numbers(counts) for name, counts in by_teacher.items()}
  return {**_numbers(join(by_teacher.values())), "teachers": teachers}


def _numbers(counts: JsonObject) -> JsonObject:
  lengths = np.array(counts["lengths"])
  rewards = {"reward": float(np.mean(counts["rewards"]))} if counts["rewards"] else {}
  median, p90 = np.quantile(lengths, (0.5, 0.9), method="inverted_cdf").tolist()
  return {
    "texts": len(lengths),
    "tokens": int(lengths.sum()),
    "seconds": counts["seconds"],
    "reasons": counts["reasons"],
    "truncated": counts["reasons"].get(TRUNCATED, 0) / len(lengths),
    "repetition": counts["reasons"].get(REPETITION, 0) / len(lengths),
    "length": {
      "mean": float(lengths.mean()),
      "median": median,
      "p90": p90,
      "max": int(lengths.max()),
    },
    **rewards,
  }


def metrics(summary: JsonObject) -> dict[str, float]:
  """Returns the metrics of a round's texts, from `summary`.

  Returns:
    text_length, text_length_p90 (in tokens), truncated, repetition (fractions of the texts) and
    reward (the mean; only with rewards); with several teachers, also of each, as METRIC/TEACHER.
  """
  teachers = summary["teachers"] if len(summary["teachers"]) > 1 else {}
  return _metrics(summary) | {
    f"{key}/{name}": x for name, numbers in teachers.items() for key, x in _metrics(numbers).items()
  }


def _metrics(numbers: JsonObject) -> dict[str, float]:
  length = numbers["length"]
  found = {"text_length": length["mean"], "text_length_p90": float(length["p90"])}
  return found | {k: numbers[k] for k in ("truncated", "repetition", "reward") if k in numbers}


def check_options(c: OnPolicyOptions) -> None:
  """Raises InputError if a limit is not a fraction."""
  for key in LIMITS:
    if not 0 <= getattr(c, key) <= 1:
      raise bad_value(f"on_policy.{key}", getattr(c, key), "a fraction from 0 to 1", "Correct it")


def check(c: OnPolicyOptions, number: int, reasons: Mapping[str, int], texts: int) -> None:
  """Checks the limits of a round, of which some texts may still be missing.

  Args:
    c: The options.
    number: The number of the round.
    reasons: The number of texts for each reason why they ended.
    texts: The number of texts of the round.

  Raises:
    InputError: More texts than are allowed were cut off, or ended in a loop.
  """
  for key, reason in LIMITS.items():
    if (found := reasons.get(reason, 0)) > getattr(c, key) * texts:
      raise _beyond_limit(key, getattr(c, key), number, found / texts, reason)


def _beyond_limit(key: str, limit: float, number: int, fraction: float, reason: str) -> InputError:
  how = "are cut off at the maximum length" if reason == TRUNCATED else "end in a loop"
  return bad_value(
    f"on_policy.{key}",
    limit,
    f"at least {fraction:.3g}, the fraction of the texts of round {number} that {how}",
    f"{ADVICE[reason]}, train the student on its teacher's texts first, or raise the limit",
  )
