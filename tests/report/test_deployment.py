"""deployment.json: what is read back, what is refused, and how page and model card show it."""

import dataclasses
import json

import pytest
from html_pages import Page

from distill_jax import config
from distill_jax.errors import InputError
from distill_jax.report import deployment, deployment_view, model_card
from distill_jax.report.deployment import Bound, Deployment, ModelFile
from distill_jax.report.html_report import write_report

pytestmark = pytest.mark.smoke

FILES = (
  ModelFile("teacher", "F16", 200_000_000, 1e-6, 300_000_000, 50.0, 1.0),
  ModelFile("teacher", "Q4_0", 60_000_000, 0.25, 150_000_000, 75.0, 1.5),
  ModelFile("student", "F16", 120_000_000, 0.0, 210_000_000, 100.0, 2.0, 2.0),
  ModelFile("student", "Q4_0", 38_000_000, 0.125, 140_000_000, 172.5, 3.45, 2.3),
  ModelFile("student", "int4", 90_000_000, 0.1),
)
R1, QWEN = ("DeepSeek-R1", "Qwen2.5 7B"), (("Q4_0", 45 * 10**8),)
BOUNDS = (Bound(*R1, 700 * 10**9, 14 * 10**9, QWEN, ((1, 2.5), (64, 21.0))),)
SAVED = Deployment(
  teacher="big",
  student="small",
  machine="2 cores of <x86_64>",
  runtime="llama.cpp 3",
  prompt=128,
  new=64,
  rounds=5,
  text="a reference",
  tokens=1_020,
  reference="F16",
  files=FILES,
  chip="v5p",
  context=4_096,
  bounds=BOUNDS,
)


def written(folder, **changes):
  path = folder / "deployment.json"
  path.write_text(json.dumps({**SAVED.to_json(), **changes}))
  return path


def test_a_file_is_read_as_it_was_written(tmp_path):
  assert deployment.read(written(tmp_path)) == SAVED
  assert "kl_to_float" in SAVED.to_json()["files"][2]  # 0 is a number, not a missing one
  assert "tokens_per_second" not in SAVED.to_json()["files"][4]


def file_with(**changes):
  return {"files": [{**SAVED.to_json()["files"][0], **changes}]}


@pytest.mark.parametrize(
  "changes, problem",
  [
    ({"files": []}, "no file in the format 'F16'"),
    ({"reference": "F32"}, "no file in the format 'F32'"),
    ({"files": SAVED.to_json()["files"][:1] * 2}, "two files"),
    ({"files": None}, "NoneType"),
    ({"tokens": -1}, "tokens is -1"),
    ({"rounds": True}, "rounds is True"),
    ({"machine": 2}, "machine is 2"),
    ({"wrong": 1}, "wrong"),
    ({"bounds": [{"teacher": "a", "files": []}]}, "speedups"),
    ({"bounds": [{"teacher": "a", "files": [["Q8_0", 0]]}]}, "is 0"),
    (file_with(model="other"), "'other'"),
    (file_with(bytes=1.5), "bytes is 1.5"),
    (file_with(kl_to_float=-0.1), "kl_to_float is -0.1"),
    (file_with(kl_to_float=float("nan")), "kl_to_float is nan"),
    (file_with(speedup=0), "speedup is 0"),
    (file_with(tokens_per_second="fast"), "tokens_per_second is 'fast'"),
  ],
)
def test_a_broken_file_is_refused_in_one_sentence(tmp_path, changes, problem):
  path = written(tmp_path, **changes)
  with pytest.raises(InputError, match=f"{path} does not hold .*{problem}.*Run it again"):
    deployment.read(path)


def test_a_missing_field_is_refused(tmp_path):
  tree = SAVED.to_json()
  del tree["machine"]
  (tmp_path / "deployment.json").write_text(json.dumps(tree))
  with pytest.raises(InputError, match="machine"):
    deployment.read(tmp_path / "deployment.json")


def test_the_page_shows_the_measurements_beside_the_bounds(tmp_path):
  written(tmp_path)
  write_report(tmp_path, {"models": {}, "evals": {}, "tokens": 1, "corpus": "x", "texts": None})
  page = Page((tmp_path / "report.html").read_text())
  words = " ".join(page.words)
  assert "What a student saves" in words
  assert page.row("Teacher, F16")[1:] == [
    "200.0 MB",
    "100.0%",
    "1e-06",
    "300.0 MB",
    "50.0",
    "1.00×",
    "–",
  ]
  ours = ["38.0 MB", "19.0%", "0.12", "140.0 MB", "172.5", "3.45×", "2.30×"]
  assert page.row("Student, Q4_0")[1:] == ours
  assert page.row("Student, int4")[1:] == ["90.0 MB", "45.0%", "0.1", "–", "–", "–", "–"]
  assert page.row("Qwen2.5 7B of DeepSeek-R1")[1:] == ["14.0 GB", "2.0%", "4.5 GB", "2.5×", "21.0×"]
  assert (
    "As Q4_0, the student takes 38.0 MB, 19.0% of its teacher's F16 file, and generates 3.45 times "
    "as many tokens per second, at a KL of 0.12 to the float32 student."
  ) in words
  assert "2 cores of <x86_64> with llama.cpp 3: 64 tokens after a prompt of 128" in words


def test_a_page_without_measurements_has_no_section(tmp_path):
  write_report(tmp_path, {"models": {}, "evals": {}, "tokens": 1, "corpus": "x", "texts": None})
  assert "What a student saves" not in (tmp_path / "report.html").read_text()


def test_the_model_card_has_the_same_tables():
  lines = model_card.card(config.resolve(config.base()), 3, None, SAVED).splitlines()
  assert lines[lines.index("## What a student saves") - 1] == ""
  row = "| Student, Q4_0 | 38.0 MB | 19.0% | 0.12 | 140.0 MB | 172.5 | 3.45× | 2.30× |"
  assert row in lines
  assert "| Qwen2.5 7B of DeepSeek-R1 | 14.0 GB | 2.0% | 4.5 GB | 2.5× | 21.0× |" in lines
  without = model_card.card(config.resolve(config.base()), 3, None)
  assert "## What" not in without


def test_the_headline_is_about_the_smallest_file_that_was_timed():
  untimed = dataclasses.replace(SAVED, files=(FILES[0], FILES[4]))
  assert deployment_view.headline(untimed) == "No file of the student was timed."
