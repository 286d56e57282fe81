"""The metrics of a round's texts."""

import pytest

from distill_jax.on_policy import round_counts

pytestmark = pytest.mark.smoke


def counts(reasons, lengths, rewards=()):
  return round_counts.count(reasons, lengths, rewards, 1.0)


def test_metrics_are_of_all_texts_and_of_each_of_several_teachers():
  math = counts(["eos", "length"], [4, 8], [1.0, 0.0])
  code = counts(["repetition"], [3], [1.0])
  found = round_counts.metrics(round_counts.summary({"math": math, "code": code}))
  assert found["text_length"] == 5 and found["text_length_p90"] == 8
  assert found["truncated"] == found["repetition"] == 1 / 3 and found["reward"] == 2 / 3
  assert found["truncated/math"] == 0.5 and found["truncated/code"] == 0
  assert found["reward/math"] == 0.5 and found["text_length/code"] == 3
  assert len(found) == 15


def test_one_teacher_has_them_once_and_no_reward_without_rewards():
  found = round_counts.metrics(round_counts.summary({"teacher": counts(["eos"], [7])}))
  assert found == {"text_length": 7, "text_length_p90": 7, "truncated": 0, "repetition": 0}
