"""The schedule of sampling, scoring and training, and which rounds are kept."""

import threading
import time

import pytest

from distill_jax.errors import InputError
from distill_jax.on_policy.round_folders import RoundFolders
from distill_jax.on_policy.round_schedule import RoundSchedule
from distill_jax.on_policy.round_scores import RoundScores


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("every", [1, 3])
def test_every_text_is_sampled_once_before_it_is_needed(every, lag):
  """A loop over all steps, with a checkpoint before each."""
  schedule, sampled = RoundSchedule(every, lag, rounds=4), {}
  for step in range(4 * every):
    already = schedule.already_sampled(step)
    assert set(already) <= set(sampled)
    assert already == [i for i in schedule.needed(step) if i in sampled]
    for number in schedule.needed(step):
      if number not in sampled:
        assert schedule.begins(step) and schedule.sampled_before(number) == step
        sampled[number] = step
    assert sampled[schedule.round_of(step)] == max(0, schedule.round_of(step) - lag) * every
  assert sorted(sampled) == [0, 1, 2, 3]


def test_old_rounds_are_deleted_except_those_that_checkpoints_need(tmp_path):
  folders = RoundFolders(tmp_path, keep=2, saves=1)
  rounds = tmp_path / "rounds"
  (rounds / "00000").mkdir(parents=True)  # of an earlier process
  folders.open(0, lambda step: [])
  for number in range(1, 6):
    (rounds / f"{number:05d}").mkdir()
    if number in (2, 4):
      folders.protect([number])  # a checkpoint within the round, and its next one
    if number == 5:
      folders.protect([])
    folders.delete_before(number)
    there = sorted(int(p.name) for p in rounds.iterdir())
    assert there == {1: [0, 1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [4, 5]}[number]


def test_a_resumed_run_keeps_the_rounds_that_every_checkpoint_needs(tmp_path):
  """If the newest checkpoint is damaged, the run goes on from the one before it."""
  schedule = RoundSchedule(every=4, lag=0, rounds=9)
  for name in ("checkpoints/6", "checkpoints/12", "rounds/00001", "rounds/00002", "rounds/00003"):
    (tmp_path / name).mkdir(parents=True)
  folders = RoundFolders(tmp_path, keep=1, saves=2)
  folders.open(12, schedule.already_sampled)
  folders.delete_before(3)
  assert schedule.already_sampled(6) == [1] and schedule.already_sampled(12) == []
  assert sorted(path.name for path in (tmp_path / "rounds").iterdir()) == ["00001", "00003"]


def test_zero_keeps_all_rounds(tmp_path):
  (tmp_path / "rounds/00000").mkdir(parents=True)
  folders = RoundFolders(tmp_path, keep=0, saves=1)
  folders.open(0, lambda step: [])
  folders.delete_before(9)
  assert list((tmp_path / "rounds").iterdir())


def test_scores_ahead_are_computed_in_order_while_the_caller_goes_on():
  may_end, order = threading.Event(), []

  def score(number, name, texts):
    assert number or may_end.wait(10)
    order.append(number)
    return f"{texts} scored by {name}"

  scores = RoundScores(score, ahead=True)
  for number in (0, 1, 1):
    scores.begin(number, {"teacher": f"texts {number}"})
  time.sleep(0.05)
  assert not order  # round 1 waits for round 0
  may_end.set()
  assert scores.get(0, {}) == {"teacher": "texts 0 scored by teacher"}
  assert scores.get(1, {}) == {"teacher": "texts 1 scored by teacher"}
  assert order == [0, 1]


def test_an_error_of_scoring_ahead_is_raised_where_the_scores_are_needed():
  def score(*_):
    raise InputError("No server answers.")

  scores = RoundScores(score, ahead=True)
  scores.begin(0, {"teacher": "texts"})
  scores.begin(1, {"teacher": "texts"})
  for number in (0, 1):
    with pytest.raises(InputError, match="No server answers"):
      scores.get(number, {})


def test_scores_of_local_teachers_are_computed_when_they_are_needed():
  scored = []
  scores = RoundScores(lambda *args: scored.append(args), ahead=False)
  scores.begin(0, {"teacher": "texts"})
  assert not scored
  scores.get(0, {"teacher": "texts"})
  assert scored == [(0, "teacher", "texts")]
