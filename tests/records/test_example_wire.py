"""The hand-written tf.Example: the bytes that protobuf writes, and what it reads."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax.errors import InputError
from distill_jax.records import example_wire, tf_example

pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
from tensorflow_datasets.proto import tf_example_pb2  # noqa: E402

# Includes lengths around the one at which a varint takes another byte.
VALUES = st.one_of(st.binary(max_size=300), st.integers(16380, 16390).map(bytes))
ANY_NAMES = st.dictionaries(st.text(max_size=8), VALUES, max_size=6)


def no_prefixes(names):
  """Returns True if no name is a prefix of another; protobuf orders such names inconsistently."""
  return not any(a != b and b.startswith(a) for a in names for b in names)


FEATURES = ANY_NAMES.filter(no_prefixes)


def test_names_of_a_record_do_not_begin_each_other():
  assert no_prefixes(tf_example.FIELDS)


def by_protobuf(features):
  example = tf_example_pb2.Example()
  for name, value in features.items():
    example.features.feature[name].bytes_list.value.append(value)
  return example.SerializeToString(deterministic=True)


@settings(max_examples=300, deadline=None)
@given(FEATURES)
def test_bytes_are_those_of_protobuf_and_are_read_back(features):
  data = example_wire.serialize(features)
  assert data == by_protobuf(features)
  assert example_wire.parse(data) == features


@settings(max_examples=100, deadline=None)
@given(FEATURES, st.randoms())
def test_any_order_and_unknown_fields_are_read(features, rng):
  """A map's entries in another order, in two messages, and fields of a later version."""
  entries = [example_wire.serialize({k: v}) for k, v in features.items()]
  rng.shuffle(entries)
  unknown = bytes([0x50, 0x85, 0x01])  # field 10, a varint
  unknown += bytes([0x59]) + bytes(8) + bytes([0x65]) + bytes(4)  # fields 11 and 12, fixed
  unknown += bytes([0x6A, 0x02, 0x00, 0x00])  # field 13, two bytes
  data = b"".join(entry + unknown for entry in entries)
  assert example_wire.parse(data) == features
  example = tf_example_pb2.Example.FromString(data)
  assert {k: f.bytes_list.value[0] for k, f in example.features.feature.items()} == features


def test_a_feature_that_is_cut_off_with_its_last_byte_is_refused():
  raw = bytearray(example_wire.serialize({"name": b"\0"}))
  raw[1] -= 1  # the length of all features
  with pytest.raises(InputError, match="longer than its message"):
    example_wire.parse(bytes(raw[:-1]))


@settings(max_examples=300, deadline=None)
@given(FEATURES.filter(bool), st.data())
def test_damaged_bytes_are_an_input_error_or_other_features(features, data):
  raw = bytearray(example_wire.serialize(features))
  for _ in range(data.draw(st.integers(1, 3))):
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
  raw = raw[: data.draw(st.integers(0, len(raw)))]
  spans = example_wire._plain_spans(bytes(raw))
  with contextlib.suppress(InputError), pytest.MonkeyPatch.context() as patch:
    patch.setattr(example_wire, "_plain_spans", lambda data: None)
    parsed = example_wire.parse(bytes(raw))  # both ways of parsing agree
    assert spans is None or {k: bytes(raw[a:b]) for k, (a, b) in spans.items()} == parsed
    return
  assert spans is None


@settings(max_examples=200, deadline=None)
@given(FEATURES, st.data())
def test_records_parsed_at_once_are_those_parsed_one_by_one(features, data):
  """Records of the same layout and, maybe, damaged ones or longer ones."""
  records = [example_wire.serialize(features)] * 2
  for _ in range(data.draw(st.integers(0, 3))):
    raw = bytearray(data.draw(st.sampled_from(records)))
    if raw and data.draw(st.booleans()):
      raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    records.append(bytes(raw) + data.draw(st.sampled_from([b"", b"\x50\x01", b"\x0a"])))
  try:
    parsed = [example_wire.parse(record) for record in records]
    assert all(one.keys() == features.keys() for one in parsed)
  except (InputError, AssertionError):
    with pytest.raises(InputError):
      example_wire.parse_many(records)
  else:
    joined = example_wire.parse_many(records)
    assert {name: field.parts for name, field in joined.items()} == {
      name: [one[name] for one in parsed] for name in features
    }


def test_features_of_numbers_are_refused():
  example = tf_example_pb2.Example()
  example.features.feature["x"].int64_list.value.append(3)
  with pytest.raises(InputError, match="Feature 'x' is not a byte string"):
    example_wire.parse(example.SerializeToString())


def test_invalid_bytes_are_refused():
  for data, problem in (
    (b"\x0a\x7f", "longer than its message"),
    (b"\x0a\xff", "A length is cut off"),
    (b"\x0b", "the wire type 3"),
    (b"\x09\x00", "A number is cut off"),
    (b"\x02\x00", "the number 0"),
  ):
    with pytest.raises(InputError, match=problem):
      example_wire.parse(data)
  assert example_wire.parse(b"") == {}
