"""`chain`: complete runs, interrupted runs and errors."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
import tiny_checkpoints

from distill_jax import config
from distill_jax.commands import chain, record
from distill_jax.errors import InputError, Preempted
from distill_jax.models import loading
from distill_jax.nn import sharding
from distill_jax.records.store import open_store
from distill_jax.runtime import checkpoint
from distill_jax.runtime.workdir import Workdir
from distill_jax.training import loader, loop

SHAPE = dataclasses.replace(tiny_checkpoints.CONFIG, vocab_size=256, tie_word_embeddings=True)


def tiny_chain(path):
  """A teacher of 4 layers, an assistant with 3 of them, and a student with 2 of the teacher's."""
  c = tiny.tiny(path)
  if not (path / "teacher").exists():
    weights = {n: 0.2 * x + ("norm" in n) for n, x in tiny_checkpoints.tensors(SHAPE).items()}
    tiny_checkpoints.write_folder(path / "teacher", SHAPE, weights)
  c.teacher.source, c.teacher.shape = str(path / "teacher"), ""
  c.train.records, c.train.steps, c.data.sequences = (), 3, 8
  c.evaluate.sequences = c.evaluate.batch_size = 4
  c.chain = ("assistant", "student")
  c.links.assistant = config.link(shrink={"layers": 3, "layers_by": "ends", "sequences": 4})
  own = {"source": c.teacher.source, "keep_layers": (0, 3)}
  c.links.student = config.link(student=own, steps=4, peak_lr=5e-3)
  return c


def run(c, workdir):
  resolved = config.resolve(c)
  with Workdir(workdir, resolved) as path:
    return chain.run(resolved, path)


def restored(workdir):
  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    return jax.device_get(loading.open_run(workdir / "student" / "run").restore(mesh))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("chain")
  c = tiny_chain(path)
  c.export.dir = str(path / "export")
  return path, run(c, path / "whole")


def test_a_complete_chain(folder, monkeypatch):
  path, result = folder
  assert json.loads((path / "whole" / "evaluation.json").read_text()) == result
  models = result["models"]
  assert set(models) == {"teacher", "start", "assistant", "student"}
  assert models["teacher"]["parameters"] > models["assistant"]["parameters"]
  assert models["assistant"]["parameters"] > models["student"]["parameters"]
  assert models["student"]["kl"] < models["start"]["kl"]
  first, second = (open_store(path / "whole" / n / "records") for n in ("assistant", "student"))
  assert first.manifest.teacher["name"] == str(path / "teacher")
  assert second.manifest.teacher["digest"] == checkpoint.digest(path / "whole/assistant/run")
  for name, steps, rate in (("assistant", 3, 1e-2), ("student", 4, 5e-3)):
    rows = tiny.measured(path / "whole" / name / "run")
    assert [row["step"] for row in rows] == list(range(steps))
    assert max(row["learning_rate"] for row in rows) == pytest.approx(rate)
  assert (
    loading.open_source(config.ModelOptions(source=str(path / "export"))).config.num_hidden_layers
    == 2
  )
  assert "| student |" in (path / "export" / "README.md").read_text()
  for module, verb in ((record, "run"), (loop, "train"), (chain.evaluation, "run")):
    monkeypatch.setattr(module, verb, None)
  c = tiny_chain(path)
  c.export.dir = str(path / "export")
  assert run(c, path / "whole") == result  # nothing is computed again


def test_an_interrupted_chain_ends_with_the_same_bits(folder, monkeypatch):
  """Killed between two links, stopped by a signal, then killed in the middle of a link."""
  path, _ = folder
  c, whole, workdir = tiny_chain(path), path / "whole", path / "stopped"
  shutil.copytree(whole / "assistant", workdir / "assistant")  # the files after a kill
  score = lambda conf, where: (where / chain.SCORES).write_text("{}")
  monkeypatch.setattr(chain.evaluation, "run", score)  # not part of this test
  batches, seen = loader.batches, []

  def told(conf, where):
    raise Preempted("told to stop")

  def power_cut(*args, **kwargs):
    for i, batch in enumerate(batches(*args, **kwargs)):
      if i == 3 and not seen:
        seen.append(i)
        raise KeyboardInterrupt
      yield batch

  with monkeypatch.context() as patch, pytest.raises(Preempted):
    patch.setattr(record, "run", told)
    run(c, workdir)
  monkeypatch.setattr(loader, "batches", power_cut)
  with pytest.raises(KeyboardInterrupt):
    run(c, workdir)
  assert [p.name for p in (workdir / "student" / "run" / "checkpoints").iterdir()] == ["2"]
  assert not (workdir / "student" / "done.json").exists()
  run(c, workdir)
  jax.tree.map(np.testing.assert_array_equal, restored(whole), restored(workdir))
  assert tiny.measured(whole / "student" / "run") == tiny.measured(workdir / "student" / "run")


def change(**links):
  def apply(c, path):
    for name, fields in links.items():
      c.links[name] = config.link(**fields)

  return apply


def of(**fields):
  """Changes the source of the student to the teacher's folder, and sets `fields`."""
  return lambda c, path: c.links.student.student.update(fields)


def other_words(c, path):
  small = dataclasses.replace(SHAPE, vocab_size=200)
  tiny_checkpoints.write_folder(path / "words", small)
  tiny_checkpoints.write_folder(path / "teacher", SHAPE)
  c.data.tokenizer, c.links.student.student.source = "", str(path / "words")


@pytest.mark.parametrize(
  ("wrong", "says"),
  [
    (lambda c, path: c.update(chain=()), "chain is ..; expected the names of the links"),
    (
      lambda c, path: c.update(chain=("helper",)),
      "is 'helper'; expected a name in links .assistant, stud",
    ),
    (
      lambda c, path: c.update(chain=("student", "student")),
      "chain.1. is 'student'; expected a name that occurs only once",
    ),
    (
      lambda c, path: (c.links.update(start=c.links.student), c.update(chain=("start",))),
      "is 'start'; expected a name other than teacher, start, evals, which are reserved",
    ),
    (change(student={}), "links.student.student.source is ''; expected a model, or sizes in"),
    (
      change(student={"shrink": {"layers": 2}, "student": {"shape": "tiny"}}),
      "student.shape is 'tiny'; expected an empty string",
    ),
    (
      change(student={"shrink": {"target_params": 1e4}, "student": {"shape": "tiny"}}),
      "shrink.target_params is 10000.0; expected 0",
    ),
    (
      change(student={"shrink": {"layers": 2}, "student": {"keep_layers": (0,)}}),
      r"links.student.student.keep_layers is \(0,\)",
    ),
    (change(student={"shrink": {"layers": 2}, "steps": -1}), "links.student.steps is -1; expected"),
    (
      change(student={"shrink": {"layers": 2}, "peak_lr": -1.0}),
      "links.student.peak_lr is -1.0; expected",
    ),
    (
      change(student={"shrink": {"heads": 3}}),
      "links.student: shrink.heads is 3; expected a multiple of 2 up to 4",
    ),
    (
      change(student={"shrink": {"layers": 4, "layers_by": "ends"}}),
      "shrink.layers is 4; expected at most 3, the teacher",
    ),
    (
      of(shape="tinny", source="", keep_layers=()),
      "links.student: shape is 'tinny'; expected a shape of the llama family",
    ),
    (of(digest="abc"), "links.student: .*has digest .*, but the config requires abc"),
    (change(student={"shrink": {"layers": 2, "dtype": "float32"}}), "student.shrink.dtype is"),
    (
      of(train="quantised", quantise={"grid": "Q3"}),
      "links.student: student.quantise.grid is 'Q3'",
    ),
    (other_words, "links.student: .*200 .*|links.student: The student has tokenizer"),
    (lambda c, path: setattr(c, "losses", {}), "links.assistant: losses is {}; expected one loss"),
    (lambda c, path: c.optim.update(warmup_steps=4), "links.assistant: optim.warmup_steps is 4"),
    (lambda c, path: c.train.update(online=True), "train.online is True; expected False"),
    (lambda c, path: c.train.update(records=("x",)), r"train.records is \('x',\); expected \(\)"),
    (lambda c, path: c.records.update(logprobs="x"), "records.logprobs is 'x'; expected ''"),
    (
      lambda c, path: setattr(c.tasks, "films", config.task("text_classes", classes=("a", "b"))),
      "tasks is 'films'; expected an empty section",
    ),
    (lambda c, path: c.records.update(kind="text"), "records.kind is 'text'"),
    (
      lambda c, path: c.data.update(buckets=(c.data.seq_len,)),
      r"data.buckets is .*; expected \(\)",
    ),
    (lambda c, path: c.train.update(heldout=("x",)), r"train.heldout is \('x',\); expected \(\)"),
    (lambda c, path: c.train.update(best_metric="heldout/loss"), "without train.heldout"),
    (lambda c, path: c.train.update(batch_size=0), "train.batch_size is 0"),
    (lambda c, path: c.evaluate.update(heldout=False), "there is nothing to evaluate"),
    (lambda c, path: c.export.update(dir=str(path)), "exists, and export does not overwrite"),
  ],
)
def test_bad_chains_raise_before_anything_is_computed(wrong, says, tmp_path, monkeypatch):
  monkeypatch.setattr(record, "run", None)  # before anything is computed
  c = tiny_chain(tmp_path)
  wrong(c, tmp_path)
  with pytest.raises(InputError, match=says):
    run(c, tmp_path / "run")
  assert not (tmp_path / "run" / "assistant").exists()


def test_keys_of_a_link():
  with pytest.raises(InputError, match="'links.step' is unknown; did you mean 'steps'"):
    config.link(step=3)
  link = config.link(steps=3, student={"keep_layers": (1, 2)})
  c = config.base()
  c.links.one, c.chain = link, ("one",)
  made = config.resolve(c)
  assert made.links["one"] == config.LinkOptions(config.StudentOptions(keep_layers=(1, 2)), steps=3)
  assert config.from_dict(json.loads(json.dumps(config.to_dict(made)))) == made
