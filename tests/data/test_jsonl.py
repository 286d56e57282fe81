"""JSON lines are read with their places; unusable input stops a run or is skipped and counted."""

import gzip
import json

import pytest

from distill_jax.data import jsonl
from distill_jax.data.bad_input import BadInputPolicy
from distill_jax.errors import InputError
from distill_jax.runtime import json_io

pytestmark = pytest.mark.smoke


def test_errors_name_the_file_and_line(tmp_path):
  (tmp_path / "a").write_bytes(b'{"a": 1}\n\n \r\n{"b": "\xff"}\n[1]')
  (tmp_path / "b").write_bytes(b"{}\r\n")
  lines = list(jsonl.read_lines(tmp_path / "a", tmp_path / "b"))
  assert [(x.number, x.offset) for x in lines] == [(1, 0), (4, 13), (5, 24), (1, 0)]
  assert lines[0].object() == {"a": 1} and lines[3].object() == {}
  assert lines[3].text() == "{}\r\n" and lines[3].where == f"{tmp_path / 'b'}, line 1"
  with pytest.raises(InputError, match=r"a: Byte 20 is 0xff, which is not UTF-8\. Convert the"):
    lines[1].object()
  with pytest.raises(InputError, match=r"a, line 5 is a JSON list; .*\. Correct the line\."):
    lines[2].object()


def test_compressed_files_are_read_like_others(tmp_path):
  text = b'{"a": 1}\n' * 3
  (tmp_path / "a.jsonl").write_bytes(text)
  (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text))
  found = jsonl.find_files(str(tmp_path))
  assert [name.rpartition("/")[2] for name in found] == ["a.jsonl", "b.jsonl.gz"]
  plain, packed = ([(x.raw, x.number, x.offset) for x in jsonl.read_lines(file)] for file in found)
  assert plain == packed
  with jsonl.open_file(tmp_path / "b.jsonl.gz") as stream:
    stream.seek(9)
    assert stream.read() == text[9:]
  (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text))
  with pytest.raises(InputError, match=r"holds a\.jsonl and a\.jsonl\.gz\. Remove one"):
    jsonl.find_files(str(tmp_path))


def test_a_damaged_compressed_file_is_refused(tmp_path):
  packed = gzip.compress(b"{}\n" * 999)
  for damaged in (packed[:-9], b"{}\n", packed[:-8] + b"x" * 8):
    (tmp_path / "x.jsonl.gz").write_bytes(damaged)
    with pytest.raises(InputError, match=r"x\.jsonl\.gz is not a whole gzip file"):
      list(jsonl.read_lines(tmp_path / "x.jsonl.gz"))


def test_skip_bom_skips_a_byte_order_mark(tmp_path):
  (tmp_path / "a").write_bytes(b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{}\n')
  with pytest.raises(InputError, match="a, line 1 is not JSON"):
    next(jsonl.read_lines(tmp_path / "a")).object()
  first, second = jsonl.read_lines(tmp_path / "a", skip_bom=True)
  assert first.object() == json_io.parse(first.raw) == {"a": 1} and first.offset == 3
  assert second.offset == 12
  with pytest.raises(InputError, match="a, line 2 is not JSON"):
    second.object()


def test_written_lines_can_be_read_again(tmp_path):
  rows = [{"b": "é", "a": 1}, {"half": "\ud800"}, [1, "\n"]]
  jsonl.write(tmp_path / "x", rows)
  assert (tmp_path / "x").read_bytes().startswith('{"b": "é", "a": 1}\n'.encode())
  assert [json.loads(x.raw) for x in jsonl.read_lines(tmp_path / "x")] == rows
  assert jsonl.to_line("é", ensure_ascii=True) == b'"\\u00e9"\n'


def test_a_policy_stops_or_counts(capsys):
  with pytest.raises(InputError, match="x.on_bad is 'shrug'; expected one of"):
    BadInputPolicy("x.on_bad", "shrug")
  stop = BadInputPolicy("x.on_bad", "stop")
  with pytest.raises(InputError, match=r"^line 1: It is bad\. Correct it, or set x.on_bad=skip\.$"):
    stop.reject("line 1", "It is bad.")
  with pytest.raises(InputError, match=r"^line 1 is bad\. Correct it, or set x.on_bad=skip\.$"):
    stop.reject_subject("line 1", "is bad")
  skip = BadInputPolicy("x.on_bad", "skip")
  for n in range(5):
    skip.reject(f"line {n}", "It is bad.")
  skip.reject_subject("line 9", "has no text")
  skip.report("f.jsonl", 4, "examples")
  assert capsys.readouterr().err == (
    "f.jsonl: 5 of 10 examples skipped (line 0, line 1, line 2, …): It is bad.\n"
    "f.jsonl: 1 of 10 examples skipped (line 9): It has no text.\n"
  )
