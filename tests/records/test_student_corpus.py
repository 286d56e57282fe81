"""`record` for a student with another tokenizer: exact distributions, resumed, on a mesh."""

import copy
import shutil

import jax
import numpy as np
import pytest
import tiny_pair
import tiny_run
from tiny_store import contents

from distill_jax import config
from distill_jax.cross_tokenizer import summary
from distill_jax.cross_tokenizer.align import KINDS, REASONS
from distill_jax.cross_tokenizer.chains import Splits
from distill_jax.cross_tokenizer.rows import align_rows
from distill_jax.errors import InputError
from distill_jax.models import loading, runs
from distill_jax.nn import logits as logits_lib
from distill_jax.nn import sharding
from distill_jax.records import collate, projected_sampler, student_rows
from distill_jax.records.store import open_store
from distill_jax.records.student_rows import StudentRows

ROWS, LENGTH = 8, 32


def base(folder):
  """A config that records a random text of tiny_pair's letters."""
  c = tiny_pair.teacher_config(folder, 1500)
  c.records.student_tokenizer = str(folder / "student.json")
  c.records.kind, c.records.tokens_per_shard = "dense", 3 * LENGTH
  c.records.chunk = 20
  c.retarget.seq_len, c.retarget.min_mass = LENGTH, 0.1
  return c


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
  """The folder of a finished run."""
  folder = tmp_path_factory.mktemp("record")
  assert tiny_run.record(base(folder), folder / "records")["sequences"] == ROWS
  return folder


class FewRows(list):
  """A source of rows in memory."""

  def read_many(self, indices):
    return [self[i] for i in indices]


def probabilities(c, rows):
  """The teacher's distributions of some rows, float64 [row, position, V]."""
  source = loading.open_source(config.resolve(c).teacher, 0)
  mesh = sharding.make_mesh()
  batch = collate.collate(rows)
  with jax.set_mesh(mesh):
    loaded = source.load(mesh, runs.keys(0)["teacher"])
    out = jax.jit(lambda model, inputs: model(inputs, loaded.compute))(loaded.model, batch.inputs)
    z_BTV = np.float64(logits_lib.logits(out.hidden_BTD, out.head_VD))
  z_BTV = z_BTV[..., : tiny_pair.tables().teacher.size]
  return np.exp(z_BTV) / np.exp(z_BTV).sum(-1, keepdims=True)


def dense(record):
  """The probabilities in a record, [positions, tokens]. Entries that are not used have id 0."""
  out = np.zeros((LENGTH, 9))
  np.add.at(out, (np.arange(LENGTH)[:, None], record["ids_TK"]), np.exp(record["logp_TK"]))
  return out


def test_a_store_is_the_enumeration_of_the_teachers_distributions(recorded):
  c, store = base(recorded), open_store(recorded / "records")
  text = open_store(recorded / "records" / "packed")
  tables, rows = tiny_pair.tables(), [text[i] for i in range(ROWS)]
  m = store.manifest
  assert (m.vocab_size, m.seq_len, m.tokenizer) == (9, LENGTH, tables.student.digest)
  assert m.retargeted["tokenizer"] == tables.teacher.digest and m.retargeted["method"] == "exact"
  p_BTV = probabilities(c, rows)
  aligned = align_rows(tables, rows, LENGTH)
  p_GV = p_BTV[aligned.row_G, aligned.position_G - 1]
  reference = tiny_pair.Enumeration(tables, aligned.aligned, p_GV, aligned.known_G)
  assert np.bincount(aligned.kind_X).min() > 0 and len(aligned.token_X) > 100
  hard = 0
  for x, row, position in zip(aligned.token_X, aligned.row_X, aligned.position_X, strict=True):
    want, mass, _ = reference.target(x)
    record, label = store[row], aligned.aligned.id_H[x]
    if mass < 0.1:
      hard += 1
      want = np.eye(len(want))[label]
    got = dense(record)[position]
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-6)  # stored as float16
    assert record["label_logp_T"][position] == pytest.approx(
      np.log(want[label]), rel=1e-3, abs=1e-3
    )
    entropy = -sum(p * np.log(p) for p in want if p > 0)
    assert record["entropy_T"][position] == pytest.approx(entropy, rel=1e-3, abs=1e-5)
    assert want[record["argmax_T"][position]] == pytest.approx(want.max(), rel=1e-5)
  check_statistics(recorded, aligned, hard)
  for i, record in enumerate(aligned.records):
    for name, x in record.items():
      np.testing.assert_array_equal(store[i][name], x)


def check_statistics(folder, aligned, hard):
  """The numbers that `inspect` prints are those of the rows."""
  numbers, targets = summary.describe(folder / "records"), len(aligned.token_X)
  kinds = dict(zip(KINDS, np.bincount(aligned.kind_X, minlength=5) / targets, strict=True))
  assert numbers["retarget.rows"] == ROWS and numbers["retarget.targets"] == targets > 100
  assert numbers["retarget.tokens"] == sum(np.sum(r["segments_T"] > 0) for r in aligned.records)
  assert numbers["retarget.fell_back"] == pytest.approx(hard / targets, rel=1e-3)
  for kind in ("exact", "within", "spanning"):
    assert numbers[f"retarget.share.{kind}"] == pytest.approx(kinds[kind], rel=1e-3)
  assert 0 < numbers["retarget.misplaced_mass"] < 0.5


def test_a_lost_shard_is_recorded_again_bit_for_bit(recorded, tmp_path):
  shutil.copytree(recorded / "records", tmp_path / "records")
  lost = sorted((tmp_path / "records").glob("*-00001.*"))
  assert len(lost) > 1
  for file in lost:
    file.unlink()
  again = tiny_run.record(base(recorded), tmp_path / "records")
  assert again["recorded_now"] == 3
  assert contents(tmp_path / "records") == contents(recorded / "records")


@pytest.mark.parametrize("reason", REASONS)
def test_skipped_texts_and_chats_are_counted_by_reason(reason):
  tables = copy.copy(tiny_pair.tables())
  tables.chats = lambda token_G: reason
  row = {
    "tokens_T": np.ones(6, int),
    "segments_T": np.arange(6) // 3 + 1,
    "mask_T": np.ones(6, bool),
  }
  aligned = StudentRows(FewRows([row]), tables, Splits.of(tables), 8, 6).read_many([0])
  masses = {name: np.zeros((1, 8)) for name in projected_sampler.STATISTICS}
  assert student_rows.statistics(aligned, masses).skipped == {reason: 2}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 2, "tensor": 2}, {"context": 2, "tensor": 2}])
def test_a_mesh_records_the_same(recorded, tmp_path, mesh):
  """To the last bit of float32: sums over shards of the vocabulary have another order."""
  c = base(recorded)
  c.mesh.update(mesh)
  tiny_run.record(c, tmp_path / "records")
  got, want = open_store(tmp_path / "records"), open_store(recorded / "records")
  for i in range(ROWS):
    assert got[i].keys() == want[i].keys()
    np.testing.assert_allclose(dense(got[i]), dense(want[i]), rtol=2e-3, atol=1e-7)
    np.testing.assert_allclose(got[i]["label_logp_T"], want[i]["label_logp_T"], rtol=2e-3)


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("records.taps", (1,), r"records.taps is \(1,\); expected \(\) with records.student_tokenizer"),
    ("records.temperature", 2.0, "records.temperature is 2.0; expected 1 with records.student"),
    ("records.kind", "text", "records.kind is 'text'; expected a kind with targets"),
    ("records.logprobs", "x.jsonl", "records.logprobs is 'x.jsonl'; expected ''"),
    ("retarget.min_mass", 1.5, "retarget.min_mass is 1.5; expected a number from 0 to 1"),
  ],
)
def test_what_is_refused(tmp_path, key, value, message):
  c = base(tmp_path)
  section, _, name = key.partition(".")
  c[section][name] = value
  with pytest.raises(InputError, match=message):
    tiny_run.record(c, tmp_path / "records")
  assert not (tmp_path / "records").exists()


def test_tasks_are_refused(tmp_path):
  c = base(tmp_path)
  c.tasks = {"images": config.task("image_classes")}
  with pytest.raises(InputError, match="tasks is .'images'.; expected no tasks with records.stud"):
    tiny_run.record(c, tmp_path / "records")
