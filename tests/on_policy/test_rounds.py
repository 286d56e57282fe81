"""Runs of `on_policy`: rounds, what they continue from after a stop, and what they keep."""

import shutil

import pytest
import tiny
import tiny_on_policy

from distill_jax.errors import InputError, Preempted
from distill_jax.on_policy import diagnosis, feed, round_folders, scoring
from distill_jax.records import writer
from distill_jax.records.store import open_store
from distill_jax.report import own_texts
from distill_jax.runtime import checkpoint, distributed, storage


class Killed(BaseException):
  """An exception that no part of the code handles."""


def kill(*_, **__):
  raise Killed


def stop_at(monkeypatch, owner, name, call, stop=kill):
  """Runs `stop` before a call of owner.name, counted from 1."""
  real, calls = getattr(owner, name), []

  def counted(*args, **kwargs):
    calls.append(args)
    if len(calls) == call:
      stop()
    return real(*args, **kwargs)

  monkeypatch.setattr(owner, name, counted)
  return calls


def live(folder):
  """Returns the config of two live rounds of two steps, with a checkpoint after each step."""
  c = tiny_on_policy.on_policy_config(folder)
  c.on_policy.every, c.on_policy.keep_rounds, c.train.keep = 2, 0, 4
  c.records.tokens_per_shard = 4 * tiny_on_policy.LENGTH  # four texts
  return c


def late(folder):
  """Returns the config of rounds with stored scores, whose texts are one round old."""
  c = live(folder)
  c.train.online, c.on_policy.lag, c.train.steps, c.train.keep = False, 1, 6, 6
  c.records.kind, c.records.n = "topk", 8
  return c


def result(workdir):
  return tiny.measured(workdir), checkpoint.digest(workdir)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("on_policy")


@pytest.fixture(scope="module")
def whole(folder):
  """The workdir of a live run that nothing has stopped."""
  tiny_on_policy.run(live(folder), folder / "whole")
  return folder / "whole"


@pytest.fixture(scope="module")
def whole_late(folder):
  tiny_on_policy.run(late(folder), folder / "late")
  return folder / "late"


def student_of(workdir, number):
  """The fingerprint of the student that sampled the texts of a round."""
  return open_store(workdir / f"rounds/{number:05d}/teacher/rollouts").manifest.rollout["student"]


def test_a_live_run_trains_on_texts_of_its_student(whole):
  rows, _ = result(whole)
  assert [row["round"] for row in rows] == [0, 0, 1, 1]
  assert [row["lag"] for row in rows] == [0, 1, 0, 1]
  # The step sees the texts as the student has sampled them, up to float16 in the store.
  assert rows[0]["drift"] < 2e-3
  assert len(open_store(whole / "rounds/00001/teacher/rollouts")) == 2 * 4
  # The fingerprint is the digest of the checkpoint before the round.
  assert student_of(whole, 1) == checkpoint.digest(whole, 2)


def test_the_first_step_of_a_round_has_the_numbers_of_its_texts(whole):
  rows, _ = result(whole)
  assert [("truncated" in row, "overlap/teacher" in row) for row in rows] == [
    (True, True),  # a diagnosis every ten steps
    (False, False),
    (True, False),
    (False, False),
  ]
  assert 0 < rows[0]["overlap/teacher"] <= 1 and rows[0]["reverse_kl/teacher"] > 0
  assert rows[0]["drift"] < 1e-2  # of float16
  texts = own_texts.read(whole)
  assert [(own.teacher, own.step) for own in texts] == [("teacher", 0)] * diagnosis.TEXTS


@pytest.mark.slow
def test_every_teacher_of_a_round_is_diagnosed(tmp_path):
  c = tiny_on_policy.on_policy_config(tmp_path, code=6)
  c.on_policy.every = c.train.steps = 2
  c.teachers = {"code": ""}
  tiny_on_policy.run(c, tmp_path / "run")
  row = result(tmp_path / "run")[0][0]
  kinds = "overlap", "reverse_kl_tenth_10", "truncated"
  assert {f"{kind}/{name}" for kind in kinds for name in ("teacher", "code")} <= row.keys()
  assert {"drift", "drift/code", "truncated"} <= row.keys()
  assert {own.teacher for own in own_texts.read(tmp_path / "run")} == {"teacher", "code"}


@pytest.mark.slow
def test_a_student_too_far_from_its_teacher_stops_the_run(folder, tmp_path):
  c = live(folder)
  c.on_policy.min_overlap = 1.0
  with pytest.raises(InputError, match="too far from the teacher"):
    tiny_on_policy.run(c, tmp_path / "run")


def resumed(c, workdir, monkeypatch, owner, name, call, stop, error):
  """Runs until a stop and then to the end; returns the calls for copies of the student after it."""
  with pytest.MonkeyPatch.context() as patch, pytest.raises(error):
    stop_at(patch, owner, name, call, stop)
    tiny_on_policy.run(c, workdir)
  copies = stop_at(monkeypatch, feed, "decoding_copy", 0)
  tiny_on_policy.run(c, workdir)
  return len(copies)


def test_a_run_that_is_killed_within_a_round_continues_to_the_same_bits(
  whole, folder, tmp_path, monkeypatch
):
  """Step 3 is repeated with the texts of round 1, which were sampled before the checkpoint."""
  stop = (feed.RoundsFeed, "next", 4, kill, Killed)
  assert resumed(live(folder), tmp_path / "run", monkeypatch, *stop) == 0
  assert result(tmp_path / "run") == result(whole)


STOPS = {
  # Half of the texts of round 1 are stored.
  "sampling": (writer.Writer, "write_shard", 4, kill, Killed, 1),
  "before the first step of a round": (
    round_folders.RoundFolders,
    "delete_before",
    2,
    kill,
    Killed,
    0,
  ),
  # The steps 2 and 3 of the student are repeated, and lead to the texts that are there.
  "saving": (checkpoint, "save", 3, kill, Killed, 0),
  "a signal in sampling": (feed, "decoding_copy", 2, distributed.Preemption.request, Preempted, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS)
def test_a_run_that_is_stopped_elsewhere_continues_to_the_same_bits(
  whole, folder, tmp_path, monkeypatch, stop
):
  *where, copies = STOPS[stop]
  assert resumed(live(folder), tmp_path / "run", monkeypatch, *where) == copies
  assert result(tmp_path / "run") == result(whole)


LATE_STOPS = {
  "scoring": (scoring.job, "record", 2, kill, Killed),
  "a signal in scoring": (scoring.job, "record", 2, distributed.Preemption.request, Preempted),
  "the second step of a round": (feed.RoundsFeed, "next", 4, kill, Killed),
  "the first step of a round": (feed.RoundsFeed, "next", 5, kill, Killed),
}


@pytest.mark.slow
@pytest.mark.parametrize("stop", LATE_STOPS)
def test_stored_scores_with_a_lag_continue_to_the_same_bits(
  whole_late, folder, tmp_path, monkeypatch, stop
):
  resumed(late(folder), tmp_path / "run", monkeypatch, *LATE_STOPS[stop])
  assert result(tmp_path / "run") == result(whole_late)


@pytest.mark.slow
def test_a_lag_trains_on_the_texts_of_the_student_one_round_before(whole_late):
  rows, _ = result(whole_late)
  assert [row["lag"] for row in rows] == [0, 1, 2, 3, 2, 3]
  assert student_of(whole_late, 0) == student_of(whole_late, 1)
  assert student_of(whole_late, 2) == checkpoint.digest(whole_late, 2)


@pytest.mark.slow
def test_a_workdir_at_a_url_continues_elsewhere(whole, folder, tmp_path):
  """The second process has another mirror of the workdir."""
  url = f"file://{tmp_path / 'far'}"
  c = live(folder)
  c.on_policy.keep_rounds = 1
  with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
    stop_at(patch, feed.RoundsFeed, "next", 4)
    with storage.Synced(url) as here:
      tiny_on_policy.run(c, here)
  with storage.Synced(url) as here:
    tiny_on_policy.run(c, here)
  assert [p.name for p in sorted((tmp_path / "far/rounds").iterdir()) if p.is_dir()] == ["00001"]
  assert result(tmp_path / "far") == result(whole)


@pytest.mark.slow
def test_missing_texts_of_an_earlier_student_stop_the_run(whole, folder, tmp_path, monkeypatch):
  with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
    stop_at(patch, feed.RoundsFeed, "next", 4)
    tiny_on_policy.run(live(folder), tmp_path / "run")
  shutil.rmtree(tmp_path / "run/rounds/00001")
  with pytest.raises(InputError, match="Round 1 lacks texts, which were sampled before step"):
    tiny_on_policy.run(live(folder), tmp_path / "run")
