"""`evaluate` on benchmarks: local and served models, interrupted runs, errors, and the report."""

import json
from pathlib import Path

import bad_server
import pytest
import tiny
from json_lines import read_lines, write_lines

from distill_jax import cli, config
from distill_jax.commands import evaluate as evaluation
from distill_jax.errors import InputError
from distill_jax.evals import heldout
from distill_jax.generation import local, servers
from distill_jax.report import model_card
from distill_jax.report.examples import Examples
from distill_jax.report.html_report import write_report

QUESTIONS = ["3 times 6 is", "hello", "0 times 3"]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
  monkeypatch.setattr(servers, "FIRST_WAIT_S", 0.02)


def made(folder: Path, **changes):
  c = tiny.tiny(folder)
  c.teacher.source = ""
  c.generate.update(batch_size=4, prefill_rows=4, cache_len=64, prefill_chunk=16, steps=4)
  c.evaluate.update(heldout=False, max_new_tokens=6, batch_size=4, temperature=0.0, top_p=1.0)
  c.evaluate.update(changes)
  return c


def run(c, folder: Path):
  return evaluation.run(config.resolve(c), folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """(folder, config, result) of a run on multiple-choice and generative questions."""
  folder = tmp_path_factory.mktemp("evaluate")
  c = made(folder, on_bad="skip")
  rows = [{"question": q, "answer": "?"} for q in [*QUESTIONS, "x" * 70]] + [{}]
  c.evals.words = config.benchmark(
    "jsonl", path=str(write_lines(folder / "w.jsonl", rows)), score="exact"
  )
  first = run(c, folder / "run")["evals"]["words"]["teacher"]
  assert first["pass@1"]["value"] == 0 and first["cut_off"] == 1 and first["tokens"] == 6
  texts = {r["id"]: r["text"] for r in read_lines(folder / "run/evals/teacher/words/samples")}
  for i in (0, 2):
    rows[i]["answer"] = texts[i]
  write_lines(folder / "w.jsonl", rows)
  choices = [
    {"question": q, "choices": ["18, as", "no"], "label": i % 2} for i, q in enumerate(QUESTIONS)
  ]
  choices += [{"question": "x" * 130, "choices": ["a", "b"], "label": 0}]
  path = str(write_lines(folder / "c.jsonl", choices))
  c.evals.choices = config.benchmark("jsonl", path=path, score="choice")
  with pytest.MonkeyPatch.context() as patch:  # finished answers are not sampled again
    patch.setattr(local, "make_scheduler", None)
    return folder, c, run(c, folder / "run")


def test_generative_benchmarks(whole):
  folder, _, result = whole
  words = result["evals"]["words"]["teacher"]
  assert (words["questions"], words["left_out"], words["samples"]) == (3, 2, 1)
  assert words["pass@1"]["value"] == pytest.approx(2 / 3)
  assert 0 <= words["pass@1"]["low"] < 2 / 3 < words["pass@1"]["high"] <= 1
  at = folder / "run/evals/teacher/words"
  verdicts = read_lines(at / "verdicts.jsonl")
  assert [(v["id"], v["sample"], v["right"]) for v in verdicts] == [
    (0, 0, True),
    (1, 0, False),
    (2, 0, True),
  ]
  assert verdicts[1]["why"].startswith("wrong: ") and verdicts[0]["why"] is None
  left = {r["question"][-6:]: r["reason"] for r in read_lines(at / "left_out.jsonl")}
  assert "no field 'question'" in left["line 5"] and "generate.cache_len is 64" in left["line 4"]
  assert result["models"] == {}
  assert json.loads((folder / "run/evaluation.json").read_text()) == result


def test_bad_rows_and_prompts_stop_the_run(whole):
  folder, c, _ = whole
  c = c.copy_and_resolve_references()
  c.evaluate.on_bad = "stop"
  del c.evals["choices"]
  with pytest.raises(InputError, match="evals.words: .*line 5: The row has no field 'question'"):
    run(c, folder / "stop")
  c.evals.words.limit = 4
  with pytest.raises(InputError, match="evals.words: .*prompt has 70 tokens.*evaluate.on_bad=skip"):
    run(c, folder / "stop")


def test_multiple_choice_compares_likelihoods(whole):
  folder, _, result = whole
  verdicts = read_lines(folder / "run/evals/teacher/choices/verdicts.jsonl")
  best = lambda v, weights: max(range(2), key=lambda i: v["logps"][i] / weights[i])
  for v in verdicts:
    assert all(x < 0 for x in v["logps"])
    assert v["chosen"] == best(v, (1, 1)) and v["chosen_norm"] == best(v, (6, 2))
  row = result["evals"]["choices"]["teacher"]
  assert (row["questions"], row["left_out"]) == (3, 1)
  (left,) = read_lines(folder / "run/evals/teacher/choices/left_out.jsonl")
  assert "longer than the model's limit, 128 tokens" in left["reason"]
  assert left["question"].endswith("line 4")
  for name, chosen in (("acc", "chosen"), ("acc_norm", "chosen_norm")):
    assert row[name]["value"] == pytest.approx(sum(v[chosen] == v["label"] for v in verdicts) / 3)


def test_answers_of_another_run_raise(whole):
  folder, c, _ = whole
  c = c.copy_and_resolve_references()
  del c.evals["choices"]
  c.evaluate.max_new_tokens = 7
  with pytest.raises(InputError, match="max_new_tokens=6, but it is now 7. Delete the folder"):
    run(c, folder / "run")
  c.evaluate.max_new_tokens = 6
  c.evals.words.limit = 2
  with pytest.raises(InputError, match="evals.words: .*samples of other prompts"):
    run(c, folder / "run")


def test_results_in_the_report_and_the_model_card(whole, tmp_path):
  _, c, result = whole
  numbers = write_report(tmp_path, result)
  page = (tmp_path / "report.html").read_text()
  assert numbers["evals"] == result["evals"] and numbers["teacher"]["ce"] is None
  assert "words pass@1" in page and "66.7% (0.0% to 100.0%)" in page and "2 skipped" in page
  assert "choices acc_norm" in page and "Held-out results" not in page
  summary = cli.summary("evaluate", result)
  assert "words pass@1, 3 questions, 2 skipped" in summary and "teacher 66.7% (0.0% to" in summary
  text = model_card.card(config.resolve(c), 1, result)
  assert "| words pass@1, 3 questions, " in text and "66.7% (" in text


def server_says(texts):
  """Returns a fake server's answers: the n-th sample of a prompt is the n-th text."""
  count: dict[str, int] = {}

  def answer(body):
    prompt = bad_server.text_of(body)
    n = count[prompt] = count.get(prompt, -1) + 1
    content = next(t for q, t in texts.items() if q in prompt)[n]
    return {
      "id": "x",
      "choices": [{"finish_reason": "stop", "message": {"content": content}}],
      "usage": {"prompt_tokens": 3, "completion_tokens": 7},
    }

  return answer


def test_several_samples_from_a_server(tmp_path):
  pytest.importorskip("math_verify")
  texts = {
    "half": ["so \\boxed{\\frac{1}{2}}", "0.5", "it is \\boxed{\\dfrac12}", "\\boxed{3}"],
    "angle": ["\\boxed{336}", "\\boxed{12}", "12", "\\boxed{12}"],
    "refused": [],
  }
  rows = [
    {"question": q, "answer": a}
    for q, a in (("half", "1/2"), ("angle", "336^\\circ"), ("refused", "1"))
  ]
  c = made(tmp_path, temperature=0.6, top_p=0.95, samples=4, on_bad="skip")
  c.generate.chat, c.generate.server.in_flight = True, 1
  c.evals.aime = config.benchmark("aime", path=str(write_lines(tmp_path / "a.jsonl", rows)))
  with bad_server.Server(answer=server_says(texts)) as server:
    server.faults[c.evals.aime.prompt.replace("{question}", "refused")] = ["400"] * 4
    c.evaluate.models = {"big": f"{server.url}#big", "again": f"{server.url}#big"}
    c.evaluate.on = ("big",)
    row = run(c, tmp_path / "w")["evals"]["aime"]["big"]
    body = server.bodies[0]
  assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"]) == (
    "big",
    0.6,
    0.95,
    6,
  )
  assert (row["questions"], row["left_out"], row["samples"]) == (2, 1, 4)
  assert row["pass@1"]["value"] == pytest.approx((3 / 4 + 1 / 4) / 2)
  assert row["pass@4"]["value"] == 1 and row["maj@4"]["value"] == 0.5
  assert row["tokens"] == 7 and row["cut_off"] == 0
  answers = [v["answer"] for v in read_lines(tmp_path / "w/evals/big/aime/verdicts.jsonl")]
  assert answers == ["1/2", "1/2", "1/2", "3", "336", "12", "12", "12"]
  left = read_lines(tmp_path / "w/evals/big/aime/left_out.jsonl")
  assert [r["question"][-16:] for r in left] == [f"line 3, sample {i}" for i in range(4)]


URL = "http://127.0.0.1:9/v1"


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"heldout": False}, "heldout is False; expected .* because there is nothing to evaluate"),
    ({"heldout": False, "on": ("me",), "sets": "choice"}, r"evaluate.on is \('me',\); .*'me'"),
    ({"heldout": False, "models": {"s": URL}, "sets": "choice"}, "evals.x .*and 's' is served"),
    ({"heldout": True, "models": {"s": URL}, "sets": "exact"}, "heldout is True; .*'s' is served"),
    ({"heldout": False, "samples": 4, "sets": "exact"}, "temperature is 0.0; .*4 samples"),
    ({"heldout": False, "max_new_tokens": 0, "sets": "exact"}, "evals.x: evaluate.max_new_tok"),
  ],
)
def test_bad_configs_raise(tmp_path, changes, says):
  score = changes.pop("sets", None)
  c = made(tmp_path, **changes)
  if score:
    row = {"question": "q", "answer": "a", "choices": ["u", "v"], "label": 0}
    c.evals.x = config.benchmark(
      "jsonl", path=str(write_lines(tmp_path / "x.jsonl", [row])), score=score
    )
  with pytest.raises(InputError, match=says):
    run(c, tmp_path / "w")


def test_benchmarks_together_with_heldout_text(tmp_path, monkeypatch):
  row = {"ce": 1.0, "perplexity": 2.7, "kl": 0.0, "agreement": 1.0, "parameters": 5}
  text = {"models": {"teacher": row}, "tokens": 9.0, "corpus": "text"}  # see test_run.py
  monkeypatch.setattr(heldout, "measure", lambda *_: (dict(text), Examples()))
  c = made(tmp_path, heldout=True, models={"s": ""})
  rows = [{"question": "q", "choices": ["u", "v"], "label": 0}]
  c.evals.x = config.benchmark(
    "jsonl", path=str(write_lines(tmp_path / "x.jsonl", rows)), score="choice"
  )
  result = run(c, tmp_path / "w")
  assert {k: result[k] for k in text} == text and list(result["evals"]["x"]) == ["s"]
  write_report(tmp_path / "w")
  page = (tmp_path / "w/report.html").read_text()
  assert "Held-out results" in page and "x acc_norm" in page
  assert "teacher: ce 1, perplexity 2.7" in cli.summary("evaluate", result)
  both = model_card.card(config.resolve(c), 1, result)
  assert "| x acc, 1 questions |" in both and "9 held-out tokens of text" in both
