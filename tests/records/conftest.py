"""Fixtures: a store that is written once per module, and a copy for tests that change it."""

import shutil

import pytest
from object_stores import upload
from tiny_store import record

from distill_jax.runtime import files


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole") / "s"
  record(folder)
  return folder


@pytest.fixture
def copy(whole, tmp_path):
  shutil.copytree(whole, tmp_path / "s")
  return tmp_path / "s"


@pytest.fixture
def memory_store(whole):
  """The URL of a copy of the store in fsspec's memory."""
  url = upload(whole, "memory://records/s")
  yield url
  files.remove_tree(url)
