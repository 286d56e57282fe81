"""Tests of the index of a shard: every record is one range of its file, verified by a checksum."""

import re
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module
from tiny_store import manifest, record

from distill_jax.errors import InputError
from distill_jax.records import shard_index, shard_writer, store

pytestmark = pytest.mark.smoke
BLOCK = shard_index.BLOCK


def shard(path, records, options=None):
  out = array_record_module.ArrayRecordWriter(
    str(path), options or shard_writer.array_record_options(100)
  )
  for data in records:
    out.write(data)
  out.close()
  return path


def ranges(path, entries):
  data = path.read_bytes()
  return [data[e["offset"] : int(e["offset"]) + int(e["length"])] for e in entries]


def check(path, records):
  entries = shard_index.build(path, len(records))
  entries = shard_index.parse(shard_index.to_bytes(entries), len(records))
  for entry, data, want in zip(entries, ranges(path, entries), records, strict=True):
    assert shard_index.record_of(data, entry) == want
    assert len(data) - len(want) <= shard_index.BLOCK_HEADER * (len(want) // BLOCK + 1)
  return entries


def test_every_record_is_one_range_wherever_the_headers_of_blocks_fall(tmp_path):
  rng = np.random.default_rng(0)
  records = [rng.bytes(int(n)) for n in [1, 5, 131072, *rng.integers(1, 200_000, 40)]]
  check(shard(tmp_path / "s", records), records)
  # The second chunk and its record begin at every place near the end of a block.
  firsts = set()
  for size in range(65_340, 65_440):
    records = [rng.bytes(size), rng.bytes(1000)]
    firsts.add(int(check(shard(tmp_path / "s", records), records)[1]["offset"]))
  assert BLOCK - 1 in firsts
  assert BLOCK + shard_index.BLOCK_HEADER in firsts


def test_the_page_of_the_format_has_the_bytes_of_an_index_and_reads_records(tmp_path):
  page = (Path(__file__).parents[2] / "docs/record-format.md").read_text(encoding="utf-8")
  section = page.partition("## The index of a shard")[2]
  records = [bytes(70_000), b"hello"]
  path, index = shard(tmp_path / "s", records), tmp_path / "i"
  index.write_bytes(bytes.fromhex(re.search(r"```text\n(.*?)```", section, re.S)[1]))
  assert index.read_bytes() == shard_index.to_bytes(shard_index.build(path, 2))
  scope = {}
  exec(re.search(r"```python\n(.*?)```", section, re.S)[1], scope)
  with path.open("rb") as a, index.open("rb") as b:
    assert [scope["read_record"](a, b, i) for i in range(2)] == records


def test_a_flipped_byte_of_a_record_or_an_index_is_detected(tmp_path):
  path = shard(tmp_path / "s", [b"a" * 1000, b"b" * 1000])
  entries = shard_index.build(path, 2)
  data = bytearray(ranges(path, entries)[1])
  data[500] ^= 1
  with pytest.raises(ValueError, match="checksum"):
    shard_index.record_of(bytes(data), entries[1])
  whole = shard_index.to_bytes(entries)
  assert len(whole) == shard_index.size_of(2)
  for at in range(len(whole)):
    bad = bytearray(whole)
    bad[at] ^= 1
    with pytest.raises(ValueError, match="begins with|checksum"):
      shard_index.parse(bytes(bad), 2)
  with pytest.raises(ValueError, match="bytes; expected"):
    shard_index.parse(whole[:-1], 2)
  with pytest.raises(ValueError, match="bytes; expected"):
    shard_index.parse(whole, 3)


def test_a_file_of_another_layout_or_length_has_no_index(tmp_path):
  grouped = shard(tmp_path / "g", [b"a" * 1000, b"b" * 1000], "group_size:64,zstd:1")
  with pytest.raises(ValueError, match="Record 0 is not at the end"):
    shard_index.build(grouped, 2)
  path = shard(tmp_path / "s", [b"a" * 1000, b"b" * 1000])
  with pytest.raises(ValueError, match="holds 2 records; expected 3"):
    shard_index.build(path, 3)
  damaged = bytearray(path.read_bytes())
  damaged[300] ^= 1
  path.write_bytes(damaged)
  with pytest.raises(ValueError, match="corrupted|hash|checksum|mismatch"):
    shard_index.build(path, 2)


def test_the_writer_leaves_an_index_beside_each_shard_and_the_same_shards(tmp_path):
  record(tmp_path / "long")
  m = store.open_store(tmp_path / "long").manifest
  for s in m.shards:
    data = (tmp_path / "long" / shard_index.name_of(s.name)).read_bytes()
    entries = shard_index.parse(data, s.count)
    np.testing.assert_array_equal(entries, shard_index.build(tmp_path / "long" / s.name, s.count))
  assert shard_index.has_index(m.seq_len)
  assert not shard_index.has_index(manifest(seq_len=7).seq_len)


def test_a_shard_that_is_cut_off_while_written_is_refused(tmp_path, monkeypatch):
  build = shard_index.build

  def cut(path, count):
    path.write_bytes(path.read_bytes()[:70_000])
    return build(path, count)

  monkeypatch.setattr(shard_index, "build", cut)
  with pytest.raises(InputError, match="is incomplete .*; the disk may be full"):
    record(tmp_path)
  assert not list(tmp_path.glob("records-*"))
