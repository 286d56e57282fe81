"""The log of finished samples and the segments made from it: order, interruptions and damage."""

import itertools
import os
import random

import fsspec
import object_stores
import pytest
from json_lines import read_lines

from distill_jax.errors import InputError, Unavailable
from distill_jax.generation import outputs, segments
from distill_jax.generation.finished import ALL
from distill_jax.generation.journal import SampleJournal
from distill_jax.generation.prompts import Prompt
from distill_jax.runtime import files

ORIGIN = {"prompts": "p", "teacher": {}}
PROMPTS, SAMPLES = 40, 3
NAMES = (segments.SAMPLES, segments.REJECTED, segments.RESPONSES)


class Killed(BaseException):
  pass


def all_samples(prompts=PROMPTS, size=40):
  """Samples of several lengths; prompts 5 and 6 cannot be used, and some samples are refused."""
  found = []
  for number, sample in itertools.product(range(prompts), range(SAMPLES)):
    if number in (5, 6):
      if not sample:
        found.append(outputs.rejected_sample(number, ALL, "It is empty."))
    elif (number + sample) % 11 == 0:
      found.append(outputs.rejected_sample(number, sample, "It is refused."))
    else:
      row = {"text": "é" * (size + 7 * number % 50), "token_count": 3, "reason": "eos"}
      parts = {segments.RESPONSES: b'{"response": %d}\n' % sample * 20}
      found.append(outputs.finished_sample(Prompt(number, "p", {}), sample, row, parts))
  return found


def open_journal(folder):
  reader = segments.Segments()
  journal = SampleJournal(str(folder), ORIGIN, SAMPLES, [reader])
  reader.check(str(folder))
  return journal


def missing(journal, samples):
  done = journal.done()
  return [s for s in samples if not done.has((s.prompt, s.sample))]


def content(folder):
  found = {}
  for name in NAMES:
    parts = object_stores.contents(files.join(folder, name))
    found |= {(name, file): data for file, data in parts.items()}
  return found


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
  monkeypatch.setattr(segments, "SEGMENT_BYTES", 1500)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Returns the files of a run that adds all samples in order."""
  folder = tmp_path_factory.mktemp("whole")
  with pytest.MonkeyPatch.context() as small:
    small.setattr(segments, "SEGMENT_BYTES", 1500)
    journal = open_journal(folder)
    journal.add(all_samples())
    journal.finish()
    journal.remove()
  found = content(folder)
  assert max(map(len, found.values())) <= 1500 < sum(map(len, found.values())) / 10
  rows = read_lines(folder / "samples")
  assert [(r["id"], r["sample"]) for r in rows] == sorted((r["id"], r["sample"]) for r in rows)
  rejected = read_lines(folder / "samples.rejected")
  assert rejected[0] == {"id": 0, "sample": 0, "reason": "It is refused."}
  assert {"id": 5, "reason": "It is empty."} in rejected
  assert len(rows) + len(rejected) == len(all_samples())
  number = {name: sum(one == name for one, _ in found) for name in NAMES}
  assert number["responses"] > number["samples"] > 5 and number["samples.rejected"] > 3
  return found


@pytest.mark.parametrize("seed", range(4))
def test_the_files_depend_neither_on_the_order_nor_on_interruptions(whole, tmp_path, seed):
  rng = random.Random(seed)
  journal, waiting = open_journal(tmp_path), all_samples()
  rng.shuffle(waiting)
  while waiting:
    count = rng.randint(1, 9)
    journal.add(waiting[:count])
    waiting = waiting[count:]
    if rng.random() < 0.3:
      before = vars(journal.counts)
      journal = open_journal(tmp_path)
      assert vars(journal.counts) == before and len(missing(journal, all_samples())) == len(waiting)
  journal.finish()
  assert not list((tmp_path / "samples/.log").glob("*.piece"))
  assert content(tmp_path) == whole


def test_a_run_that_is_killed_at_any_write_or_deletion_loses_nothing(whole, tmp_path, monkeypatch):
  """The k-th change of a file is the last one, for every k; then the run continues."""
  write, remove, changes, last = files.write, files.remove, itertools.count(), 0

  def counted(fn):
    def change(*args):
      if next(changes) == last:
        raise Killed
      fn(*args)

    return change

  monkeypatch.setattr(os, "fsync", lambda file: None)  # 100 runs
  waiting = all_samples()
  random.Random(1).shuffle(waiting)
  runs = 0
  while True:
    folder, changes = tmp_path / f"{last}", itertools.count()
    with monkeypatch.context() as patch:
      patch.setattr(files, "write", counted(write))
      patch.setattr(files, "remove", counted(remove))
      try:
        journal = open_journal(folder)
        for i in range(0, len(waiting), 10):
          journal.add(waiting[i : i + 10])
        journal.finish()
        break
      except Killed:
        runs += 1
    journal = open_journal(folder)
    journal.add(missing(journal, waiting))
    journal.finish()
    assert content(folder) == whole, last
    last += 1
  assert runs > 40


def test_after_a_write_that_fails_the_log_goes_on(whole, tmp_path, monkeypatch):
  """Samples that finish after an error are kept, but nothing else is written in this run."""
  journal, waiting, write = open_journal(tmp_path), all_samples(), files.write
  with monkeypatch.context() as patch:
    patch.setattr(files, "write", lambda p, d: fail() if "00000.jsonl" in p else write(p, d))
    with pytest.raises(Unavailable):
      journal.add(waiting[:60])
    journal.add(waiting[60:80])
  assert not (tmp_path / "samples/00000.jsonl").exists()
  journal = open_journal(tmp_path)
  assert missing(journal, waiting) == waiting[80:]
  journal.add(waiting[80:])
  journal.finish()
  assert content(tmp_path) == whole


def fail():
  raise Unavailable("The store is away.")


def test_bytes_and_the_log_are_bounded(monkeypatch):
  """Four times the samples: four times the bytes, at most 2.2 per byte, and no larger log."""
  monkeypatch.setattr(segments, "SEGMENT_BYTES", 20_000)
  folders = fsspec.filesystem("memory")
  written, biggest, write = [0], [0], files.write

  def counted(path, data):
    written[0] += len(data)
    write(path, data)
    log = folders.find("/bucket/run/samples/.log") if "piece" in path else []
    biggest[0] = max(biggest[0], sum(folders.size(name) for name in log))

  monkeypatch.setattr(files, "write", counted)
  numbers = []
  for prompts in (160, 640):
    folders.rm("/bucket", recursive=True) if folders.exists("/bucket") else None
    written[0] = biggest[0] = 0
    waiting = all_samples(prompts, size=400)
    size = sum(len(part) for sample in waiting for part in sample.parts.values())
    # Samples finish out of order by up to 50.
    waiting = [waiting[i] for i in sorted(range(len(waiting)), key=lambda i: i + 37 * i % 50)]
    journal = open_journal("memory://bucket/run")
    for i in range(0, len(waiting), 10):
      journal.add(waiting[i : i + 10])
    journal.finish()
    numbers.append((written[0] / size, biggest[0]))
  assert all(1.9 < ratio <= 2.2 for ratio, _ in numbers)
  assert numbers[1][1] <= 1.1 * numbers[0][1] and numbers[0][1] < 100_000


@pytest.mark.parametrize(
  ("damage", "says"),
  [
    (lambda f: flip(f / "samples/.log/00000000.piece"), "00000000.piece is damaged at byte"),
    (lambda f: cut(f / "samples/.log/00000000.piece"), "00000000.piece has .* bytes; expected"),
    (lambda f: (f / "samples/.log/state.json").unlink(), "state.json is missing"),
    (lambda f: (f / "samples/00000.jsonl").unlink(), "lacks 00000.jsonl, which an earlier run"),
    (lambda f: cut(f / "samples/.log/state.json"), "state.json is not JSON"),
  ],
)
def test_damage_is_an_error(tmp_path, damage, says):
  journal, samples = open_journal(tmp_path), all_samples()
  journal.add([samples[-1], *samples[:60]])  # the last one keeps the first piece
  damage(tmp_path)
  with pytest.raises(InputError, match=says):
    journal = open_journal(tmp_path)
    journal.add(missing(journal, samples))
    journal.finish()


def flip(path):
  data = bytearray(path.read_bytes())
  data[-3] ^= 1
  path.write_bytes(data)


def cut(path):
  path.write_bytes(path.read_bytes()[:-5])
