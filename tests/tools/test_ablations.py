"""tools/ablations.py: its variants, and its tables."""

import json
import re
import sys
from pathlib import Path

import ablations
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
  models = {
    f"{name}-{seed}": {"kl": value, "ce": 2 * value, "agreement": 0.25}
    for name, values in kl.items()
    for seed, value in enumerate(values)
  }
  lines = ablations.markdown(models, tuple(kl), [0, 1, 2], ["", "25.0", ""]).splitlines()
  assert lines[2:] == [
    "| hard |  | 2.000 | 2.000, 2.100, 1.900 | 4.000 | 25.0% | 0.0% |",
    "| points-8 | 25.0 | 1.500 | 1.600, 1.500, 1.400 | 3.000 | 25.0% | 50.0% |",
    "| online |  | 1.000 | 1.000, 1.100, 0.900 | 2.000 | 25.0% | 100.0% |",
  ]
  with pytest.raises(KeyError, match="hard-3"):
    ablations.markdown(models, ("hard",), [3], [""])


def test_a_finished_evaluation_is_made_again_if_it_lacks_a_student(tmp_path, monkeypatch):
  calls = []

  def run(verb, name, *given, folder, log):
    workdir = Path(next(flag for flag in given if "workdir" in flag).partition("=")[2])
    students = re.findall(r"'([\w-]+)':", next(flag for flag in given if "models" in flag))
    calls.append(students)
    workdir.mkdir(parents=True)
    models = {student: {"kl": 1.0} for student in students}
    (workdir / "evaluation.json").write_text(json.dumps({"models": models}))

  monkeypatch.setattr(ablations, "run_command", run)
  for names in (("hard",), ("hard",), ("hard", "online")):
    found = ablations.evaluate(tmp_path, "text", names, 2)
    assert found.keys() == {f"{name}-2" for name in names}
  assert calls == [["hard-2"], ["hard-2", "online-2"]]


def test_the_payload_is_that_of_the_shards(tmp_path):
  tiny_store.record(tmp_path)
  shards = [json.loads(f.read_text()) for f in tmp_path.glob("*.array_record.json")]
  size = sum(sum(shard["fields"].values()) for shard in shards)
  tokens = sum(shard["tokens"] for shard in shards)
  assert ablations.payload_per_token(tmp_path) == pytest.approx(size / tokens, abs=1e-3)
