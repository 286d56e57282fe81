"""Fixtures: a store that is written once per module, and a copy for tests that change it."""

import shutil

import pytest
from tiny_store import record


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole") / "s"
  record(folder)
  return folder


@pytest.fixture
def copy(whole, tmp_path):
  shutil.copytree(whole, tmp_path / "s")
  return tmp_path / "s"
