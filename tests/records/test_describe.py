"""Tests of the description of a store."""

import numpy as np
import pytest
from tiny_store import N, T, record, sequence

from distill_jax.records import describe, store

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
  folder = tmp_path_factory.mktemp("inspect")
  record(folder)
  return store.open_store(folder)


def test_describe(opened):
  d = describe.describe(opened)
  size = sum(p.stat().st_size for p in opened.folder.glob("*.array_record"))
  tokens = 10 * (T - 4)
  assert d["bytes"] == size
  assert d["tokens"] == tokens
  assert d["bytes_per_token"] == pytest.approx(size / tokens, abs=1e-3)
  parts = sum(v for k, v in d.items() if k.startswith("payload.")) + d["container"]
  assert parts == pytest.approx(size / tokens, abs=0.01)
  entries = np.mean([len(set(r)) for i in range(10) for r in sequence(i)["ids_TN"][: T - 4]])
  assert d["entries_per_target"] == pytest.approx(entries, abs=1e-3)
  assert "tokenizer" in d


def test_show(opened):
  lines = describe.show(opened, 3, lambda ids: f"<{ids[0]}>").splitlines()
  seq = sequence(3)
  assert len(lines) == T - 4
  for t in (0, T - 5):
    ids, counts = np.unique(seq["ids_TN"][t], return_counts=True)
    assert f"'<{seq['tokens_T'][t]}>'" in lines[t]
    assert f"{counts.max() / N:.3f}" in lines[t]
    # The argmax has a star if it is among the five candidates: most points first, then in order.
    shown = ids[np.argsort(-counts, kind="stable")][:5]
    star = f"*'<{seq['argmax_T'][t]}>'"
    assert (star in lines[t]) == (seq["argmax_T"][t] in shown)
