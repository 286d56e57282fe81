"""The plan of rounds, and the prompts that it reads by their places."""

import collections
import dataclasses
import json

import pytest

from distill_jax.config import Config
from distill_jax.errors import InputError
from distill_jax.generation.job import GenerationJob
from distill_jax.generation.options import GenerateOptions
from distill_jax.generation.prompts import Prompts
from distill_jax.models.options import ModelOptions
from distill_jax.on_policy import plan, prompt_index
from distill_jax.on_policy.plan import Plan, StepRows, uses_records

pytestmark = pytest.mark.smoke


class Bytes:
  """A tokenizer of bytes."""

  begin = ()

  def encode(self, text):
    return list(text.encode())


def index_of(tmp_path, lines, teachers=("teacher",), on_bad="stop", cache_len=64, judge=None):
  """Returns the index of prompts in files of the given lines."""
  for name, some in lines.items():
    (tmp_path / name).write_text("".join(line + "\n" for line in some))
  job = GenerationJob(model=ModelOptions(), prompts=str(tmp_path), on_bad=on_bad)
  prompts = Prompts(job, Bytes())
  where = str(tmp_path / "prompts.npz")
  return prompt_index.open_index(prompts, teachers, where, {"cache_len": cache_len}, judge)


def numbered(n, routes=("",)):
  return [json.dumps({"prompt": f"p{i}", "route": routes[i % len(routes)]}) for i in range(n)]


def test_prompts_are_read_by_their_places(tmp_path):
  lines = {"a.jsonl": ["", *numbered(3), "  "], "b.jsonl": [*numbered(2), "", *numbered(1)]}
  index = index_of(tmp_path, lines)
  read = index.read([5, 0, 4, 2, 3])
  assert [p.content for p in read] == ["p0", "p0", "p1", "p2", "p0"]
  assert [p.number for p in read] == [5, 0, 4, 2, 3]
  assert index.counts == {"teacher": 6}
  assert bytes(read[2].ids) == b"p1"


def test_a_prompt_is_found_among_those_of_its_teacher(tmp_path, monkeypatch):
  monkeypatch.setattr(prompt_index, "BLOCK", 4)
  index = index_of(tmp_path, {"a.jsonl": numbered(23, ("", "b", "b", "c"))}, ("teacher", "b", "c"))
  assert index.counts == {"teacher": 6, "b": 12, "c": 5}
  assert [index.number("b", i) for i in range(12)] == [1, 2, 5, 6, 9, 10, 13, 14, 17, 18, 21, 22]
  assert [index.number("c", i) for i in range(5)] == [3, 7, 11, 15, 19]


def test_prompts_that_cannot_be_used_are_left_out(tmp_path, capsys):
  lines = {"a.jsonl": [*numbered(2), json.dumps({"prompt": "x" * 2000}), *numbered(3)]}
  with pytest.raises(InputError, match="has 2000 tokens"):
    index_of(tmp_path, lines)
  index = index_of(tmp_path, lines, on_bad="skip", judge=lambda prompts: {3})
  assert [index.number("teacher", i) for i in range(4)] == [0, 1, 4, 5]
  assert "2 of 6 prompts cannot be used and are skipped; the first is prompt 2" in (
    capsys.readouterr().err
  )


@pytest.mark.parametrize("route", ["c", ["b"]])
def test_an_unknown_route_is_refused(tmp_path, route):
  with pytest.raises(InputError, match="line 2: route is .*; expected '' or the name of a teacher"):
    index_of(tmp_path, {"a.jsonl": numbered(3, ("", route))}, ("teacher", "b"))


def test_places_are_kept_until_the_prompts_change(tmp_path, monkeypatch):
  lines = {"a.jsonl": numbered(5)}
  first = index_of(tmp_path, lines)
  assert not (tmp_path / "prompts.npz").exists()  # the config may still be refused
  first.save()
  monkeypatch.setattr(prompt_index, "_scan", lambda *_: pytest.fail("read again"))
  job = GenerationJob(model=ModelOptions(), prompts=str(tmp_path))
  where = str(tmp_path / "prompts.npz")
  again = prompt_index.open_index(
    Prompts(job, Bytes()), ("teacher",), where, {"cache_len": 64}, None
  )
  assert again.counts == first.counts and again.digest == first.digest
  monkeypatch.undo()
  with pytest.raises(InputError, match="not those with which the run began"):
    index_of(tmp_path, {"a.jsonl": numbered(6)})
  with pytest.raises(InputError, match=r"a\.jsonl has changed since its prompts were counted"):
    first.read([1])
  (tmp_path / "prompts.npz").write_bytes(b"x")
  with pytest.raises(InputError, match="is damaged"):
    index_of(tmp_path, lines)


def test_places_that_cannot_be_written_are_refused(tmp_path):
  (tmp_path / "prompts.npz").mkdir()
  index = index_of(tmp_path, {"a.jsonl": numbered(3)})
  with pytest.raises(InputError, match=r"prompts\.npz cannot be written"):
    index.save()


def test_a_round_has_each_prompt_of_an_epoch_once(tmp_path):
  index = index_of(tmp_path, {"a.jsonl": numbered(12)})
  p = Plan(index, seed=3, steps=10, every=3, batch_size=8, samples=2)
  assert p.rounds == 4
  rounds = [p.of_round(r) for r in range(4)]
  assert [len(r.steps) for r in rounds] == [3, 3, 3, 1]
  assert rounds[1].steps == tuple(StepRows("teacher", i) for i in (0, 8, 16))
  for n, r in enumerate(rounds[:3]):  # 12 prompts a round: an epoch
    rows = r.rows["teacher"]
    assert sorted(rows) == [(i, s) for i in range(12) for s in (2 * n, 2 * n + 1)]
    assert all(a[0] == b[0] for a, b in zip(rows[::2], rows[1::2], strict=True))
  assert rounds[0].rows != rounds[1].rows
  assert Plan(index, 4, 10, 3, 8, 2).of_round(0) != rounds[0]
  assert p.of_round(2) == rounds[2]


def test_a_prompt_that_occurs_twice_in_a_round_has_other_samples(tmp_path):
  index = index_of(tmp_path, {"a.jsonl": numbered(3)})
  rows = Plan(index, 0, steps=4, every=4, batch_size=3).of_round(0).rows["teacher"]
  assert len(set(rows)) == 12


def test_the_order_of_prompts_does_not_depend_on_the_length_of_a_round(tmp_path):
  index = index_of(tmp_path, {"a.jsonl": numbered(7)})

  def all_rows(every):
    p = Plan(index, 0, 12, every, 2, records_fraction=0.25)
    return [row for r in range(p.rounds) for row in p.of_round(r).rows.get("teacher", [])]

  assert all_rows(1) == all_rows(5) == all_rows(12)
  assert len(all_rows(1)) == 2 * 9


def test_teachers_take_turns_in_proportion_to_their_prompts(tmp_path):
  index = index_of(tmp_path, {"a.jsonl": numbered(40, ("", "b", "b", "b"))}, ("teacher", "b", "c"))
  p = Plan(index, 0, steps=40, every=8, batch_size=4, samples=2)
  seen = collections.Counter()
  for n in range(p.rounds):
    planned = p.of_round(n)
    names = [s.teacher for s in planned.steps]
    assert names == sorted(names, reverse=True)  # "teacher" is first
    assert collections.Counter(names) == {"teacher": 2, "b": 6}
    assert [s.first for s in planned.steps] == [0, 4, 0, 4, 8, 12, 16, 20]
    for name, rows in planned.rows.items():
      assert all((number % 4 == 0) == (name == "teacher") for number, _ in rows)
      seen.update(number for number, _ in rows)
  assert set(seen.values()) == {4} and len(seen) == 40  # 2 epochs of 2 samples


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.1, 10), (1 / 3, 33)])
def test_a_fraction_of_the_steps_uses_records(tmp_path, fraction, count):
  uses = [uses_records(n, fraction) for n in range(100)]
  assert sum(uses) == count
  index = index_of(tmp_path, {"a.jsonl": numbered(7)})
  p = Plan(index, 0, 100, 10, 2, records_fraction=fraction)
  rounds = [p.of_round(r) for r in range(10)]
  assert [s is None for r in rounds for s in r.steps] == uses
  assert sum(len(rows) for r in rounds for rows in r.rows.values()) == 2 * (100 - count)


@pytest.mark.parametrize(
  ("key", "value", "text"),
  [
    ("on_policy.every", 0, "on_policy.every is 0; expected a positive integer"),
    ("on_policy.records_fraction", 1.0, "on_policy.records_fraction is 1.0; expected at least 0"),
    ("train.batch_size", 3, "train.batch_size is 3; expected a multiple of generate.samples"),
  ],
)
def test_keys_that_cannot_be_planned_are_refused(key, value, text):
  section, name = key.split(".")
  c = Config(generate=GenerateOptions(samples=2))
  c = dataclasses.replace(c, **{section: dataclasses.replace(getattr(c, section), **{name: value})})
  with pytest.raises(InputError, match=text):
    plan.check(c)
