"""Tests of benchmarks in training: values, resuming, the untouched training state, bad input."""

import pytest
import tiny
from json_lines import read_lines, write_lines
from tiny_run import record_heldout

from distill_jax import config
from distill_jax.commands import evaluate, train
from distill_jax.errors import InputError
from distill_jax.evals import generative
from distill_jax.runtime.workdir import Workdir

QUESTIONS = ["3 times 6 is", "hello", "0 times 3"]


def run(c, folder):
  resolved = config.resolve(c)
  with Workdir(folder, resolved) as path:
    return train.run(resolved, path)


def write_words(folder, answers):
  rows = ({"question": q, "answer": a} for q, a in zip(QUESTIONS, answers, strict=True))
  return str(write_lines(folder / "words.jsonl", rows))


def made(data, folder):
  """Returns a config that generates answers and compares choices after 3 and 6 steps."""
  c = tiny.tiny(data)
  c.train.heldout, c.train.eval_every = (str(folder / "heldout"),), 3
  c.train.eval_benchmarks, c.train.best_metric = ("words", "choices"), "heldout/words/accuracy"
  c.generate.update(batch_size=4, prefill_rows=4, cache_len=64, prefill_chunk=16, steps=4)
  c.evaluate.update(heldout=False, max_new_tokens=6, batch_size=4)
  path = str(folder / "words.jsonl")
  c.evals.words = config.benchmark("jsonl", path=path, score="exact")
  path = str(folder / "choices.jsonl")
  c.evals.choices = config.benchmark("jsonl", path=path, score="choice")
  return c


@pytest.fixture(scope="module")
def folder(tiny_run, tmp_path_factory):
  """Returns a folder with a run, evaluated with answer keys that no answer equals."""
  path = tmp_path_factory.mktemp("in_training")
  record_heldout(tiny_run, path)
  write_words(path, "???")  # one key each
  choices = [
    {"question": q, "choices": [" 18, as", " no"], "label": i % 2} for i, q in enumerate(QUESTIONS)
  ]
  write_lines(path / "choices.jsonl", choices)
  run(made(tiny_run, path), path / "whole")
  return path


def answers(workdir, step):
  return read_lines(workdir / f"evals/step-{step}/words/samples")


def test_values_are_those_of_the_command_evaluate(folder, tiny_run):
  """The command reads the checkpoint. Training goes on as if it had not been evaluated."""
  whole = folder / "whole"
  c = made(tiny_run, folder)
  c.evaluate.models = {"student": f"run:{whole}"}
  found = evaluate.run(config.resolve(c), folder / "command")["evals"]
  of_command = folder / "command/evals/student"
  assert answers(whole, 6) == read_lines(of_command / "words/samples") != answers(whole, 3)
  for file in ("words/verdicts.jsonl", "choices/verdicts.jsonl"):
    assert read_lines(whole / "evals/step-6" / file) == read_lines(of_command / file)
  rows = tiny.measured(whole)
  assert rows[5]["heldout/choices/accuracy"] == found["choices"]["student"]["acc"]["value"] > 0
  assert [row.get("heldout/words/accuracy") for row in rows] == [None, None, 0, None, None, 0]
  trained = [{k: v for k, v in row.items() if "heldout" not in k} for row in rows]
  assert trained == tiny.measured(tiny_run / "whole")


@pytest.mark.slow  # three runs; 6 s of CPU
def test_an_interrupted_run_gets_the_same_values(folder, tiny_run, monkeypatch):
  """Killed in the second evaluation, whose answers are then damaged.

  The answers after the last step are now right, so that the last checkpoint is the best.
  """
  c, stopped, judge = made(tiny_run, folder), folder / "stopped", generative._judge
  write_words(folder, [row["text"] for row in answers(folder / "whole", 6)])

  def power_cut(*args):
    row = judge(*args)
    if "step-6" in str(args[-1]):
      raise KeyboardInterrupt
    return row

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(generative, "_judge", power_cut)
    run(c, stopped)
  (samples,) = (stopped / "evals/step-6/words/samples").glob("*.jsonl")
  samples.write_text(samples.read_text().replace('"text":', '"text": "damaged", "was":'))
  result = run(c, stopped)
  key = "heldout/words/accuracy"
  assert result["best_step"] == 6 and result["best_value"] == result[key] == 1
  for step in (3, 6):
    assert answers(stopped, step) == answers(folder / "whole", step)
  without = ([row | {key: 0} for row in tiny.measured(f)] for f in (stopped, folder / "whole"))
  assert next(without) == next(without)


def keys(**values):
  def change(c):
    for key, value in values.items():
      section, _, name = key.partition("_")
      c[section][name] = value

  return change


def without_file(c):
  c.evals.words.path = "missing.jsonl"


def test_bad_input_is_refused(folder, tiny_run, tmp_path):
  """One sentence each, before anything is loaded or compiled."""
  words = "train.eval_benchmarks is "
  cases = [
    (keys(train_eval_benchmarks=("word",)), words + ".*names of benchmarks in evals .choices, wor"),
    (without_file, "evals.words.*missing.jsonl"),
    (keys(train_heldout=(), train_eval_every=0), words + r".*expected \(\) without train.heldout"),
    (keys(train_best_metric="heldout/word/accuracy"), "metric is .*heldout/words/accuracy"),
    (keys(optim_plateau_metric="heldout/words/accuracy", optim_plateau_patience=1), "is minimised"),
    (keys(generate_cache_len=8), "evals.words: .*prompt has .*generate.cache_len is 8"),
    (keys(generate_cache_len=999), "evals.words: generate.cache_len is 999; expected 2 to 128"),
    (keys(evaluate_samples=2, evaluate_temperature=0.0), "evals.words: evaluate.temperature is 0"),
    (keys(mesh_context=2), "mesh.context is 2; expected 1 with train.eval_benchmarks"),
    (keys(student_family="bert"), "student that continues texts, but bert tiny does not"),
  ]
  for i, (change, message) in enumerate(cases):
    c = made(tiny_run, folder)
    with c.unlocked():
      change(c)
    with pytest.raises(InputError, match=message):
      run(c, tmp_path / f"{i}")
    assert not (tmp_path / f"{i}" / "checkpoints").exists(), message
