"""The files that describe a store to tfds, against those that tfds itself writes."""

import dataclasses

import numpy as np
import pytest
import tiny_store

from distill_jax.records import manifest, tf_example, tfds_info
from distill_jax.records.manifest import Taps


def write_with_tfds(folder, m, data_dir):
  tfds = pytest.importorskip("tensorflow_datasets")
  features = {
    name: tfds.features.Tensor(shape=(), dtype=np.object_, doc=tf_example.FIELDS[name])
    for name in tf_example.names(m)
  }
  identity = tfds.core.dataset_info.DatasetIdentity(
    name="records",
    version=tfds.core.utils.Version("1.0.0"),
    data_dir=str(data_dir),
    module_name="",
  )
  description = f"Teacher records of {m.teacher.get('name', 'no teacher')}, kind {m.kind}."
  info = tfds.core.DatasetInfo(
    builder=identity, features=tfds.features.FeaturesDict(features), description=description
  )
  info.set_file_format("array_record")
  template = tfds.core.ShardedFileTemplate(
    data_dir=data_dir,
    dataset_name="records",
    split=tfds_info.SPLIT,
    filetype_suffix="array_record",
    template=tfds_info.TEMPLATE,
  )
  split = tfds.core.SplitInfo(
    name=tfds_info.SPLIT,
    shard_lengths=[s.count for s in m.shards],
    num_bytes=sum(s.bytes for s in m.shards),
    filename_template=template,
  )
  info.set_splits(tfds.core.splits.SplitDict([split]))
  info.write_to_directory(folder)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
  folder = tmp_path_factory.mktemp("store") / "records"
  tiny_store.record(folder)
  return folder


CHANGES = {
  "sampled": {},
  "a name that is not ASCII": {"teacher": {"name": 'Größe "7B"'}},
  "labels of rollouts": {
    "kind": "labels",
    "n": 0,
    "rollout": {"round": 0, "student": "s", "sampling": {}, "scalars": ["behaviour_logp"]},
    "format_version": 3,
  },
  "text without a teacher": {"kind": "text", "n": 0, "teacher": {}},
  "top-k with features": {
    "kind": "topk",
    "missing_mass": "tail_bucket",
    "taps": Taps((1, 2), 8),
    "smoothing": True,
  },
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_files_are_byte_for_byte_those_of_tfds(sampled, change, tmp_path):
  m = dataclasses.replace(manifest.load(sampled), **change)
  (tmp_path / "theirs").mkdir()
  (tmp_path / "ours").mkdir()
  write_with_tfds(tmp_path / "theirs", m, sampled)
  tfds_info.write(tmp_path / "ours", m)
  assert tiny_store.contents(tmp_path / "ours") == tiny_store.contents(tmp_path / "theirs")
