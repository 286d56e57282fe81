"""tools/self_training_evidence.py: the commands of each student, in order and once; the table."""

import json
import sys

import experiments
import pytest
import self_training_evidence as evidence
from self_training_evidence import HELDOUT, RATES, STUDENTS, VALIDATION

from distill_jax import cli


@pytest.fixture
def commands(tmp_path, monkeypatch):
  """The commands that are run, as (verb, folder, flags); they take no time."""
  made = []

  def run(verb, config, workdir, *flags, folder, log):
    name = workdir.partition("=")[2]
    made.append((verb, name, (f"--config={config}", *flags)))
    if verb == "train":
      (folder / name / "checkpoints").mkdir(parents=True)
    if verb == "evaluate":
      best = name.endswith(f"-{RATES[1]:g}")  # the second of all rates
      row = {"pass@1": {"value": 0.5 if best else 0.25}, "cut_off": 0.0}
      line = {"id": 0, "sample": 0, "right": best, "answer": "7"}
      (folder / name / "evals/teacher/problems").mkdir(parents=True)
      (folder / name / "evals/teacher/problems/verdicts.jsonl").write_text(json.dumps(line) + "\n")
      result = {"evals": {"problems": {"teacher": row}}}
      (folder / name / "evaluation.json").write_text(json.dumps(result))

  monkeypatch.setattr(experiments, "run_command", run)
  monkeypatch.setattr(sys, "argv", ["", str(tmp_path), "--seeds=0,1"])
  return made


def test_all_students_are_trained_once_with_the_best_rate(commands, tmp_path, capsys):
  evidence.main()
  assert f"Learning rate {RATES[1]:g}" in capsys.readouterr().out
  trained = [name for verb, name, _ in commands if verb == "train"]
  assert len(trained) == len(set(trained))
  assert {name for name in trained if name.endswith("-1")} == {
    f"{name}-{seed}-1" for name in STUDENTS for seed in (0, 1)
  }
  measured = [name for verb, name, _ in commands if verb == "evaluate"]
  assert sum(name.startswith(VALIDATION) for name in measured) == 3  # RATES[:3]
  assert sum(name.startswith(HELDOUT) for name in measured) == 2 * (1 + len(STUDENTS))
  assert not list(tmp_path.glob("*-1/checkpoints"))
  made = len(commands)
  evidence.main()
  assert len(commands) == made


def test_the_second_round_generates_with_the_student_of_the_first(commands, tmp_path):
  evidence.Evidence(tmp_path).train("second", 0, 1e-4)
  order = [(verb, name) for verb, name, _ in commands]
  assert order == [
    ("generate", "answers-teacher-0"),
    ("filter", "answers-teacher-0-correct"),
    ("record", "answers-teacher-0-correct-text"),
    ("train", "kept-0-2"),
    ("generate", "answers-kept-0"),
    ("filter", "answers-kept-0-correct"),
    ("record", "answers-kept-0-correct-text"),
    ("train", "second-0-2"),
  ]
  assert "--config.teacher.source=run:kept-0-2" in commands[4][2]


def test_the_flags_are_keys_of_the_config(commands, tmp_path, monkeypatch):
  for name in STUDENTS:
    evidence.Evidence(tmp_path).measure(HELDOUT, name, 1e-4, 0)
  parsed = {}
  for verb, name, flags in commands:
    argv = [verb, *flags]
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for keys
    parsed[name] = cli.parse(argv)
  complete = parsed["answers-teacher-0-complete"]
  assert complete.filter.order == ("ended", "unseen", "new")
  assert set(complete.filters) == set(complete.filter.order)
  assert "right" in parsed["answers-teacher-0-correct"].filter.order
  soft = parsed["soft-0-2"]
  assert soft.train.records == ("answers-teacher-0-correct-sampled",)
  assert [soft.losses[n].weight(0) for n in ("soft", "hard")] == [0.5, 0.5]
  assert list(parsed["all-0-2"].losses) == ["hard"]


def test_the_table_compares_with_kept():
  def row(right):
    values = {"0": right, "1": right}
    number = {"value": right}
    return {"right": values, "pass@1": number, "cut_off": 0.25}

  right = {"teacher": 0.125, "kept": 0.5, "all": 0.25, "soft": 0.5, "second": 0.75}
  done = {(HELDOUT, name, 1e-4, seed): row(x) for name, x in right.items() for seed in (0, 1)}
  lines = evidence.table(done, 1e-4, [0, 1]).splitlines()
  assert "| kept | 50.0% (50.0 to 50.0) | 50.0%, 50.0% | 25.0% |" in lines
  assert "all - kept: -25.0% (-25.0 to -25.0)" in lines
