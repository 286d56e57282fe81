"""Which stages of `distill` run again, and which files it leaves alone. The stages are fakes."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill_jax import config as configs
from distill_jax.commands import distill, evaluate, export, record, report, train
from distill_jax.errors import InputError
from distill_jax.recipe.plan import Request

AFTER = {}  # what happens at the end of a stage, by its name


@pytest.fixture
def calls(monkeypatch):
  """Replaces the stages; returns the names of those that ran."""
  names = []
  AFTER.clear()

  def fake(name):
    def run(config, workdir):
      names.append(name)
      if name == "export":
        Path(config.export.dir).mkdir()
      AFTER.get(name, lambda: None)()
      return {"tokens": config.evaluate.sequences}

    return run

  for module in (record, train, evaluate, export):
    monkeypatch.setattr(module, "run", fake(module.__name__.rpartition(".")[2]))
  monkeypatch.setattr(report, "run", lambda *_: None)
  monkeypatch.setattr(distill.examples, "read", lambda _: SimpleNamespace(generations=[]))
  return names


@pytest.fixture
def config(tmp_path):
  c = configs.base()
  c.losses.soft = configs.loss("kd")
  c.train.records = (f"{tmp_path}/records",)
  c.evaluate.models = {"distilled": f"run:{tmp_path}/train"}
  c.export.dir = f"{tmp_path}/export"
  return configs.resolve(c)


def changed(config, section, **values):
  return dataclasses.replace(
    config, **{section: dataclasses.replace(getattr(config, section), **values)}
  )


def test_a_folder_to_export_to_that_exists_is_refused_before_the_first_stage(
  tmp_path, config, calls
):
  (tmp_path / "export").mkdir()
  with pytest.raises(InputError, match="export exists, and export does not overwrite"):
    distill.run(config, tmp_path)
  assert not calls
  assert not (tmp_path / "config.py").exists()


def test_a_finished_run_with_other_options_runs_their_stage_again(tmp_path, config, calls):
  distill.run(config, tmp_path)
  assert calls == ["record", "train", "evaluate", "export"]
  calls.clear()
  distill.run(config, tmp_path)
  assert not calls
  other = changed(config, "export", dir=str(tmp_path / "other"), dtype="float16")
  assert distill.run(other, tmp_path)["export_dir"] == str(tmp_path / "other")
  assert calls == ["export"]
  assert (tmp_path / "other").is_dir()
  with pytest.raises(InputError, match="does not overwrite"):
    distill.run(changed(other, "export", dtype="float32"), tmp_path)
  more = changed(other, "evaluate", sequences=7)
  assert distill.run(more, tmp_path)["tokens"] == 7
  assert calls == ["export", "evaluate"]


def test_a_run_killed_right_after_its_export_ends(tmp_path, config, calls):
  def killed():
    raise KeyboardInterrupt

  AFTER["export"] = killed
  with pytest.raises(KeyboardInterrupt):
    distill.run(config, tmp_path)
  distill.run(config, tmp_path)
  assert calls == ["record", "train", "evaluate", "export"]


def test_a_folder_that_another_makes_meanwhile_is_not_the_export(tmp_path, config, calls):
  AFTER["train"] = lambda: (tmp_path / "export").mkdir()
  for _ in range(2):
    with pytest.raises(InputError, match="does not overwrite"):
      distill.run(config, tmp_path)
  assert calls == ["record", "train", "evaluate"]


@pytest.fixture
def request_in(tmp_path, monkeypatch):
  """Returns the function that configures a run in a folder, from a plan that writes its data."""

  def plan(request, begun, folder, machine):
    folder.mkdir(exist_ok=True)
    (folder / "documents.jsonl").write_text("prepared")
    AFTER.get("plan", lambda: None)()
    return SimpleNamespace(config=begun, sentences=[], comments={})

  AFTER.clear()
  monkeypatch.setattr(distill.plan, "plan", plan)
  monkeypatch.setattr(distill.machine, "this_machine", lambda: None)
  monkeypatch.setattr(Request, "full", lambda self: self)

  def read(file):
    module = {}
    exec(file.read_text("utf-8"), module)
    return configs.resolve(module["get_config"]())

  return lambda folder: distill.configure(Request("t", "half", "d", str(folder)), folder, read)


@pytest.mark.parametrize("name", ["config.py", "data/documents.jsonl", "export/model.safetensors"])
def test_files_of_the_user_in_the_workdir_are_kept(tmp_path, request_in, name):
  path = tmp_path / name
  path.parent.mkdir(exist_ok=True)
  path.write_text("mine")
  with pytest.raises(InputError, match=f"holds another run or project .{name.split('/')[0]}."):
    request_in(tmp_path)
  assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
  assert path.read_text() == "mine"


def test_a_run_killed_while_it_begins_can_begin_again(tmp_path, request_in, monkeypatch):
  def killed(*_):
    raise KeyboardInterrupt

  AFTER["plan"] = killed  # with data/, without config.py
  with pytest.raises(KeyboardInterrupt):
    request_in(tmp_path)
  AFTER.clear()
  with monkeypatch.context() as patch:
    patch.setattr(distill.json_io, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
      request_in(tmp_path)
  (tmp_path / ".start.py").unlink()  # as on another host: only config.py was published
  request_in(tmp_path)
  assert {p.name for p in tmp_path.iterdir()} == {"config.py", "data", "distill.json"}


def test_a_config_py_of_a_run_in_another_folder_is_kept(tmp_path, request_in):
  request_in(tmp_path / "before")
  (tmp_path / "config.py").write_bytes((tmp_path / "before" / "config.py").read_bytes())
  with pytest.raises(InputError, match="holds another run"):
    request_in(tmp_path)


def test_a_refused_request_leaves_the_workdir_to_the_corrected_one(tmp_path, request_in):
  def refused():
    raise InputError("too few documents")

  AFTER["plan"] = refused
  with pytest.raises(InputError, match="too few"):
    request_in(tmp_path)
  assert not list(tmp_path.iterdir())


def test_paths_that_are_not_ascii_are_in_config_py(tmp_path, config, monkeypatch):
  path = "/tmp/📚\udcff/notes.txt"
  monkeypatch.setattr(sys, "argv", ["distill-jax", "distill", f"--data={path}"])
  c = changed(config, "data", path=path)
  distill._write_config(tmp_path, c, {})
  module = {}
  exec((tmp_path / "config.py").read_text("utf-8"), module)
  assert configs.resolve(module["get_config"]()) == c
