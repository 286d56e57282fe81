"""tools/ablations.py: its variants, and its tables."""

import json
import operator
import re
import subprocess
import sys

import ablations
import experiments
import pytest
import tiny_store

from distill_jax import cli


def test_every_variant_is_in_a_table_and_can_be_a_key_of_the_config():
  assert all("." not in name for name in ablations.VARIANTS)
  assert {name for names in ablations.TABLES.values() for name in names} == set(ablations.VARIANTS)


@pytest.mark.parametrize("name", ablations.VARIANTS)
def test_the_flags_of_a_variant_are_keys_of_the_demo(name, monkeypatch):
  variant = ablations.VARIANTS[name]
  given = (*ablations.shared_flags(variant, 1), *variant.records, *variant.flags)
  argv = ["train", f"--config={ablations.CONFIG}:{variant.student}", *given]
  monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for keys
  c = cli.parse(argv)
  assert c.data.sequences == 16 * variant.times and c.seed == 1
  assert c.train.online == (ablations.ONLINE in variant.flags)
  if variant.student == "distilled":
    assert c.losses["soft"].weight(0) + c.losses["hard"].weight(0) == 1


def test_a_student_of_other_layers_keeps_a_quarter_from_the_start():
  assert "--config.student.keep_layers=(0, 25, 26, 27, 28, 29)" in ablations.shared_flags(
    ablations.VARIANTS["hard-layers-6"], 0
  )


def test_records_are_shared_by_students_with_the_same_text_and_seed():
  variants = ablations.VARIANTS
  same = {ablations.records_of(variants[name], 0) for name in ("hard", "online", "reverse-kl")}
  other = (
    ablations.records_of(variants["hard-text-2"], 0),
    ablations.records_of(variants["hard"], 1),
  )
  assert len(same) == 1 and len({*same, *other}) == 3


def test_the_table_has_the_share_of_the_gain_of_a_teacher_in_the_step():
  kl = {"hard": (2.0, 2.1, 1.9), "points-8": (1.6, 1.5, 1.4), "online": (1.0, 1.1, 0.9)}
  done = {
    (name, seed): {"kl": value, "ce": 2 * value, "agreement": 0.25}
    for name, values in kl.items()
    for seed, value in enumerate(values)
  }
  lines = ablations.markdown(done, tuple(kl), [0, 1, 2], ["", "25.0", ""]).splitlines()
  assert lines[2:] == [
    "| hard |  | 2.000 | 2.000, 2.100, 1.900 | 4.000 | 25.0% | 0.0% |",
    "| points-8 | 25.0 | 1.500 | 1.600, 1.500, 1.400 | 3.000 | 25.0% | 50.0% |",
    "| online |  | 1.000 | 1.000, 1.100, 0.900 | 2.000 | 25.0% | 100.0% |",
  ]
  with pytest.raises(KeyError, match="'hard', 3"):
    ablations.markdown(done, ("hard",), [3], [""])


def test_a_student_is_trained_and_evaluated_once_and_its_checkpoints_are_deleted(
  tmp_path, monkeypatch
):
  calls = []

  def run(verb, name, *given, folder, log):
    workdir = folder / next(flag for flag in given if "workdir" in flag).partition("=")[2]
    calls.append((verb, workdir.name))
    (workdir / "checkpoints").mkdir(parents=True)
    if verb == "evaluate":
      flag = next(flag for flag in given if "models" in flag)
      students = re.findall(r"'([\w-]+)':", flag)
      calls[-1] = verb, *students
      figures = {"kl": 1.0, "ce": 2.0, "agreement": 0.5, "bytes": 7}
      models = dict.fromkeys(students, figures)
      (workdir / "evaluation.json").write_text(json.dumps({"models": models}))

  monkeypatch.setattr(ablations, "run_command", run)
  key_of = operator.itemgetter("student", "seed")
  for names in (("hard",), ("hard",), ("hard", "online")):
    results = experiments.Results(tmp_path, key_of)  # read from the folder
    ablations.measure(tmp_path, results, names, 2)
    assert [results.done[name, 2]["kl"] for name in names] == [1.0] * len(names)
    assert not any(tmp_path.glob("*-2/checkpoints"))
  assert calls == [
    ("record", "text-16-2"),
    ("train", "hard-2"),
    ("evaluate", "hard-2"),
    ("train", "online-2"),
    ("evaluate", "online-2"),
  ]


def test_another_text_is_read_by_all_commands(tmp_path, monkeypatch):
  made = []

  def run(verb, name, *given, folder, log):
    monkeypatch.setattr(sys, "argv", [verb, f"--config={name}", *given])
    c = cli.parse(sys.argv)
    made.append((verb, (c.data.kind, c.data.path)))
    workdir = folder / next(flag for flag in given if "workdir" in flag).partition("=")[2]
    (workdir / "checkpoints").mkdir(parents=True)
    if verb == "evaluate":
      kl = {"hard-0": 2.0, "points-63-0": 1.25, "points-255-0": 1.0, "online-0": 1.0}
      models = {name: {"kl": kl[name], "ce": 2.0, "agreement": 0.5} for name in c.evaluate.models}
      (workdir / "evaluation.json").write_text(json.dumps({"models": models}))

  monkeypatch.setattr(ablations, "run_command", run)
  novels, folder = tmp_path / "novels", tmp_path / "runs"
  arguments = ["", str(folder), "--tables=records", "--seeds=0"]
  monkeypatch.setattr(sys, "argv", [*arguments, f"--text={novels}"])
  monkeypatch.setattr(ablations, "payload_per_token", lambda folder: 40.0)
  ablations.main()
  assert {verb for verb, _ in made} == {"record", "train", "evaluate"}
  assert {text for _, text in made} == {("text", str(novels))}
  monkeypatch.setattr(sys, "argv", arguments)
  with pytest.raises(SystemExit):  # the demo's text, in the folder of another text
    ablations.main()


def test_records_that_were_interrupted_are_completed(tmp_path, monkeypatch):
  verbs = []

  def run(verb, name, *given, folder, log):
    verbs.append(verb)
    (tmp_path / "records" / "text-16-0").mkdir(parents=True, exist_ok=True)
    if len(verbs) == 1:
      raise subprocess.CalledProcessError(-9, verb)

  monkeypatch.setattr(ablations, "run_command", run)
  with pytest.raises(subprocess.CalledProcessError):
    ablations.train(tmp_path, "hard", 0)
  for _ in range(2):
    ablations.train(tmp_path, "hard", 0)
  assert verbs == ["record", "record", "train", "train"]


def test_the_payload_is_that_of_the_shards(tmp_path):
  tiny_store.record(tmp_path)
  shards = [json.loads(f.read_text()) for f in tmp_path.glob("*.array_record.json")]
  size = sum(sum(shard["fields"].values()) for shard in shards)
  tokens = sum(shard["tokens"] for shard in shards)
  assert ablations.payload_per_token(tmp_path) == pytest.approx(size / tokens, abs=1e-3)
