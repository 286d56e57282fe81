"""`retarget`: the stores that it makes, with any number of processes, and after any stop."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import deadly_convert
import numpy as np
import pytest
import retarget_runs
import tiny
import tiny_run
from retarget_runs import END, HELDOUT, ROWS, made, run, stores

from distill_jax import cli, config
from distill_jax.commands import inspect
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError, Preempted
from distill_jax.records.store import open_store
from distill_jax.retarget import convert, job
from distill_jax.runtime import distributed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A folder with the source, and with the result of one run in this process."""
  folder = tmp_path_factory.mktemp("whole")
  retarget_runs.write_source(folder / "source")
  run(made(folder / "source"), folder / "done")
  return folder


def test_the_result_is_an_ordinary_store_of_the_same_texts(whole):
  source, store = open_store(whole / "source" / "records"), open_store(whole / "done")
  teacher = load_tokenizer(whole / "source" / "teacher.json")
  student = load_tokenizer(whole / "source" / "student.json")
  m = store.manifest
  assert (m.kind, m.n, m.seq_len, m.vocab_size) == ("sampled", source.manifest.n, 128, 300)
  assert (m.tokenizer, m.teacher) == (student.digest, source.manifest.teacher)
  assert m.retargeted == {
    "tokenizer": teacher.digest,
    "store": source.manifest.digest,
    "method": "samples",
    "min_mass": 0.0,
  }
  store.verify()
  for i in range(ROWS):
    theirs, ours = source[i], store[i]
    text = teacher.decode(theirs["tokens_T"][theirs["segments_T"] > 0])
    assert student.decode(ours["tokens_T"][ours["segments_T"] > 0]) == text
    np.testing.assert_allclose(ours["weight_TK"].sum(1), ours["mask_T"], atol=1e-6)


def test_inspect_prints_the_statistics_of_every_store(whole, tmp_path):
  c = config.resolve(made(whole / "source"))
  found = inspect.run(c, whole / "done")
  assert found["retarget.rows"] == ROWS and found["heldout/retarget.rows"] == HELDOUT
  kinds = ("exact", "within", "spanning", "inside")
  assert sum(found[f"retarget.share.{kind}"] for kind in kinds) == pytest.approx(1, abs=1e-3)
  assert all(found[f"retarget.{name}"] == found[name] for name in ("targets", "tokens"))
  names = ("fell_back", "lost_mass", "misplaced_mass", "overlap.student", "padding", "cut_tokens")
  assert all(f"retarget.{name}" in found for name in names)
  assert not any("retarget." in key for key in inspect.run(c, whole / "source" / "records"))
  shutil.copytree(whole / "done", tmp_path / "done")
  (tmp_path / "done" / "retarget.json").write_text('{"statistics": {"rows": 1}}')
  with pytest.raises(InputError, match=r"retarget.json is not complete .*Delete it and run"):
    inspect.run(c, tmp_path / "done")


def test_a_student_trains_on_the_result(tmp_path):
  """The student has 256 tokens, as llama.TINY has rows, of which one ends documents."""
  retarget_runs.write_source(tmp_path / "source")
  student = tiny.write_tokenizer(tmp_path / "source" / "student.json")
  run(made(tmp_path / "source", seq_len=32, roles={END: "!"}), tmp_path / "records")
  c = tiny.tiny(tmp_path)
  c.data.tokenizer = str(tmp_path / "source" / "teacher.json")  # as for `retarget`
  c.retarget.tokenizer, c.train.steps, c.teacher.source = str(student), 1, ""
  metrics = tiny_run.train(c, tmp_path / "run")
  assert np.isfinite(metrics["loss"])
  c.retarget.tokenizer = ""
  with pytest.raises(InputError, match="made with another tokenizer"):
    tiny_run.train(c, tmp_path / "other")


def test_slices_make_the_same_stores(whole, tmp_path):
  now = [run(made(whole / "source", slice=f"{i}/2"), tmp_path)["retargeted_now"] for i in (1, 0)]
  assert now == [8, 12]
  assert not (tmp_path / "retarget.json").exists()
  assert run(made(whole / "source"), tmp_path)["retargeted_now"] == 0
  assert stores(tmp_path) == stores(whole / "done")


def test_two_processes_make_the_same_stores_if_one_is_killed(whole, tmp_path, monkeypatch, capfd):
  file, row = tmp_path / "killed", retarget_runs.PER_SHARD
  deadly = lambda *args: deadly_convert.Deadly(deadly_convert.WORK(*args), row, str(file))
  monkeypatch.setattr(job, "Work", deadly)
  monkeypatch.setattr(convert, "convert", deadly_convert.convert_deadly)
  assert run(made(whole / "source", workers=2), tmp_path / "done")["retargeted_now"] == ROWS
  assert file.exists()
  assert "retarget: a worker process was killed; its work is repeated." in capfd.readouterr().err
  assert stores(tmp_path / "done") == stores(whole / "done")


@pytest.mark.slow
@pytest.mark.parametrize("call", [0, *range(2, 10), 24, 37, 39, 42])
def test_a_killed_run_is_continued_to_the_same_stores(whole, tmp_path, call):
  script = Path(retarget_runs.__file__)
  command = [sys.executable, script, whole / "source", tmp_path, call, 1]
  env = {**os.environ, "PYTHONPATH": f"{script.parent.parent}:{script.parent}"}
  killed = subprocess.run([str(x) for x in command], env=env, check=False, capture_output=True)
  assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
  finished = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.array_record.json")}
  run(made(whole / "source", workers=1 + call % 2), tmp_path)
  assert stores(tmp_path) == stores(whole / "done")
  assert all(p.stat().st_mtime_ns == time for p, time in finished.items())


def test_sigterm_keeps_the_finished_shards(whole, tmp_path, monkeypatch):
  seen = iter([False, False, True])
  monkeypatch.setattr(distributed.Preemption, "reached", lambda self: next(seen))
  with pytest.raises(Preempted, match="finished shards are kept"):
    run(made(whole / "source"), tmp_path)
  monkeypatch.undo()
  done = run(made(whole / "source"), tmp_path)
  assert done["retargeted_now"] + done["heldout/retargeted_now"] == ROWS + HELDOUT - 12
  assert stores(tmp_path) == stores(whole / "done")


def test_a_shard_without_statistics_is_named(whole, tmp_path):
  shutil.copytree(whole / "done", tmp_path / "done")
  (tmp_path / "done" / "retarget-00002.json").unlink()
  with pytest.raises(InputError, match=r"retarget-00002.json is missing. Delete the shard"):
    run(made(whole / "source"), tmp_path / "done")


def test_text_is_converted_without_targets(whole, tmp_path):
  teacher = whole / "source" / "teacher.json"
  rows = retarget_runs.records(teacher, 0, 6)
  retarget_runs.write_store(tmp_path / "text", teacher, rows, kind="text", n=0, teacher={})
  result = run(made(whole / "source", records=str(tmp_path / "text")), tmp_path / "done")
  ours, sampled = open_store(tmp_path / "done"), open_store(whole / "done")
  assert ours.manifest.kind == "text" and result["share.exact"] > 0.5
  for i in range(6):
    for name in ("tokens_T", "segments_T", "mask_T"):
      np.testing.assert_array_equal(ours[i][name], sampled[i][name])


def test_equal_tokenizers_give_the_same_rows(whole, tmp_path):
  run(made(whole / "source", tokenizer=str(whole / "source" / "teacher.json")), tmp_path)
  theirs, ours = open_store(whole / "source" / "records"), open_store(tmp_path)
  assert ours.manifest.seq_len == theirs.manifest.seq_len
  for i in range(ROWS):
    for name, array in theirs[i].items():
      np.testing.assert_array_equal(ours[i][name], array, name)


def test_a_dry_run_estimates_the_whole_and_writes_nothing(whole, tmp_path, capsys, monkeypatch):
  c = made(whole / "source", dry_run=True)
  lines = "\n".join(f"  c.retarget.{k} = {v!r}" for k, v in c.retarget.items() if k != "roles")
  Path(tmp_path / "c.py").write_text(
    "from distill_jax import config\ndef get_config():\n  c = config.base()\n"
    f"  c.teacher.shape = c.student.shape = 'tiny'\n{lines}\n"
    f"  c.data.tokenizer = {c.data.tokenizer!r}\n  return c\n"
  )
  monkeypatch.chdir(tmp_path)
  cli.main(["distill-jax", "retarget", "--config=c.py", "--json"])
  found = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert {p.name for p in tmp_path.iterdir()} <= {"c.py", "__pycache__"}
  done = inspect.run(config.resolve(c), whole / "done")
  assert found["sampled_share"] == 1  # a small store is its own sample
  assert found["estimate.tokens"] == done["tokens"]
  payload = sum(v for k, v in done.items() if k.startswith("payload.")) * done["tokens"]
  assert found["estimate.bytes"] == pytest.approx(payload, rel=0.3)  # names of fields
  for key in ("share.exact", "share.inside", "fell_back", "lost_mass"):
    assert found[key] == done[f"retarget.{key}"]
    assert found[f"heldout/{key}"] == done[f"heldout/retarget.{key}"]


def test_a_worker_process_does_not_import_jax():
  code = "import sys\nfrom distill_jax.retarget import convert\nassert 'jax' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True)
