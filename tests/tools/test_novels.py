"""tools/novels.py: the chapters of a novel."""

import sys
import types

import pytest
from experiments import ROOT, load_config


@pytest.fixture
def novels(monkeypatch):
  """The script, with a stand-in for rdata, which is not installed with the tests."""
  monkeypatch.setitem(sys.modules, "rdata", types.SimpleNamespace())
  return load_config(ROOT / "tools" / "novels.py")


def test_a_novel_is_split_at_the_headings_of_its_chapters(novels):
  lines = ["EMMA", "", "CHAPTER I", "", "Emma was", "handsome.", "", "Chapter 2", "", "She", ""]
  assert list(novels.chapters(lines)) == ["Emma was\nhandsome.\n", "She\n"]


def test_a_sentence_that_begins_with_chapter_is_text(novels):
  lines = ["Chapter 1", "", "Chapter after chapter, she read on.", "Chapter 3 was the last."]
  assert list(novels.chapters(lines)) == ["\n".join(lines[2:]) + "\n"]
