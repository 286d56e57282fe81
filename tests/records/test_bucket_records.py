"""Records of data.buckets: a store of each length, of training and of held-out rows."""

import dataclasses

import pytest
from heldout_runs import made, run
from tiny_store import contents

from distill_jax import config
from distill_jax.errors import InputError
from distill_jax.records import planned_stores
from distill_jax.records.store import open_store

LENGTHS = (44, 88)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
  folder = tmp_path_factory.mktemp("buckets")
  c = made(folder, heldout=100)
  c.data.seq_len, c.data.buckets, c.data.sequences = 88, LENGTHS, 0
  done = run(c, folder / "records")
  assert done["sequences"] == done["recorded_now"] == done["44/sequences"] + done["88/sequences"]
  again = run(c, folder / "records")
  assert again == done | {"recorded_now": 0, "heldout/recorded_now": 0}
  return folder, done


@pytest.mark.parametrize("split, length", [("", 44), ("heldout/", 88)])
def test_each_store_is_that_of_its_text_alone(recorded, tmp_path, split, length):
  """A batch has 4 sequences of 88 tokens or 8 of 44, and as many logits at once."""
  folder, done = recorded
  c = made(tmp_path, heldout=0)
  c.data.packed, c.data.sequences = f"{folder}/records/packed/{split}{length}", 0
  c.data.seq_len, c.data.split = length, split.rstrip("/") or "train"
  c.records.batch_size, c.records.chunk = 4 * 88 // length, 16 * length // 88
  assert run(c, tmp_path / "alone")["sequences"] == done[f"{split}{length}/sequences"] > 2
  assert contents(tmp_path / "alone") == contents(folder / "records" / f"{split}{length}")


def test_stores_are_found_and_described(recorded):
  folder, done = recorded
  data = dataclasses.replace(config.resolve(made(folder)).data, seq_len=88, buckets=LENGTHS)
  found = planned_stores.found(str(folder / "records"), data)
  assert list(found) == ["44", "88", "heldout/44", "heldout/88"]
  stores = {name: open_store(at) for name, at in found.items()}
  assert {name: len(s) for name, s in stores.items()} == {n: done[f"{n}/sequences"] for n in found}
  assert sum(s.manifest.shards[0].tokens for s in stores.values()) > 0
  with pytest.raises(InputError, match="has no manifest.json"):
    planned_stores.found(str(folder), data)


def test_served_responses_have_one_length(tmp_path):
  c = made(tmp_path, heldout=0)
  c.data.seq_len, c.data.buckets, c.records.logprobs = 88, LENGTHS, "dump.jsonl"
  with pytest.raises(InputError, match=r"expected \(\) with records.logprobs, whose resp"):
    run(c, tmp_path / "records")
