"""tools/problem_scores.py: the scores of each problem, as they are read from a folder."""

import json

import problem_scores
import pytest


def test_the_scores_of_problems_are_those_of_their_answers(tmp_path):
  folder = tmp_path / "evals" / "teacher" / "problems"
  folder.mkdir(parents=True)
  rows = [(1, "7", True), (0, "3", False), (1, "8", False), (0, "3", False), (1, "7", True)]
  lines = [{"id": i, "sample": 0, "right": right, "answer": a} for i, a, right in rows]
  (folder / "verdicts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  whole = {"evals": {"problems": {"teacher": {"cut_off": 0.5}}}}
  (tmp_path / "evaluation.json").write_text(json.dumps(whole))
  assert problem_scores.read(tmp_path) == {
    "cut_off": 0.5,
    "right": {"0": 0.0, "1": pytest.approx(2 / 3)},
    "majority": {"0": 0.0, "1": 1.0},
  }
