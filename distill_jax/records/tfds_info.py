"""features.json and dataset_info.json: what `tfds.builder_from_directory` reads."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from distill_jax.records import tf_example
from distill_jax.records.manifest import Manifest
from distill_jax.runtime.atomic_io import atomic_write

SPLIT = "records"
# Without the number of shards in the names, a store is extended without renaming any.
TEMPLATE = "{SPLIT}-{SHARD_INDEX}.{FILEFORMAT}"


def write(folder: Path, m: Manifest) -> None:
  """Describes the shards of m, each file replaced as a whole."""
  import tensorflow_datasets as tfds  # a second of imports that readers need not pay

  with tempfile.TemporaryDirectory() as scratch:
    features = tfds.features.FeaturesDict(
      {
        n: tfds.features.Tensor(shape=(), dtype=np.object_, doc=tf_example.FIELDS[n])
        for n in tf_example.names(m)
      }
    )
    info = tfds.core.DatasetInfo(
      builder=tfds.core.dataset_info.DatasetIdentity(
        name="records",
        version=tfds.core.utils.Version("1.0.0"),
        data_dir=str(folder),
        module_name="",
      ),
      features=features,
      description=f"Teacher records of {m.teacher.get('name', 'no teacher')}, kind {m.kind}.",
    )
    info.set_file_format("array_record")
    template = tfds.core.ShardedFileTemplate(
      data_dir=folder,
      dataset_name="records",
      split=SPLIT,
      filetype_suffix="array_record",
      template=TEMPLATE,
    )
    split = tfds.core.SplitInfo(
      name=SPLIT,
      shard_lengths=[s.count for s in m.shards],
      num_bytes=sum(s.bytes for s in m.shards),
      filename_template=template,
    )
    info.set_splits(tfds.core.splits.SplitDict([split]))
    info.write_to_directory(scratch)
    for file in Path(scratch).iterdir():
      atomic_write(folder / file.name, file.read_text())
