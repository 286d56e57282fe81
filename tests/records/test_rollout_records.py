"""Scalars of rollouts in stores of every kind, and in batches."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_store

from distill_jax.errors import InputError
from distill_jax.losses import LabelTargets
from distill_jax.records import collate, describe, formats, manifest, store, tf_example

pytestmark = pytest.mark.smoke

ROLLOUT = {
  "round": 3,
  "student": "abc",
  "sampling": {"temperature": 1.0},
  "scalars": ["behaviour_logp", "reward"],
}
KINDS = {
  "text": {"kind": "text", "n": 0},
  "labels": {"kind": "labels", "n": 0, "format_version": 3},
  "sampled": {},
}


def written(kind="text", **rollout):
  return manifest.with_rollout(tiny_store.manifest(4, **KINDS[kind]), ROLLOUT | rollout)


def rollout(i):
  rng = np.random.default_rng(100 + i)
  scalars = {
    "behaviour_logp_T": -rng.gamma(1, 3, tiny_store.T),
    "reward_T": np.full(tiny_store.T, i),
  }
  return tiny_store.sequence(i) | {name: np.float32(x) for name, x in scalars.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_holds_rollout_scalars(kind, tmp_path):
  tiny_store.record(tmp_path, written(kind), make=rollout)
  read = store.open_store(tmp_path)
  read.verify()
  assert read.manifest.rollout == ROLLOUT
  batch = collate.collate(read.read_many(range(4)), recorded=collate.recorded_of(read.manifest))
  for i in range(4):
    want, mask = rollout(i), rollout(i)["mask_T"]
    for name in ("behaviour_logp", "reward"):
      half = np.where(mask, np.float16(want[f"{name}_T"]), 0).astype(np.float32)
      np.testing.assert_array_equal(getattr(batch.rollout, f"{name}_BT")[i], half)
  assert batch.rollout.reward_BT.dtype == np.float32
  if kind == "labels":
    targets = batch.targets["teacher"]
    assert isinstance(targets, LabelTargets) and targets.argmax_BT is None
    half = np.float16(rollout(2)["label_logp_T"]) * rollout(2)["mask_T"]
    np.testing.assert_array_equal(targets.label_logp_BT[2], half)
  assert ("teacher" in batch.targets) == (kind != "text")


def test_a_rollout_without_a_reward(tmp_path):
  tiny_store.record(tmp_path, written(scalars=["behaviour_logp"]), make=rollout)
  read = store.open_store(tmp_path)
  assert "reward_T" not in read[0]
  assert collate.collate([read[0]]).rollout.reward_BT is None


def test_other_stores_keep_their_bytes():
  """The tags, digests of the manifests, were computed before stores could hold rollouts."""
  tags = [tiny_store.manifest(**change).tag.hex() for change in ({}, KINDS["text"])]
  assert tags == ["e6f2a1e94e3d128a", "8dabd51d18c1a3ba"]
  assert collate.collate([tiny_store.sequence(0)], with_targets=False).rollout is None


def test_another_student_does_not_continue_a_store(tmp_path):
  tiny_store.record(tmp_path, written(), shards=1, make=rollout)
  assert json.loads((tmp_path / manifest.NAME).read_text())["rollout"]["student"] == "abc"
  with pytest.raises(InputError, match="holds records with rollout.student='abc', but this run"):
    tiny_store.record(tmp_path, written(student="def"), make=rollout)
  plain = dataclasses.replace(written(), rollout={})
  with pytest.raises(InputError, match="holds records with rollout.round=3, but this run has"):
    tiny_store.record(tmp_path, plain)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"rollout": ROLLOUT | {"scalars": ["reward"]}}, "rollout.scalars is .*; expected"),
    ({"rollout": ROLLOUT | {"scalars": []}}, "rollout is .*expected the fields round, student"),
    ({"rollout": {"round": 1}}, "rollout is .*expected the fields round, student"),
    ({"rollout": ROLLOUT, "format_version": 1}, "format_version is 1; expected 3 for rollouts"),
    ({"kind": "labels"}, "format_version is 1; expected 3 for rollouts and for kind 'labels'"),
    ({"rollout": ROLLOUT, "labels": True}, "expected {} for the labels of a task"),
  ],
)
def test_manifests_that_are_not_valid(change, message):
  fields = {"kind": "text", "n": 0, "format_version": 1 if change.get("kind") else 3} | change
  with pytest.raises(InputError, match=message):
    tiny_store.manifest(**fields)


def test_a_manifest_whose_rollout_is_no_object_is_damaged(tmp_path):
  (tmp_path / manifest.NAME).write_text(json.dumps(written()._json() | {"rollout": "abc"}))
  with pytest.raises(InputError, match="is not a complete manifest .*Delete it"):
    manifest.find(tmp_path)


def test_bad_records_are_refused():
  m = written()
  with pytest.raises(InputError, match="lacks behaviour_logp_T, which its store holds"):
    tf_example.encode(0, tiny_store.sequence(0), m)
  bad = rollout(0)
  bad["behaviour_logp_T"][1] = np.nan
  with pytest.raises(InputError, match="behaviour_logp_T is nan at a position with targets"):
    tf_example.encode(0, bad, m)
  cut = tf_example.encode(0, rollout(0), m)
  cut["rollout"] = cut["rollout"][:-2]
  with pytest.raises(InputError, match="bytes of scalars"):
    tf_example.decode(0, cut, m)


def test_rollout_scalars_are_printed_and_given_to_trainers(tmp_path):
  tiny_store.record(tmp_path, written("labels"), make=rollout)
  read, want = store.open_store(tmp_path), rollout(1)
  line = describe.show(read, 1, lambda ids: f"<{ids[0]}>").splitlines()[3]
  for name, value in (("student", "behaviour_logp"), ("label", "label_logp"), ("H", "entropy")):
    assert f" {name}={np.float16(want[f'{value}_T'][3]):.2f}" in line
  example = formats.example(read[1], read.manifest)
  np.testing.assert_array_equal(example["reward"], want["mask_T"] * 1.0)
  assert {"behaviour_logp", "teacher_label_logp"} <= example.keys()
