"""tools/reasoning_gym_problems.py: each problem is in one file."""

import json
import random
import sys
import types

import pytest
from experiments import ROOT, load_config


def create_dataset(kind, size, seed, **settings):
  """Returns sums of two numbers in the form of reasoning-gym's problems; some are repeated."""
  rng = random.Random(f"{kind} {seed}")
  pairs = [(rng.randrange(40), rng.randrange(40)) for _ in range(size)]
  return [{"question": f"{kind}: {x} + {y} =", "answer": str(x + y)} for x, y in pairs]


@pytest.fixture
def script(monkeypatch):
  """The script, with a stand-in for reasoning-gym, which is not installed with the tests."""
  stand_in = types.SimpleNamespace(create_dataset=create_dataset)
  monkeypatch.setitem(sys.modules, "reasoning_gym", stand_in)
  return load_config(ROOT / "tools" / "reasoning_gym_problems.py")


def test_no_question_is_in_two_files(script, tmp_path):
  script.main(tmp_path)
  files = {name: (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in script.PARTS}
  rows = [json.loads(line) for lines in files.values() for line in lines]
  assert {name: len(lines) for name, lines in files.items()} == script.PARTS
  assert len({row["prompt"] for row in rows}) == len(rows)
  for name, lines in files.items():
    kinds = [json.loads(line)["kind"] for line in lines]
    assert {kinds.count(kind) for kind in script.KINDS} == {script.PARTS[name] // 4}


def test_too_few_distinct_questions_are_refused(script, monkeypatch):
  monkeypatch.setattr(script, "KINDS", {"lcm": {}})
  with pytest.raises(ValueError, match=r"lcm has \d+ questions; expected 1600. Widen"):
    script.problems("lcm", 1600)
