"""A teacher with other tokens than the student's, on texts that the student sampled."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import tiny
import tiny_checkpoints
import tiny_on_policy
import tiny_pair
import tiny_store

from distill_jax import config
from distill_jax.cross_tokenizer import summary
from distill_jax.errors import InputError
from distill_jax.losses.features import FeatureSpec
from distill_jax.models import loading
from distill_jax.nn import logits as logits_lib
from distill_jax.nn import sharding
from distill_jax.on_policy import other_tokens
from distill_jax.on_policy.round_folders import folder_of
from distill_jax.on_policy.scoring import Scorer
from distill_jax.records import collate, manifest, student_rows
from distill_jax.records.multi_teacher import MultiTeacherStore
from distill_jax.records.store import open_store
from distill_jax.runtime import storage
from distill_jax.training.outputs import teacher_outputs
from distill_jax.training.state import with_tables
from distill_jax.types import Inputs

ROWS, T, LENGTH = 6, 24, 32
text = functools.partial(tiny_pair.sampled_text, length=T)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with a teacher of its own tokens, and the student's tokenizer."""
  folder = tmp_path_factory.mktemp("models")
  shape = dataclasses.replace(tiny_checkpoints.CONFIG, vocab_size=16)
  weights = {k: x * 0.3 for k, x in tiny_checkpoints.tensors(shape).items()}
  tiny_checkpoints.write_folder(folder / "teacher", shape, weights)
  (folder / "teacher" / "tokenizer.json").write_bytes(tiny_pair.raw(tiny_pair.TEACHER))
  (folder / "student.json").write_bytes(tiny_pair.raw(tiny_pair.STUDENT))
  return folder


def resolved(folder, **changes):
  c = config.base()
  c.teacher.source, c.student.shape = str(folder / "teacher"), "tiny"
  c.data.tokenizer = str(folder / "student.json")
  c.records.kind, c.records.batch_size, c.records.chunk = "dense", 4, 10
  c.records.tokens_per_shard, c.generate.cache_len = 4 * T, T
  c.retarget.seq_len = LENGTH
  c.update_from_flattened_dict(changes)
  return config.resolve(c)


@pytest.fixture(scope="module")
def texts(folder):
  rollout = {"round": 2, "student": "abc", "sampling": {}, "scalars": ["behaviour_logp", "reward"]}
  student = tiny_pair.tables().student
  plain = tiny_store.manifest(
    ROWS, kind="text", n=0, vocab_size=student.size, seq_len=T, tokenizer=student.digest, teacher={}
  )
  at = folder_of(folder / "run", 2, "teacher") / "rollouts"
  tiny_store.record(at, manifest.with_rollout(plain, rollout), make=text)
  return open_store(at)


def opened(c):
  student, teacher = (loading.open_source(m) for m in (c.student, c.teacher))
  found = other_tokens.find(c, student, teacher)
  assert found is not None
  return student, teacher, found


def test_scores_are_the_enumeration_of_the_projected_distributions(folder, texts):
  """The student's tokens are kept, and most are not those that its tokenizer would make."""
  c = resolved(folder)
  student, teacher, other = opened(c)
  scorer = Scorer(c, student, {"teacher": teacher}, sharding.make_mesh(), folder / "run")
  scorer.check()
  store = scorer.score(2, "teacher", texts)
  store.verify()
  m, tables = store.manifest, tiny_pair.tables()
  assert (m.tokenizer, m.rollout) == (tables.student.digest, texts.manifest.rollout)
  assert m.retargeted["tokenizer"] == tables.teacher.digest
  mesh = sharding.make_mesh()
  loaded = teacher.load(mesh, jax.random.key(0))
  rows = other.rows(texts)
  batch = collate.collate(rows.read_many(range(ROWS)), read=student_rows.read)

  @jax.jit
  def live(in_step, batch):
    targets, _ = teacher_outputs(in_step, "teacher", batch, loaded.compute, FeatureSpec())
    return jax.nn.softmax(targets.logits())

  planned = other.planned(MultiTeacherStore(texts, {}))
  teachers = with_tables({"teacher": loaded.model}, c, [planned], mesh)
  live_BTS = np.asarray(live(teachers["teacher"], batch))
  checked = 0
  for i, got in enumerate(store):
    for name, x in texts[i].items():
      np.testing.assert_array_equal(got[name], x, name)
    aligned, theirs = rows.texts.align(texts[i])
    inputs = Inputs.of(*(theirs[k][None] for k in ("tokens_T", "segments_T")))
    out = loaded.model(inputs, loaded.compute)
    z_TV = np.float64(logits_lib.logits(out.hidden_BTD, out.head_VD))[0, :, : tables.teacher.size]
    p_TV = np.exp(z_TV) / np.exp(z_TV).sum(-1, keepdims=True)
    p_GV = p_TV[aligned.position_G - 1]
    reference = tiny_pair.Enumeration(tables, aligned.aligned, p_GV, aligned.known_G)
    for x, t in zip(aligned.token_X, aligned.position_X, strict=True):
      want, _, _ = reference.target(x)
      stored = np.zeros_like(want)
      np.add.at(stored, got["ids_TK"][t], np.exp(got["logp_TK"][t]))
      np.testing.assert_allclose(stored, want, rtol=2e-3, atol=1e-6)  # stored as float16
      assert np.isfinite(got["logp_TK"][t]).all()  # tokens that nothing leads to are outcomes
      np.testing.assert_allclose(live_BTS[i, t], want, rtol=2e-5, atol=1e-7)
      label = want[texts[i]["tokens_T"][t + 1]]
      assert got["label_logp_T"][t] == pytest.approx(np.log(label), rel=1e-3, abs=1e-3)
      checked += 1
  assert checked == sum(int(text(i)["mask_T"].sum()) for i in range(ROWS)) > 60


WRONG = {
  "records.taps": ((1,), r"records.taps is \(1,\); expected \(\) for the teacher"),
  "records.temperature": (2.0, "records.temperature is 2.0; expected 1.0 for the teacher"),
}


@pytest.mark.parametrize("key", WRONG)
def test_what_needs_one_tokenizer_is_refused(key, folder):
  value, message = WRONG[key]
  with pytest.raises(InputError, match=message):
    opened(resolved(folder, **{key: value}))


def test_texts_that_cannot_be_aligned_are_refused(folder, texts, monkeypatch):
  c = resolved(folder)
  _, _, other = opened(c)
  monkeypatch.setattr(other._texts, "_text", lambda tokens: "not text")
  with pytest.raises(InputError, match="None of the first 6 texts .* can be aligned .* not text"):
    other.rows(texts)


def test_many_tokens_without_a_target_are_reported(folder, texts, capsys):
  for length, told in ((LENGTH, False), (8, True)):
    _, _, other = opened(resolved(folder, **{"retarget.seq_len": length}))
    assert len(other.rows(texts)) == ROWS
    message = "have no target of the teacher"
    assert (message in capsys.readouterr().err) == told


def test_a_teacher_with_the_students_tokens_needs_nothing(folder):
  c = resolved(folder, **{"data.tokenizer": str(folder / "teacher" / "tokenizer.json")})
  student, teacher = (loading.open_source(m) for m in (c.student, c.teacher))
  assert other_tokens.find(c, student, teacher) is None


def run_config(folder, run, **changes):
  """A config of rounds, whose prompts are of tiny_pair's letters."""
  run.mkdir()
  c = tiny_on_policy.on_policy_config(run)
  prompts = [{"prompt": text} for text in ("ab a", "ba ab", "b  ba", "aba b", "a b ab", " baa")]
  (run / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
  c.teacher.source, c.teacher.shape = str(folder / "teacher"), ""
  c.data.tokenizer = str(folder / "student.json")
  c.generate.stop, c.losses = (), {"soft": config.loss("kd", divergence="jensen_shannon")}
  c.train.steps, c.retarget.seq_len = 2, LENGTH
  c.update_from_flattened_dict(changes)
  return c


@pytest.mark.slow
def test_live_and_stored_scores_train_on_the_same_targets(folder, tmp_path):
  live, stored = tmp_path / "live", tmp_path / "stored"
  tiny_on_policy.run(run_config(folder, live), live / "run")
  dense = {"train.online": False, "records.kind": "dense"}
  tiny_on_policy.run(run_config(folder, stored, **dense), stored / "run")
  for a, b in zip(tiny.measured(live / "run"), tiny.measured(stored / "run"), strict=True):
    assert a["tokens"] == b["tokens"] > 20
    # Stored as float16; the second step begins from slightly different weights.
    assert b["loss"] == pytest.approx(a["loss"], rel=2e-3)
    assert {"overlap/teacher", "reverse_kl/teacher"} <= a.keys() or a["step"] > 0


@pytest.mark.slow
def test_scores_at_a_url_have_their_statistics(folder, texts):
  c = resolved(folder)
  student, teacher, _ = opened(c)
  with storage.Synced("memory://other_tokens") as at:
    scorer = Scorer(c, student, {"teacher": teacher}, sharding.make_mesh(), at)
    store = scorer.score(2, "teacher", texts)
  assert store.folder == "memory://other_tokens/rounds/00002/teacher/records"
  store.verify()
  numbers = summary.describe(store.folder)
  assert numbers["retarget.targets"] == sum(int(text(i)["mask_T"].sum()) for i in range(ROWS))
  assert numbers["retarget.cut_targets"] == 0


@pytest.mark.slow
def test_scores_of_labels_alone_are_those_of_whole_distributions(folder, texts, tmp_path):
  stores = []
  for kind in ("dense", "labels"):
    c = resolved(folder, **{"records.kind": kind})
    student, teacher, _ = opened(c)
    scorer = Scorer(c, student, {"teacher": teacher}, sharding.make_mesh(), tmp_path / kind)
    stores.append(scorer.score(2, "teacher", texts))
  for a, b in zip(*stores, strict=True):
    assert set(b) == set(a) - {"ids_TK", "logp_TK", "argmax_T"}
    for name, x in b.items():
      np.testing.assert_array_equal(x, a[name], name)


def test_held_out_text_must_be_in_the_tokens_of_the_main_teacher_only(folder, texts):
  c = resolved(folder, **{"train.heldout": (str(texts.folder),), "train.online": True})
  student, teacher, _ = opened(c)
  assert [*other_tokens.of_teachers(c, student, {"code": teacher})] == ["code"]
  with pytest.raises(InputError, match="train.heldout .* expected stores in the tokens"):
    other_tokens.of_teachers(c, student, {"teacher": teacher})


@pytest.mark.slow
def test_held_out_text_in_the_students_tokens_is_refused(folder, texts, tmp_path):
  c = run_config(folder, tmp_path / "run", **{"train.heldout": (str(texts.folder),)})
  with pytest.raises(InputError, match="train.heldout .* expected stores in the tokens"):
    tiny_on_policy.run(c, tmp_path / "run" / "w")
