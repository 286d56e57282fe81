"""Teachers with another tokenizer than the student's, in several processes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_pair
import tiny_run

from distill_jax.records.store import open_store
from distill_jax.training.metric_writer import read_metrics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def changes(folder: Path) -> dict:
  """Returns the keys in which the config differs from tiny.tiny."""
  return {
    "teacher.source": "",
    "data.tokenizer": str(folder / "teacher.json"),
    "data.sequences": 8,
    "records.kind": "dense",
    "records.student_tokenizer": str(folder / "student.json"),
    "records.tokens_per_shard": 64,
    "retarget.seq_len": 32,
    "retarget.tokenizer": str(folder / "student.json"),
    "train.steps": 3,
  }


def one_process(folder: Path):
  c = tiny.tiny(folder)
  c.update_from_flattened_dict(changes(folder))
  return c


def launch(folder: Path, verb: str, workdir: str, tensor: int) -> None:
  """Runs a command in two processes, whose border is that of the axis tensor, if it is 2."""
  words = [
    "--processes=2",
    f"--devices={2 // tensor}",
    "--",
    verb,
    f"--config={folder / 'config.py'}",
  ]
  words += [f"--workdir={folder / workdir}", f"--config.mesh.tensor={tensor}"]
  line = [sys.executable, "launch/local.py", *words]
  done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=300)
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Returns a folder with a text, both tokenizers, and what one process records and trains."""
  path = tmp_path_factory.mktemp("processes")
  tiny_pair.teacher_config(path, 1500)  # writes the text and the tokenizers
  lines = [f"c.{key} = {value!r}" for key, value in changes(path).items()]
  tiny.write_config(path / "config.py", path, *lines)
  c = one_process(path)
  tiny_run.record(c, path / "one")
  return path


@pytest.mark.parametrize("tensor", [1, 2])
def test_two_processes_record_what_one_records(folder, tensor):
  """With the axes fsdp and tensor across processes. Sums in another order differ in float32."""
  launch(folder, "record", f"two{tensor}", tensor)
  one, two = open_store(folder / "one"), open_store(folder / f"two{tensor}")
  assert one.manifest.corpus == two.manifest.corpus and len(one) == len(two) == 8
  for i in range(8):
    for name in ("tokens_T", "mask_T"):
      np.testing.assert_array_equal(one[i][name], two[i][name])
    np.testing.assert_allclose(
      dense(one[i], one.manifest.vocab_size), dense(two[i], two.manifest.vocab_size), atol=2e-3
    )  # log-probabilities are stored as float16


def dense(record, vocab_size):
  """Returns the probabilities of all tokens, [T, V]."""
  p_TV = np.zeros((len(record["tokens_T"]), vocab_size))
  np.put_along_axis(p_TV, record["ids_TK"], np.exp(record["logp_TK"]), 1)
  return p_TV


@pytest.mark.parametrize("tensor", [1, 2])
def test_two_processes_train_with_an_online_teacher(folder, tensor):
  c = one_process(folder)
  c.records.student_tokenizer, c.records.kind = "", "text"
  if not (folder / "text").exists():
    tiny_run.record(c, folder / "text")
  lines = {"train.records": (str(folder / "text"),), "train.online": True}
  c.update_from_flattened_dict(lines)
  c.retarget.seq_len = 0
  changed = [f"c.{k} = {v!r}" for k, v in (changes(folder) | lines).items()]
  changed += ["c.retarget.seq_len = 0", 'c.records.student_tokenizer = ""']
  tiny.write_config(folder / "config.py", folder, *changed)
  if not (folder / "run").exists():
    tiny_run.train(c, folder / "run")
  launch(folder, "train", f"run{tensor}", tensor)
  one, two = read_metrics(folder / "run"), read_metrics(folder / f"run{tensor}")
  assert [row["step"] for row in one] == [row["step"] for row in two] == [0, 1, 2]
  for a, b in zip(one, two, strict=True):
    for name in ("loss", "ce", "grad_norm", "kl/teacher"):
      assert a[name] == pytest.approx(b[name], rel=2e-5, abs=2e-6), (a["step"], name)
