"""The computations of the benchmarks in tools/bench, on tiny shapes."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tensorflow_datasets.proto import tf_example_pb2

from distill_jax import config
from distill_jax.data import corpus, tokenizers
from distill_jax.errors import InputError
from distill_jax.losses import DenseTargets
from distill_jax.models import loading
from distill_jax.records import collate, store

BENCH = Path(__file__).parents[2] / "tools" / "bench"


def script(name):
  spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # dataclasses look themselves up there
  spec.loader.exec_module(module)
  return module


fidelity = script("records_fidelity")
overhead = script("record_overhead")
packing = script("packing")

V, D, T = 90, 12, 32


@pytest.fixture(scope="module")
def case():
  """Returns (rows, batch, teacher, student): two sequences, with random dense targets."""
  rng = np.random.default_rng(0)
  rows = []
  for _ in range(2):
    segments = np.repeat([1, 2], [T - 5, 5]).astype(np.int32)
    rows.append(
      {
        "tokens_T": rng.integers(0, V, T).astype(np.int32),
        "segments_T": segments,
        "mask_T": np.append(segments[1:] == segments[:-1], False),
      }
    )
  normal = lambda *shape: jnp.asarray(rng.normal(0, 1, shape), jnp.float32)
  teacher = DenseTargets(hidden_BTD=normal(2, T, D), head_VD=normal(V, D))
  student = DenseTargets(hidden_BTD=teacher.hidden_BTD + normal(2, T, D), head_VD=teacher.head_VD)
  return rows, collate.collate(rows), teacher, student


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def probabilities(targets):
  return softmax(np.asarray(targets.hidden_BTD, np.float64) @ np.asarray(targets.head_VD).T)


def kind_gradients(case, kind, k=None):
  """Returns the gradients (hidden, head) of one of the other losses with k entries."""
  _, batch, teacher, student = case
  targets, _ = fidelity.rival_targets(kind, fidelity.rivals(teacher, 8, seed=0))
  k = k or targets.ids_BTK.shape[-1]
  targets = targets.replace(ids_BTK=targets.ids_BTK[..., :k], logp_BTK=targets.logp_BTK[..., :k])
  loaded = batch.replace(targets={"teacher": targets})
  return fidelity.gradients(
    student.hidden_BTD, student.head_VD, loaded, token_loss=fidelity.LOSSES[kind], chunk=8
  )


def by_hand(case, kind, k):
  """Returns the same gradients in float64, from q - p as described for each kind."""
  _, batch, teacher, student = case
  p, q = probabilities(teacher), probabilities(student)
  top = np.argsort(-p, -1)[..., :k]
  inside = np.zeros(p.shape, bool)
  np.put_along_axis(inside, top, True, -1)
  among = lambda x, where: np.where(where, x, 0) / np.where(where, x, 0).sum(-1, keepdims=True)
  if kind == "topk64_both":
    grad = among(q, inside) - among(p, inside)
  elif kind == "topk64_teacher":
    grad = q - among(p, inside)
  else:  # what is left of p goes to the rest as the student would spread it
    left = 1 - np.where(inside, p, 0).sum(-1, keepdims=True)
    grad = q - np.where(inside, p, left * among(q, ~inside))
  mask = np.asarray(batch.mask_BT)
  grad = np.where(mask[..., None], grad, 0) / mask.sum()
  hidden, head = np.asarray(student.hidden_BTD, np.float64), np.asarray(student.head_VD)
  return grad @ head, np.einsum("btv,btd->vd", grad, hidden)


@pytest.mark.parametrize("kind", ["topk64_both", "topk64_teacher", "topk16_bucket"])
@pytest.mark.parametrize("k", [3, 16])
def test_other_kinds_agree_with_their_descriptions(case, kind, k):
  for found, want in zip(kind_gradients(case, kind, k), by_hand(case, kind, k), strict=True):
    np.testing.assert_allclose(found, want, atol=2e-6)


def exact_gradients(case):
  _, batch, teacher, student = case
  loaded = batch.replace(targets={"teacher": teacher})
  return fidelity.gradients(
    student.hidden_BTD, student.head_VD, loaded, token_loss=fidelity.ours, chunk=8
  )


@pytest.mark.parametrize("kind", ["topk64_both", "topk64_teacher", "topk16_bucket"])
def test_a_record_of_all_tokens_gives_the_full_gradient(case, kind, monkeypatch):
  monkeypatch.setattr(fidelity, "KINDS", {**fidelity.KINDS, "topk64_both": V, kind: V})
  for found, want in zip(kind_gradients(case, kind), exact_gradients(case), strict=True):
    angle, ratio = fidelity.angle_and_ratio(found, want)
    assert angle < 0.01
    assert ratio == pytest.approx(1, abs=1e-4)


def test_renormalising_both_sides_rotates_the_gradient(case):
  exact = exact_gradients(case)
  for k, least in ((3, 20), (30, 2)):
    both = kind_gradients(case, "topk64_both", k)
    teacher = kind_gradients(case, "topk64_teacher", k)
    for of_both, of_teacher, want in zip(both, teacher, exact, strict=True):
      angle = fidelity.angle_and_ratio(of_both, want)[0]
      assert angle > least
      assert angle > 1.5 * fidelity.angle_and_ratio(of_teacher, want)[0]


def test_angle_and_ratio():
  one, other = np.array([3, 0], np.float32), np.array([1, 1], np.float32)
  angle, ratio = fidelity.angle_and_ratio(one, other)
  assert angle == pytest.approx(45)
  assert ratio == pytest.approx(3 / np.sqrt(2))
  # A cosine in float32 would call this 0.
  small, _ = fidelity.angle_and_ratio(np.array([1, 1e-5], np.float32), np.array([1.0, 0.0]))
  assert small == pytest.approx(np.degrees(1e-5), rel=1e-4)


def test_independent_draws_follow_p(case):
  _, _, teacher, _ = case
  many = jnp.broadcast_to(teacher.hidden_BTD[:1, :1], (1, 400, D))
  ids = fidelity.rivals(teacher.replace(hidden_BTD=many), 100, seed=0)["iid_BTN"]
  p = probabilities(teacher)[0, 0]
  counts = np.bincount(ids.ravel(), minlength=V)
  assert np.all(np.abs(counts - ids.size * p) < 5 * np.sqrt(ids.size * p * (1 - p)) + 5)


def test_all_figures_of_all_kinds(case, monkeypatch):
  monkeypatch.setattr(fidelity, "COPIES", 16)
  figures = fidelity.measure(*case, chunk=8)
  assert list(figures) == [
    "sampled_32",
    "sampled_63",
    "sampled_255",
    "iid_50",
    "topk64_both",
    "topk64_teacher",
    "topk16_bucket",
  ]
  for kind, f in figures.items():
    promised = {
      "bytes_per_token",
      "entries_per_token",
      "hidden_angle_deg",
      "head_angle_deg",
      "hidden_norm_ratio",
      "head_norm_ratio",
    }
    assert promised <= set(f)
    assert all(np.isfinite(x) and x > 0 for x in f.values()), kind
  assert figures["sampled_255"]["hidden_angle_deg"] < figures["sampled_32"]["hidden_angle_deg"]
  assert figures["sampled_32"]["hidden_angle_deg"] < figures["iid_50"]["hidden_angle_deg"]
  assert figures["topk16_bucket"]["entries_per_token"] == 16
  assert figures["topk16_bucket"]["raw_bytes_per_token"] == 16 * 5
  assert "sampled_63" in fidelity.table("maths", 1.0, figures)


def test_entries_are_distinct_ids(case):
  rows, batch, teacher, _ = case
  targets, records, entries = fidelity.sampled(batch, rows, teacher, 63, chunk=8)
  mask = batch.mask_BT
  assert entries == (np.asarray(targets.weight_BTK) > 0)[mask].sum() / mask.sum()
  np.testing.assert_allclose(targets.weight_BTK[mask].sum(-1), 1, rtol=1e-5)
  assert len(records) == len(rows)
  _, counted = fidelity.rival_targets("iid_50", {"iid_BTN": np.array([[[7, 3, 7, 7, 0]]])})
  assert counted.tolist() == [[3]]


def test_bytes_of_other_kinds(case):
  _, batch, teacher, _ = case
  stored = fidelity.rivals(teacher, 8, seed=0)
  record = tf_example_pb2.Example.FromString(fidelity.maxtext_example(batch, stored, 1))
  feature = record.features.feature
  assert list(feature["inputs"].int64_list.value) == batch.inputs.tokens_BT[1].tolist()
  ids = np.array(feature["top_k_indices"].int64_list.value).reshape(T, 64)
  np.testing.assert_array_equal(ids, stored["ids_BTK"][1])
  logits = np.array(feature["top_k_logits"].float_list.value, np.float32).reshape(T, 64)
  np.testing.assert_allclose(logits, stored["logits_BTK"][1], rtol=2**-8)
  assert not np.any(logits.view(np.uint32) & 0xFFFF)  # as bfloat16 has them
  # 10 entries of 16 + 6 bits, a byte, a token of 16 bits.
  assert fidelity.iid_bytes(10, 50, 49_152) == 10 * 22 / 8 + 1 + 2


def test_without_the_maths_package(monkeypatch, capsys):
  monkeypatch.setattr(fidelity, "MATHS", ("no_such_package", "no-such-package==1.0", "x", ""))
  monkeypatch.setattr(sys, "argv", ["records_fidelity.py"])
  with pytest.raises(InputError, match="pip install --no-deps no-such-package==1.0"):
    fidelity.maths()
  with pytest.raises(SystemExit) as stop:
    fidelity.main()
  assert stop.value.code == 2
  assert "pip install --no-deps" in capsys.readouterr().err


def test_positions_are_complete_rows(tmp_path):
  letters = tokenizers.load_tokenizer(tiny.write_tokenizer(tmp_path / "tokenizer.json"))
  rows = fidelity.sequences("abcdefgh" * 9, letters, 64, 16)
  tokens = np.stack([row["tokens_T"] for row in rows])
  np.testing.assert_array_equal(tokens, [letters.encode("abcdefgh" * 2)] * 4)
  whole = "expected a multiple of --seq_len"
  for positions, found in ((40, whole), (8, whole), (80, "shorter than 80")):
    with pytest.raises(InputError, match=found):
      fidelity.sequences("abcdefgh" * 9, letters, positions, 16)


def test_overhead_records_complete_shards(tmp_path):
  c = tiny.tiny(tmp_path)
  c.teacher.source, c.teacher.shape = "", "tiny"
  c.data.sequences, c.records.tokens_per_shard = 8, 8 * tiny.SEQ_LEN
  c = config.resolve(c)
  tokenizer = corpus.tokenizer_of(c.data, loading.open_source(c.teacher).pretrained)
  rows = list(corpus.sequences(c.data, tokenizer))
  with jax.set_mesh(c.mesh.make()):
    passes = overhead.Passes(c, tokenizer, rows, 2, tmp_path / "store")
    figures = overhead.measure(passes, rounds=1)
  assert passes.writer.missing() == []
  passes.writer.complete()
  first, last = (store.open_store(tmp_path / "store")[i] for i in (0, 8))
  np.testing.assert_array_equal(first["tokens_T"], last["tokens_T"])
  assert figures["tokens"] == 8 * tiny.SEQ_LEN
  seconds = figures["record_seconds"]
  assert min(figures["plain_seconds"], figures["write_seconds"]) > 0
  assert figures["overhead_ratio"] == pytest.approx(seconds / figures["plain_seconds"])
  assert figures["record_tokens_per_second"] == pytest.approx(figures["tokens"] / seconds)
  json.dumps(figures)


def test_next_fit_begins_a_row_where_a_document_does_not_fit():
  given = [packing.TokenBlock(np.arange(12), np.array([5, 4, 3])), *packing.blocks(np.array([12]))]
  rows = [row.tolist() for row in packing.next_fit(given, 8)]
  assert rows[:2] == [[0, 1, 2, 3, 4, 0, 0, 0], [5, 6, 7, 8, 9, 10, 11, 0]]
  assert [sum(map(bool, row)) for row in rows[2:]] == [8, 4]
  figures = packing.compare(packing.lengths(40, 1.0, 60_000), 256)
  assert figures["waste"] < 0.02 < figures["waste_next_fit"]


def test_scores_of_rows_are_those_of_their_lengths(monkeypatch):
  monkeypatch.setattr(packing, "BUCKETS", (8, 32))
  figures = packing.scores(np.array([32, 3, 5]))
  assert figures["buckets_waste"] == 0
  assert figures["buckets_scores"] == (32**2 + 8**2) / (2 * 32**2)
  assert figures["segments_scores"] == (32**2 + 3**2 + 5**2) / (2 * 32**2)
