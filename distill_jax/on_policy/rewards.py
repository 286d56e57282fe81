"""Rewards of texts: the verdicts of a filter on them, 1 or 0."""

from __future__ import annotations

from collections.abc import Iterable

from distill_jax.config import Config
from distill_jax.errors import InputError, bad_value, check_choice
from distill_jax.filters import Sample, SampleFilter, Unjudgeable, judge_in_parallel
from distill_jax.generation.prompts import Prompts


def open_judge(config: Config) -> SampleFilter | None:
  """Returns the filter whose verdicts are the rewards, after checking that it can be used."""
  name = config.on_policy.reward
  if not name:
    return None
  check_choice("on_policy.reward", name, config.filters, "Correct it, or add it to `filters`")
  judge = config.filters[name]
  if not isinstance(judge, SampleFilter):
    expected = "an entry of `filters` that judges each text by itself, e.g. of the module math"
    raise bad_value("on_policy.reward", name, expected, "Choose another one")
  judge.prepare()
  return judge


def without_key(judge: SampleFilter, on_bad: str, prompts: Prompts) -> set[int]:
  """Returns the numbers of prompts whose texts cannot be judged, e.g. for lack of an answer key.

  Judges read the answer key first, so they are called with empty texts.

  Raises:
    InputError: There is such a prompt, and on_bad is "stop".
  """
  empty = (
    {"id": p.number, "sample": 0, "text": "", "of": 1, "prompt": p.content, "about": p.about}
    for p in prompts.read()
    if not p.rejected
  )
  bad: set[int] = set()
  for sample, reason in judge_in_parallel(judge, empty):
    if isinstance(reason, Unjudgeable):
      if on_bad == "stop":
        raise InputError(
          f"Prompt {sample['id']} has no reward: {reason}. Correct it, or set generate.on_bad=skip."
        )
      bad.add(sample["id"])
  return bad


def of_texts(judge: SampleFilter, texts: Iterable[Sample]) -> list[float]:
  """Returns the reward of each text.

  Raises:
    InputError: A text cannot be judged.
  """
  out = []
  for sample, reason in judge_in_parallel(judge, texts):
    if isinstance(reason, Unjudgeable):
      raise InputError(
        f"The text of prompt {sample['id']}, sample {sample['sample']} has no reward: {reason}. "
        "Correct the prompt, and choose another --workdir."
      )
    out.append(float(reason is None))
  return out
