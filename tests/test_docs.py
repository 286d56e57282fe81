"""The documentation: its examples run, its links and commands name what exists."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import tiny_store

from distill_jax.records import tf_example
from distill_jax.records.manifest import Manifest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def blocks(page, language):
  """Returns the code blocks of a page in one language."""
  text = (DOCS / page).read_text(encoding="utf-8")
  return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


# Record format.


def example_manifest():
  identity = json.loads(blocks("record-format.md", "json")[0])
  return Manifest(**identity, extents=(1,))


def example_features():
  text = (DOCS / "record-format.md").read_text(encoding="utf-8")
  rows = re.findall(r"^\| `(\w+)` \| `([0-9a-f ]+)` \|$", text, re.M)
  return {name: bytes.fromhex(value) for name, value in rows}


def test_the_worked_example_has_the_bytes_that_the_codec_writes():
  sequence = {
    "tokens_T": np.array([5, 9, 2]),
    "segments_T": np.array([1, 1, 1]),
    "mask_T": np.array([True, True, False]),
    "ids_TN": np.array([[2, 9, 9, 12], [2, 2, 2, 3], [0, 0, 0, 0]]),
    "argmax_T": np.array([9, 2, 0]),
    "label_logp_T": np.array([-0.75, -0.25, 0]),
    "entropy_T": np.array([1.25, 0.5, 0]),
  }
  m, features = example_manifest(), example_features()
  assert set(features) == set(tf_example.names(m))
  assert tf_example.encode(0, sequence, m) == features
  identity = blocks("record-format.md", "json")[0].strip()
  assert hashlib.sha256(identity.encode()).digest()[:8] == features["key"][:8]


def read_sampled():
  scope = {}
  exec(blocks("record-format.md", "python")[0], scope)
  return scope["read_sampled"]


def test_the_reader_of_the_page_reads_the_worked_example():
  tokens, mask, entries = read_sampled()(example_features(), n=4, vocab_size=16)
  assert tokens == [5, 9, 2]
  assert mask == [1, 1, 0]
  assert entries == [{2: 1, 9: 2, 12: 1}, {2: 3, 3: 1}]


def test_the_reader_of_the_page_reads_what_the_library_writes():
  m = tiny_store.manifest()
  for i in range(3):
    sequence = tiny_store.sequence(i)
    features = tf_example.encode(i, sequence, m)
    tokens, mask, entries = read_sampled()(features, m.n, m.vocab_size)
    assert tokens == sequence["tokens_T"].tolist()
    assert mask == sequence["mask_T"].tolist()
    for ids, counted in zip(sequence["ids_TN"][sequence["mask_T"]], entries, strict=True):
      assert dict(zip(*map(np.ndarray.tolist, np.unique(ids, return_counts=True)), strict=True)) == (
        counted
      )


def test_every_feature_is_described():
  text = (DOCS / "record-format.md").read_text(encoding="utf-8")
  for name in tf_example.FIELDS:
    assert f"`{name}`" in text, name
  for name in Manifest.__dataclass_fields__:
    assert f"`{name}`" in text, name
