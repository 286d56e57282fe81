"""`filter` over segments and processes: the outputs do not depend on them, nor on interruptions."""

import itertools
import json
import os
import random

import pytest
from tiny_samples import a_sample

from distill_jax import config
from distill_jax.commands.filter import run as filter_samples
from distill_jax.errors import InputError, Preempted, Unavailable
from distill_jax.filters import _judge, _segments, pipeline
from distill_jax.filters._segments import Range
from distill_jax.runtime import distributed, files

OUTPUTS = ("kept", "rejected")
WORDS = ("yes it is so", "no it is not", "so it is 4", "and so on and on", "4", "but", "if")


def some_lines(seed, prompts=60):
  """Returns lines of samples with some that are not samples."""
  rng = random.Random(seed)
  texts = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 60))) for _ in range(80)]
  lines = []
  for number in range(prompts):
    prompt = rng.choice([number, f"p{number}"])
    for i in range(rng.choice([1, 1, 2, 3, 9])):
      row = a_sample(rng.choice(texts), id=prompt, sample=i)
      row.pop("of")
      lines.append(json.dumps(row).encode())
      if rng.random() < 0.1:
        lines.append(rng.choice([b"", b"{", b"[1]", b"\xff", b'{"id": 1}']))
  return lines


def a_folder(folder, lines, files_=3):
  """Writes whole prompts to each of some files."""
  (folder / "samples").mkdir(parents=True)
  groups, last = [], None
  for line in lines:
    try:
      prompt = json.loads(line)["id"]
    except (ValueError, TypeError, KeyError):
      prompt = last
    if prompt != last or not groups:
      groups.append([])
    last = prompt
    groups[-1].append(line)
  for i in range(files_):
    part = groups[i * len(groups) // files_ : (i + 1) * len(groups) // files_]
    data = b"".join(line + b"\n" for group in part for line in group)
    (folder / "samples" / f"{i:05}.jsonl").write_bytes(data)
  return folder


def a_config(samples, **fields):
  c = config.base()
  c.filter.samples, c.filter.on_bad, c.filter.workers = str(samples), "skip", 1
  c.filters.short = config.filter("length", max_chars=400)
  c.filters.vote = config.filter("votes", of="text")
  c.filters.new = config.filter("near_duplicates")
  c.filter.order = ("short", "vote", "new")
  c.filter.update(fields)
  return config.resolve(c)


def contents(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for name in OUTPUTS
    for path in sorted((folder / name).iterdir())
  }


def joined(folder, name):
  return b"".join(data for path, data in contents(folder).items() if path.startswith(name))


@pytest.fixture
def judged(monkeypatch):
  """Returns the list of the ranges that are judged, which grows."""
  ranges, real = [], _judge.judge
  monkeypatch.setattr(_judge, "judge", lambda chain, x: ranges.append(x) or real(chain, x))
  return ranges


@pytest.fixture
def small_segments(monkeypatch):
  monkeypatch.setattr(_segments, "SEGMENT_BYTES", 3000)
  monkeypatch.setattr(_segments, "AHEAD_BYTES", 100)
  monkeypatch.setattr(pipeline, "MIN_BLOCK", 700)
  monkeypatch.setattr(pipeline, "MAX_BLOCK", 700)


@pytest.mark.parametrize("seed", range(2))
def test_pieces_of_a_file_have_each_prompt_once(tmp_path, monkeypatch, seed):
  monkeypatch.setattr(_segments, "AHEAD_BYTES", 50)
  path, lines = tmp_path / "a.jsonl", some_lines(seed)
  path.write_bytes(b"\n".join(lines) + b"\n" * (seed % 2))
  whole = Range(str(path), 0, path.stat().st_size, path.stat().st_size)
  want = list(_segments.prompts(whole))
  assert sum(map(len, want)) == sum(bool(line) for line in lines)
  ids = [{line.sample["id"] for line in group if line.fault is None} for group in want]
  assert all(len(group) == 1 for group in ids)
  assert len(set().union(*ids)) == len(ids) == 60
  for size in (7, 333, 5000, whole.size):
    assert [g for piece in _segments.pieces(whole, size) for g in _segments.prompts(piece)] == want


def test_segments_and_blocks_do_not_change_the_samples(tmp_path, small_segments):
  lines = some_lines(5)
  one, many = a_folder(tmp_path / "one", lines, 1), a_folder(tmp_path / "many", lines, 3)
  results = [filter_samples(a_config(x, on_bad="skip"), x / "filtered") for x in (one, many)]
  assert results[0] == results[1] and 0 < results[0]["kept"] < results[0]["rejected"]
  assert set(results[0]["rejected_by"]) == {"read", "short", "vote", "new"}
  assert len(contents(one / "filtered")) != len(contents(many / "filtered"))
  for name in OUTPUTS:
    assert joined(one / "filtered", name) == joined(many / "filtered", name)
  lines = joined(one / "filtered", "rejected").splitlines()
  rejected = [json.loads(line)["rejected"] for line in lines]
  details = [row["detail"] for row in rejected if row["by"] == "new"]
  assert all(detail.startswith("of prompt ") and ", sample " in detail for detail in details)
  assert {path.name for path in (one / "filtered").iterdir()} == {*OUTPUTS, "filter.json"}


def test_an_interrupted_run_continues_with_its_segments(
  tmp_path, small_segments, monkeypatch, judged
):
  samples = a_folder(tmp_path, some_lines(6))
  c = a_config(samples)
  want = filter_samples(c, tmp_path / "whole")
  calls = itertools.count()
  monkeypatch.setattr(distributed.Preemption, "reached", lambda *_: next(calls) % 19 == 18)
  judged.clear()
  stops = 0
  for _ in range(100):
    try:
      assert filter_samples(c, tmp_path / "stopped") == want
      break
    except Preempted as e:
      assert "finished" in str(e)
      stops += 1
  assert stops > 3 and contents(tmp_path / "stopped") == contents(tmp_path / "whole")
  blocks = sum(len(_segments.pieces(s.range, 700)) for s in _segments.find(str(samples)))
  assert blocks <= len(judged) < blocks + 10 * stops  # at most the blocks of one segment each
  judged.clear()
  assert filter_samples(c, tmp_path / "stopped") == want and not judged  # it has finished


def test_slices_in_any_order_and_the_call_that_merges_them(tmp_path, small_segments):
  samples = a_folder(tmp_path, some_lines(7))
  want = filter_samples(a_config(samples), tmp_path / "whole")
  counts = [
    filter_samples(a_config(samples, slice=f"{i}/4"), tmp_path / "slices") for i in (2, 0, 3)
  ]
  assert {row["slice"] for row in counts} == {"2/4", "0/4", "3/4"}
  assert sum(row["samples"] for row in counts) < want["samples"]
  assert not (tmp_path / "slices/filter.json").exists()
  assert filter_samples(a_config(samples), tmp_path / "slices") == want
  assert contents(tmp_path / "slices") == contents(tmp_path / "whole")


def test_slices_without_a_comparing_filter_write_their_outputs(tmp_path, small_segments):
  samples = a_folder(tmp_path, some_lines(7))
  c = config.base()
  c.filter.samples, c.filter.on_bad, c.filter.workers = str(samples), "skip", 1
  c.filters.short, c.filter.slice = config.filter("length", max_chars=100), "1/2"
  filter_samples(config.resolve(c), tmp_path / "slices")
  numbers = {name.rpartition("/")[2] for name in contents(tmp_path / "slices")}
  assert numbers and all(int(number[:5]) % 2 for number in numbers)


def test_a_slice_that_ends_after_the_whole_removes_nothing(tmp_path, small_segments, monkeypatch):
  """A machine that was silent for a time can be late; claim.py keeps others apart."""
  samples, real = a_folder(tmp_path, some_lines(7, prompts=12)), _judge.judge
  want = filter_samples(a_config(samples), tmp_path / "whole")

  def late(chain, piece):
    monkeypatch.setattr(_judge, "judge", real)
    assert filter_samples(a_config(samples), tmp_path / "run") == want
    return real(chain, piece)

  monkeypatch.setattr(_judge, "judge", late)
  with pytest.raises(Unavailable, match="Another run has filtered the samples at"):
    filter_samples(a_config(samples, slice="0/2"), tmp_path / "run")
  assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.parametrize("output", OUTPUTS)
def test_outputs_that_are_missing_are_written_again(tmp_path, small_segments, output):
  samples, run = a_folder(tmp_path, some_lines(7, prompts=12)), tmp_path / "run"
  want, before = filter_samples(a_config(samples), run), contents(run)
  (run / output / "00001.jsonl").unlink()
  assert filter_samples(a_config(samples), run) == want
  assert contents(run) == before


def test_changed_samples_are_filtered_again_and_the_others_are_not(
  tmp_path, small_segments, judged
):
  samples, c = a_folder(tmp_path, some_lines(8)), a_config(tmp_path)
  filter_samples(a_config(tmp_path, slice="0/1"), tmp_path / "run")
  changed = samples / "samples/00001.jsonl"
  changed.write_bytes(changed.read_bytes().replace(b"yes", b"YES"))
  judged.clear()
  result = filter_samples(c, tmp_path / "run")
  assert {where.path for where in judged} == {str(changed)}
  assert result == filter_samples(c, tmp_path / "new")
  assert contents(tmp_path / "run") == contents(tmp_path / "new")
  (samples / "samples/00002.jsonl").unlink()  # after the end: fewer segments than before
  assert filter_samples(c, tmp_path / "run") == filter_samples(c, tmp_path / "newer")
  assert contents(tmp_path / "run") == contents(tmp_path / "newer")


def test_samples_that_change_while_they_are_read_are_refused(tmp_path, small_segments, monkeypatch):
  samples = a_folder(tmp_path, some_lines(8))
  real = _judge.judge

  def judge(chain, where):
    os.utime(where.path, (1, 1))
    return real(chain, where)

  monkeypatch.setattr(_judge, "judge", judge)
  with pytest.raises(InputError, match="00000.jsonl has changed while it was filtered"):
    filter_samples(a_config(samples), tmp_path / "run")


def test_a_prompt_in_two_places_is_refused(tmp_path, small_segments):
  samples = a_folder(tmp_path, some_lines(9))
  first, last = (samples / f"samples/0000{i}.jsonl" for i in (0, 2))
  line = first.read_bytes().split(b"\n")[0]
  last.write_bytes(last.read_bytes() + line + b"\n")
  prompt = json.loads(line)["id"]
  with pytest.raises(InputError, match=f"00002.jsonl: the samples of prompt {prompt} are not tog"):
    filter_samples(a_config(samples), tmp_path / "run")
  first.write_bytes(first.read_bytes() + line + b"\n")
  with pytest.raises(InputError, match=f"00000.jsonl: the samples of prompt {prompt} are not tog"):
    filter_samples(a_config(samples), tmp_path / "other")


def test_damaged_verdicts_are_made_again(tmp_path, small_segments):
  samples, c = a_folder(tmp_path, some_lines(10)), a_config(tmp_path)
  want = filter_samples(c, tmp_path / "whole")
  filter_samples(a_config(samples, slice="0/1"), tmp_path / "run")
  file = tmp_path / "run/verdicts/00001.npz"
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)
  (tmp_path / "run/verdicts/00002.npz").write_bytes(b"")
  assert filter_samples(c, tmp_path / "run") == want
  assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_full_disk_keeps_finished_segments(tmp_path, small_segments, monkeypatch):
  c = a_config(a_folder(tmp_path, some_lines(11)))
  want, real = filter_samples(c, tmp_path / "whole"), files.write

  def full(path, data):
    if path.endswith("00003.npz"):
      raise OSError(28, "No space left on device", path)
    real(path, data)

  monkeypatch.setattr(files, "write", full)
  with pytest.raises(OSError, match="No space left"):
    filter_samples(c, tmp_path / "run")
  assert len(list((tmp_path / "run/verdicts").iterdir())) == 3
  monkeypatch.setattr(files, "write", real)
  assert filter_samples(c, tmp_path / "run") == want
  assert contents(tmp_path / "run") == contents(tmp_path / "whole")
