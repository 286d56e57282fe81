"""tools/records_evidence.py: the layers of its students, and its table."""

import json

import pytest
import records_evidence as evidence
import tiny_store


def test_the_student_keeps_the_ends_of_the_teacher():
  assert "--config.student.keep_layers=(0, 1, 2, 27, 28, 29)" in evidence.flags(6, 0)
  assert "--config.student.keep_layers=(0, 28, 29)" in evidence.flags(3, 0)


def test_the_table_has_the_share_of_the_gain_of_a_teacher_in_the_step(tmp_path, monkeypatch):
  kl = {"8": (1.6, 1.5, 1.4), "hard": (2.0, 2.1, 1.9), "online": (1.0, 1.1, 0.9)}
  names = [f"{target}-{seed}" for target in kl for seed in range(3)]
  values = [kl[target][seed] for target in kl for seed in range(3)]
  models = {name: {"kl": value} for name, value in zip(names, values, strict=True)}
  (tmp_path / "evaluation.json").write_text(json.dumps({"models": models}))
  sizes = {"records-8-0": 20.0, "records-8-1": 30.0}
  for name in sizes:
    (tmp_path / name).mkdir()
  monkeypatch.setattr(evidence, "payload_per_token", lambda folder: sizes[folder.name])
  lines = evidence.table(tmp_path, names).splitlines()
  assert lines[2] == "| 8 | 25.0 | 1.500 | 1.600, 1.500, 1.400 | 50.0% |"
  assert lines[3:] == [
    "| hard |  | 2.000 | 2.000, 2.100, 1.900 | 0.0% |",
    "| online |  | 1.000 | 1.000, 1.100, 0.900 | 100.0% |",
  ]


def test_the_payload_is_that_of_the_shards(tmp_path):
  tiny_store.record(tmp_path)
  shards = [json.loads(f.read_text()) for f in tmp_path.glob("*.array_record.json")]
  size = sum(sum(shard["fields"].values()) for shard in shards)
  tokens = sum(shard["tokens"] for shard in shards)
  assert evidence.payload_per_token(tmp_path) == pytest.approx(size / tokens, abs=1e-3)


def test_a_missing_student_is_an_error(tmp_path):
  (tmp_path / "evaluation.json").write_text(json.dumps({"models": {}}))
  with pytest.raises(KeyError, match="hard-0"):
    evidence.table(tmp_path, ["hard-0"])
