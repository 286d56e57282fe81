"""Checkpoints of orbax at s3:// URLs.

orbax 0.12 saves to local folders and gs://. tensorstore, which does the work, also has a driver for
S3. So s3:// paths are treated as those of GCS: a file marks a complete checkpoint, because a store
of objects cannot rename folders; and the driver is chosen by the scheme.
"""

from __future__ import annotations

import os
from typing import Any

from distill_jax.runtime import extras

with extras.needed("train"):
  from orbax.checkpoint._src.path import gcs_utils
  from orbax.checkpoint._src.serialization import tensorstore_utils

SCHEMES = ("gs://", "s3://")
_kvstore_of_gcs = gcs_utils.get_kvstore_for_gcs


def enable() -> None:
  """Makes orbax accept s3:// URLs in this process. Calling it again has no effect."""
  gcs_utils._GCS_PATH_PREFIX = SCHEMES
  gcs_utils.get_kvstore_for_gcs = kvstore
  tensorstore_utils._use_gcs_driver = _is_remote
  tensorstore_utils._normalize_path = _normalize


def kvstore(path: str) -> dict[str, Any]:
  """Returns tensorstore's spec of a folder at a gs:// or s3:// URL."""
  if not path.startswith("s3://"):
    return _kvstore_of_gcs(path)
  bucket, _, name = path.removeprefix("s3://").partition("/")
  spec = {"driver": "s3", "bucket": bucket, "path": name}
  if endpoint := os.environ.get("AWS_ENDPOINT_URL"):  # a store other than Amazon's
    spec |= {"endpoint": endpoint, "aws_region": os.environ.get("AWS_DEFAULT_REGION", "us-east-1")}
  return spec


def _is_remote(directory: str) -> bool:
  return directory.startswith(SCHEMES)


def _normalize(path: str) -> str:
  """Returns a path without trailing slashes; the scheme of a URL keeps its two slashes."""
  return os.path.normpath(path).replace("gs:/", "gs://").replace("s3:/", "s3://")
