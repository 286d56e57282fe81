"""JSON is read with errors that name what is wrong."""

import pytest

from distill_jax.errors import InputError
from distill_jax.runtime import json_io

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize(
  "text, words",
  [
    (b"{", r"^f.json is not JSON .*\. Fetch it\.$"),
    (b'"\xff"', r"^f.json is not JSON .*\. Fetch it\.$"),
    (b"9" * 5000, "^f.json is not JSON"),
    (b"[" * 100_000, "^f.json is not JSON"),
    (b"[1]", r"^f.json is a JSON list; expected one object .*\. Fetch it\.$"),
    (b'{"a": {"b": 1, "b": 2}}', r"^f.json has the key 'b' twice\. Fetch it\.$"),
  ],
)
def test_errors_name_the_subject_and_what_to_do(text, words):
  with pytest.raises(InputError, match=words):
    json_io.parse_object(text, "f.json", "fetch it", unique_keys=True)


def test_without_a_subject_the_caller_names_the_place():
  with pytest.raises(InputError, match="^The text is not JSON "):
    json_io.parse_object("{")
  with pytest.raises(InputError, match="^The text is a JSON list; "):
    json_io.parse_object("[]")
  assert json_io.parse_object('{"a": 1, "a": 2}') == {"a": 2}


def test_files(tmp_path):
  path = tmp_path / "a" / "b.json"
  with pytest.raises(InputError, match=r"b.json does not exist\. Run it first\."):
    json_io.read_object(path, "run it first")
  json_io.write_json(path, {"b": "é", "a": [1]})
  assert path.read_bytes() == b'{\n "a": [\n  1\n ],\n "b": "\\u00e9"\n}\n'
  assert json_io.read_object(path, "") == {"b": "é", "a": [1]}
  json_io.write_json(path, {"b": "é", "a": 1}, indent=2, sort_keys=False, ensure_ascii=False)
  assert path.read_text(encoding="utf-8") == '{\n  "b": "é",\n  "a": 1\n}\n'


def test_lone_surrogates_and_invalid_utf8_are_detected():
  assert json_io.lone_surrogate("a\udfff") == "\udfff" and json_io.lone_surrogate("a😀") is None
  with pytest.raises(InputError, match=r"^Byte 12 is 0xff, which is not UTF-8\. Convert"):
    json_io.decode_utf8(b"ab\xff", 10)
