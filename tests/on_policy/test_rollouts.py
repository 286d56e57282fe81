"""Rollouts: the stores of a round, stopped and resumed rounds, rewards and limits."""

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from json_lines import write_lines
from local_stores import free_port
from tokenizers import decoders, pre_tokenizers

from distill_jax import config
from distill_jax.data import model_rows
from distill_jax.errors import InputError, Preempted
from distill_jax.models import loading, runs
from distill_jax.nn import sharding
from distill_jax.on_policy import rewards, round_folders
from distill_jax.on_policy.rollouts import Rollouts
from distill_jax.on_policy.round_writer import RoundWriter
from distill_jax.records.store import Writer, open_store
from distill_jax.runtime import distributed, files, storage
from distill_jax.types import Inputs

PROMPTS = ["3 times 6 is", "hello", "a", "0 times 3 is 0", "ünï", "x = 1"]
LEN, SHARD = 32, 4
ROOT = Path(__file__).parents[2]


def made(folder, **changes):
  """Returns a config: rounds of 2 steps of 8 texts; every second prompt is of the teacher b."""
  c = tiny.tiny(folder)
  rows = ({"prompt": p, "route": ("", "b")[i % 2], "key": p[0]} for i, p in enumerate(PROMPTS))
  path = write_lines(folder / "prompts.jsonl", rows)
  c.teachers = {"b": "elsewhere"}
  c.generate.update(prompts=str(path), samples=2, max_new_tokens=12, cache_len=LEN)
  c.generate.update(batch_size=4, prefill_rows=4, prefill_chunk=16, steps=4)
  c.records.tokens_per_shard = SHARD * LEN
  c.train.steps, c.train.batch_size, c.on_policy.every = 8, 8, 2
  for key, value in changes.items():
    *section, name = key.split("__")
    (c[section[0]] if section else c)[name] = value
  return c


class Run:
  """Rollouts of a config in a folder; counts how often the student was loaded."""

  def __init__(self, c, folder, mesh=None, seed=0):
    resolved = config.resolve(c)
    self.mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    self.student = loading.open_source(resolved.student, resolved.seed)
    self.rollouts = Rollouts(resolved, self.student, self.mesh, folder)
    self.rollouts.check()
    self.loaded, self._seed = 0, seed

  def model(self):
    self.loaded += 1
    with jax.set_mesh(self.mesh):
      return self.student.load(self.mesh, runs.keys(self._seed)["student"])

  def __call__(self, number=0, fingerprint="f"):
    return self.rollouts.generate(number, fingerprint, self.model)


def spelt(tokens):
  """Returns the text of tokens of tiny's tokenizer."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  return decoders.ByteLevel().decode([alphabet[i] for i in tokens])


def digests(stores):
  return {name: [s.sha256 for s in store.manifest.shards] for name, store in stores.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("rollouts")


@pytest.fixture(scope="module")
def whole(folder):
  """(the run, its stores) of round 0, which nothing interrupted."""
  run = Run(made(folder), folder / "whole")
  return run, run()


def test_rows_are_prompts_with_the_student_s_texts(whole):
  run, stores = whole
  planned = run.rollouts.plan.of_round(0).rows
  assert {name: len(store) for name, store in stores.items()} == {"teacher": 8, "b": 8}
  for name, store in stores.items():
    seen = set()
    for row, (number, _) in zip(store, planned[name], strict=True):
      prompt = list(PROMPTS[number].encode())
      at, end = np.flatnonzero(row["mask_T"]), int((row["segments_T"] > 0).sum())
      assert spelt(row["tokens_T"][: len(prompt)]) == PROMPTS[number]
      assert at.tolist() == list(range(len(prompt) - 1, end - 1)) and len(at) == 12
      assert not row["tokens_T"][end:].any() and not row["behaviour_logp_T"][~row["mask_T"]].any()
      seen.add(row["tokens_T"].tobytes())
    assert len(seen) == len(store)
  rollout = stores["b"].manifest.rollout
  assert (rollout["round"], rollout["student"]) == (0, "f")
  assert rollout["scalars"] == ["behaviour_logp"]
  assert rollout["sampling"]["temperature"] == 1 and rollout["sampling"]["max_new_tokens"] == 12


def test_behaviour_logp_is_that_of_the_whole_model_without_a_cache(whole):
  run, stores = whole
  loaded = run.model()
  rows = stores["teacher"].read_many(range(8))
  stack = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
  inputs = Inputs.of(jax.numpy.asarray(stack["tokens_T"]), stack["segments_T"])
  labels = model_rows.next_tokens(stack["tokens_T"])
  out = jax.jit(lambda m, i: m(i, loaded.compute))(loaded.model, inputs)
  z = np.float64(out.hidden_BTD) @ np.float64(out.head_VD).T
  logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
  want = np.take_along_axis(logp, labels[..., None], -1)[..., 0]
  mask = stack["mask_T"]
  found = stack["behaviour_logp_T"]
  assert mask.sum() == 8 * 12
  np.testing.assert_allclose(found[mask], want[mask], rtol=2**-10)  # stored as float16


def test_the_numbers_of_a_round(whole):
  run, _ = whole
  found = run.rollouts.summary(0)
  assert found["round"] == 0 and found["texts"] == 16 and found["tokens"] == 16 * 12
  assert found["reasons"] == {"length": 16} and found["truncated"] == 1
  assert found["length"] == {"mean": 12, "median": 12, "p90": 12, "max": 12}
  assert found["seconds"] > 0 and found["repetition"] == 0 and "reward" not in found
  assert [n["texts"] for n in found["teachers"].values()] == [8, 8]


def test_a_finished_round_needs_no_model(whole):
  run, stores = whole
  before = run.loaded
  assert digests(run()) == digests(stores)
  assert run.loaded == before


class Stop(Exception):
  pass


@pytest.mark.parametrize("how", ["killed", "preempted"])
def test_a_stopped_round_continues_with_the_missing_shards(whole, folder, monkeypatch, how):
  """It stops while the third of four shards is begun; rows are then decoded with other rows."""
  run = Run(made(folder), folder / how)
  add, calls = RoundWriter.add, iter(range(100))

  def stop_later(self, samples):
    add(self, samples)
    if next(calls) >= 6:
      if how == "killed":
        raise Stop
      distributed.Preemption.request()

  with monkeypatch.context() as patch:
    patch.setattr(RoundWriter, "add", stop_later)
    with pytest.raises(Stop if how == "killed" else Preempted):
      run()
  kept = {p: p.stat().st_mtime_ns for p in (folder / how / "rounds").rglob("*.array_record")}
  assert 0 < len(kept) < 4
  stores = Run(made(folder), folder / how)()
  assert digests(stores) == digests(whole[1])
  assert all(p.stat().st_mtime_ns == t for p, t in kept.items())
  numbers = Run(made(folder), folder / how).rollouts.summary(0)
  assert numbers["tokens"] == 16 * 12


def test_texts_of_other_weights_are_sampled_again(whole, folder, capsys):
  path = folder / "again"
  run = Run(made(folder), path, seed=1)
  old = digests(run())
  scores = round_folders.folder_of(path, 0, "teacher") / "records"
  scores.mkdir()
  assert old != digests(whole[1])
  run._seed = 0
  stores = run(fingerprint="g")
  assert "are of other weights of the student" in capsys.readouterr().err
  assert not scores.exists() and stores["b"].manifest.rollout["student"] == "g"
  same = open_store(round_folders.folder_of(folder / "whole", 0, "b") / "rollouts")
  tokens = [[row["tokens_T"].tolist() for row in store] for store in (stores["b"], same)]
  assert tokens[0] == tokens[1]
  round_folders.delete(round_folders.folder_of(path, 0))
  assert not round_folders.folder_of(path, 0).exists()


def test_a_round_that_is_partly_deleted_is_sampled_again(whole, folder, monkeypatch):
  path = shutil.copytree(folder / "whole", folder / "partly")

  def killed(where):
    shutil.rmtree(next(Path(where).rglob("counts")))
    raise Stop

  with monkeypatch.context() as patch:
    patch.setattr(files, "remove_tree", killed)
    with pytest.raises(Stop):
      round_folders.delete(round_folders.folder_of(path, 0))
  assert digests(Run(made(folder), path)()) == digests(whole[1])


def test_another_round_samples_other_texts_and_compiles_nothing(folder, caplog):
  c = made(folder, train__batch_size=12)  # a round has each prompt twice
  run = Run(c, folder / "rounds")
  first = run(0)
  loaded = run.model()
  run.model = lambda: loaded
  with jax.log_compiles(), caplog.at_level("WARNING"):
    second = run(1)
  assert [r.message for r in caplog.records if "compil" in r.message.lower()] == []
  texts = [row["tokens_T"].tobytes() for s in (first, second) for st in s.values() for row in st]
  assert len(set(texts)) == len(texts) == 48


def test_a_round_whose_texts_are_cut_off_stops_the_run(folder):
  run = Run(made(folder, on_policy__max_truncated=0.3), folder / "truncated")
  for _ in range(2):  # also when it is run again
    text = "max_truncated is 0.3; expected at least 0.*texts of round 0 that are cut"
    with pytest.raises(InputError, match=text):
      run()


def test_verdicts_of_a_filter_are_rewards(folder):
  c = made(folder, on_policy__reward="vowels")
  c.filters.vowels = config.filter("regex", must=("[a-z]",))
  run = Run(c, folder / "reward")
  stores, total = run(), []
  for store in stores.values():
    assert store.manifest.rollout["scalars"] == ["behaviour_logp", "reward"]
    for row in store:
      text = spelt(row["tokens_T"][1:][row["mask_T"][:-1]])
      want = float(any("a" <= letter <= "z" for letter in text))
      assert (row["reward_T"] == np.where(row["mask_T"], want, 0)).all()
      total.append(want)
  assert run.rollouts.summary(0)["reward"] == np.mean(total)


def test_prompts_without_an_answer_key_are_found_at_the_start(folder):
  c = made(folder, on_policy__reward="same")
  c.filters.same = config.filter("exact", key="answer")
  with pytest.raises(InputError, match="Prompt 0 has no reward: no answer.*generate.on_bad=skip"):
    Run(c, folder / "keys")


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    ({"on_policy__reward": "x"}, "on_policy.reward is 'x'; expected one of"),
    ({"on_policy__max_truncated": 2.0}, "on_policy.max_truncated is 2.0; expected a fraction"),
    ({"train__batch_size": 5}, "train.batch_size is 5; expected a multiple"),
    ({"generate__cache_len": 8}, "has 12 tokens"),
    ({"mesh__context": 2}, "mesh.context is 2; expected 1"),
    ({"teachers": {}}, "route is 'b'; expected '' or the name of a teacher"),
  ],
)
def test_what_does_not_fit_is_found_before_anything_is_loaded(folder, tmp_path, changes, text):
  c = made(folder, **changes)
  with pytest.raises(InputError, match=text):
    Run(c, tmp_path)


def test_the_devices_are_free_when_training_continues(whole, folder):
  run = Run(made(folder), folder / "free")
  loaded = run.model()
  held = jax.tree.leaves(loaded.model)
  before = {id(x) for x in jax.live_arrays()} - {id(x) for x in held}
  run.model = lambda: loaded
  run(3)
  loaded = None
  run.model = None
  gc.collect()
  after = [x for x in jax.live_arrays() if id(x) not in before and x.nbytes > 64]
  assert [x.shape for x in after if not any(x is y for y in held)] == []
  assert sum(x.is_deleted() for x in held) > len(held) // 2


@pytest.mark.parametrize("processes", [1, 2])
def test_a_shard_that_cannot_be_written_stops_the_round(whole, folder, monkeypatch, processes):
  """Several processes stop at the end of the round, where all of them learn of the failure."""
  run, seen = Run(made(folder), folder / f"full{processes}"), []
  add = RoundWriter.add
  monkeypatch.setattr(RoundWriter, "add", lambda self, s: (add(self, s), seen.extend(s)))

  def write(self, rows, records):
    raise InputError("The disk is full.")

  with monkeypatch.context() as patch:
    patch.setattr(Writer, "write_shard", write)
    patch.setattr(distributed, "process_count", lambda: processes)
    with pytest.raises(InputError, match="The disk is full"):
      run()
  assert (len(seen) == 16) == (processes == 2)
  assert digests(run()) == digests(whole[1])


@pytest.mark.parametrize("name", ["counts/", "rollouts.json"])
def test_a_full_disk_stops_all_processes(whole, folder, monkeypatch, name):
  write = files.write

  def full(path, data):
    if name in str(path):
      raise OSError(28, "No space left on device")
    write(path, data)

  run = Run(made(folder), folder / f"no space for {len(name)}")
  monkeypatch.setattr(files, "write", full)
  with pytest.raises(InputError, match=f"{name}.*cannot be written .No space left"):
    run()


@pytest.mark.slow  # two meshes are compiled
def test_texts_do_not_depend_on_the_mesh(whole, folder):
  for name, axes in (("split", {"fsdp": 2, "tensor": 2}), ("data", {"data": 2, "fsdp": 2})):
    c = made(folder, **{f"mesh__{axis}": size for axis, size in axes.items()})
    stores = Run(c, folder / name, config.resolve(c).mesh.make())()
    for teacher, store in stores.items():
      for row, want in zip(store, whole[1][teacher], strict=True):
        np.testing.assert_array_equal(row["tokens_T"], want["tokens_T"])
        np.testing.assert_allclose(row["behaviour_logp_T"], want["behaviour_logp_T"], rtol=2**-9)


def test_a_round_in_a_workdir_at_a_url(whole, folder):
  """It is stopped after some shards, continued in another mirror, and then sampled again."""
  url = f"memory://rollouts/{folder.name}"
  with storage.Synced(url) as here:
    run = Run(made(folder, on_policy__max_truncated=0.4), here)
    with pytest.raises(InputError, match="max_truncated"):
      run()
  found = sorted(path.rpartition("/")[2] for path in files.tree(url, lambda name: False))
  assert "prompts.npz" in found and 0 < len([n for n in found if n.endswith(".array_record")]) < 4
  with storage.Synced(url) as here:
    stores = Run(made(folder), here)()
    assert digests(stores) == digests(whole[1])
    assert not [*here.rglob("records-*")]
    again = Run(made(folder), here)(fingerprint="g")
    assert again["b"].manifest.rollout["student"] == "g"
  with storage.Synced(url) as here:
    run = Run(made(folder), here)
    assert digests(run(fingerprint="g")) == digests(again) and not run.loaded
  names = [name for name in files.tree(url, lambda name: False) if name.endswith("rollouts.json")]
  assert names == ["rounds/00000/rollouts.json"]


@pytest.mark.slow  # four processes
def test_texts_do_not_depend_on_the_number_of_processes(folder, tmp_path):
  c = config.resolve(made(folder, mesh__data=2, mesh__fsdp=2))
  file = tmp_path / "config.json"
  file.write_text(json.dumps(config.to_dict(c)))
  env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  for count in (1, 2):
    port = free_port()
    flags = [f"localhost:{port},{count},{i}" if count > 1 else "" for i in range(count)]
    env["JAX_NUM_CPU_DEVICES"] = str(4 // count)
    where = str(tmp_path / str(count))
    line = [sys.executable, str(ROOT / "tests/rollouts_worker.py"), str(file), where]
    workers = [
      subprocess.Popen([*line, flag], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
      for flag in flags
    ]
    printed = [worker.communicate(timeout=500) for worker in workers]
    assert not any(worker.returncode for worker in workers), printed
  for number in range(2):
    for name in ("teacher", "b"):
      of_counts = [round_folders.folder_of(tmp_path / count, number, name) for count in "12"]
      one, two = (open_store(path / "rollouts") for path in of_counts)
      assert len(one) == len(two) == 8
      for row, want in zip(two, one, strict=True):
        np.testing.assert_array_equal(row["tokens_T"], want["tokens_T"])
        np.testing.assert_allclose(row["behaviour_logp_T"], want["behaviour_logp_T"], rtol=2**-9)


@pytest.mark.slow  # starts worker processes
@pytest.mark.parametrize("name", ["math", "code"])
def test_answers_are_rewarded(folder, tmp_path, name, monkeypatch):
  """The texts of half of the prompts are replaced by right answers before they are judged."""
  c = made(folder, on_policy__reward=name)
  right = {"math": "It is 12.", "code": "def f():\n  return 12\n"}[name]
  test = {"start": "", "test": "def check(f):\n  assert f() == 12", "entry_point": "f"}
  rows = ({"prompt": p, "answer": "12", "right": i % 2, **test} for i, p in enumerate(PROMPTS))
  c.generate.prompts = str(write_lines(tmp_path / "prompts.jsonl", rows))
  c.filters[name] = config.filter(name, **({"prompt": "start"} if name == "code" else {}))
  of_texts = rewards.of_texts

  def answered(judge, texts):
    return of_texts(judge, (t | {"text": right} if t["about"]["right"] else t for t in texts))

  monkeypatch.setattr(rewards, "of_texts", answered)
  run = Run(c, tmp_path / "run")
  (store,) = run().values()
  for row, (number, _) in zip(store, run.rollouts.plan.of_round(0).rows["teacher"], strict=True):
    assert row["reward_T"].max() == number % 2
