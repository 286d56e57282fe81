"""Files for `tfds.builder_from_directory`: features.json and dataset_info.json.

Both are the files that tensorflow-datasets itself would write, so that a store can be written
without it.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from distill_jax.records import tf_example
from distill_jax.records.manifest import Manifest
from distill_jax.runtime import files

if TYPE_CHECKING:  # reading a store must not import jax
  from distill_jax.types import JsonObject

SPLIT = "records"
# The names omit the number of shards, so that a store can be extended without renaming files.
TEMPLATE = "{SPLIT}-{SHARD_INDEX}.{FILEFORMAT}"
FEATURES = "tensorflow_datasets.core.features"


def write(folder: str | os.PathLike[str], m: Manifest) -> None:
  """Describes the shards of a manifest. Each file is replaced as a whole."""
  for name, contents, indent in (
    ("features.json", features(m), 4),
    ("dataset_info.json", dataset_info(m), 2),
  ):
    text = json.dumps(contents, indent=indent, sort_keys=True)
    files.write(files.join(folder, name), text.encode())


def features(m: Manifest) -> JsonObject:
  """Returns the description of the features of a record: byte strings."""
  return {
    "pythonClassName": f"{FEATURES}.features_dict.FeaturesDict",
    "featuresDict": {
      "features": {
        name: {
          "pythonClassName": f"{FEATURES}.tensor_feature.Tensor",
          "tensor": {"dtype": "string", "encoding": "none", "shape": {}},
          "description": tf_example.FIELDS[name],
        }
        for name in tf_example.names(m)
      }
    },
  }


def dataset_info(m: Manifest) -> JsonObject:
  """Returns the description of the dataset and its shards. 64-bit numbers are strings."""
  return {
    "name": "records",
    "version": "1.0.0",
    "description": f"Teacher records of {m.teacher.get('name', 'no teacher')}, kind {m.kind}.",
    "fileFormat": "array_record",
    "splits": [
      {
        "name": SPLIT,
        "numBytes": str(sum(s.bytes for s in m.shards)),
        "shardLengths": [str(s.count) for s in m.shards],
        "filepathTemplate": TEMPLATE,
      }
    ],
  }
