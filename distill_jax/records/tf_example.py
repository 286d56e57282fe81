"""Encoding of a record as a tf.train.Example whose features are single byte strings.

The features are packed bytes, because tf.Example stores float16 as float32 and integers as varints.
Every record has a `key`, the manifest's tag and the record's index. With it, a shard of another
store or under another name is detected on reading.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import numpy as np

from distill_jax.errors import InputError
from distill_jax.records import codec, taps, token_codec
from distill_jax.records.bits import Joined, join
from distill_jax.records.example_wire import parse, parse_many, serialize
from distill_jax.records.fields import WITHOUT_ENTRIES, Record
from distill_jax.records.manifest import Manifest
from distill_jax.records.stacked import Stacked

__all__ = [
  "FIELDS",
  "decode",
  "decode_many",
  "encode",
  "key",
  "names",
  "parse",
  "parse_many",
  "segments",
  "serialize",
]

FIELDS = {
  "key": "8 bytes of the manifest's digest, then the sequence's number, little-endian uint64",
  "tokens": "token ids, segment ids and loss mask; read with distill_jax.records",
  "labels": "labels of an example of a task and loss mask; read with distill_jax.records",
  "head": "numbers of positions and entries, and the pieces of the id space",
  "lengths": "number of entries of each position",
  "high": "piece of the id space of each entry, as unary gaps",
  "low": "place of each entry in its piece",
  "argmax": "entry of the teacher's most probable token at each position",
  "counts": "sample counts of the other entries, in unary",
  "logp": "float16 log-probabilities of the entries",
  "scalars": "float16 log-probabilities of labels, then float16 entropies, in nats",
  "rollout": "float16 log-probabilities of labels under the student that wrote them, then rewards",
  "smoothing": "float16 label smoothing of each segment",
  "taps": "int8 features, then a float32 scale per vector",
}


def names(m: Manifest) -> list[str]:
  """Returns the names of the features of a record of a store."""
  out = ["key", _ids_feature(m)]
  if m.kind not in WITHOUT_ENTRIES:
    out += ["head", "lengths", "high", "low", "argmax"]
  out += ["scalars"] * (m.kind != "text")
  out += ["counts"] * (m.kind == "sampled") + ["logp"] * m.spec.has_logp
  out += ["rollout"] * bool(m.spec.rollout)
  return out + ["smoothing"] * m.smoothing + ["taps"] * (m.taps is not None)


def _ids_feature(m: Manifest) -> str:
  """Returns the name of the feature with tokens or labels; format 1 stores labels as tokens."""
  return "labels" if m.labels and m.format_version > 1 else "tokens"


def segments(seq: Record, m: Manifest) -> np.ndarray:
  """Returns segments_T of a record. The labels of an example are one segment."""
  return np.ones_like(seq["labels_T"]) if m.labels else seq["segments_T"]


def encode(index: int, seq: Record, m: Manifest) -> dict[str, bytes]:
  """Encodes a sequence.

  Args:
    index: Index of the sequence in the store.
    seq: The sequence; see codec.encode_targets.
    m: The manifest of the store.

  Returns:
    The bytes of each feature, by name.

  Raises:
    InputError: The sequence does not fit the manifest.
  """
  if (found := len(seq[m.ids_name])) != m.seq_len:
    unit = "labels" if m.labels else "tokens"
    raise InputError(
      f"Sequence {index} has {found} {unit}; expected {m.seq_len}. Pack it to this length."
    )
  encode_ids = token_codec.encode_labels if m.labels else token_codec.encode_tokens
  fields = {"key": key(index, m), _ids_feature(m): encode_ids(seq, m.spec)}
  if m.kind != "text":
    fields |= codec.encode_targets(seq, m.spec)
  if m.spec.rollout:
    fields["rollout"] = codec.encode_scalars(seq, m.spec.rollout_scalars)
  if m.smoothing:
    fields["smoothing"] = token_codec.encode_smoothing({**seq, "segments_T": segments(seq, m)})
  if m.taps is not None:
    fields["taps"] = taps.encode(seq, m.taps)
  return fields


def decode(index: int, fields: Mapping[str, bytes], m: Manifest) -> Record:
  """Decodes a sequence; see `decode_many`."""
  return decode_many([index], join([fields]), m)[0]


def decode_many(indices: Sequence[int], fields: Mapping[str, Joined], m: Manifest) -> Stacked:
  """Decodes some sequences at once.

  Args:
    indices: Index of each sequence in the store.
    fields: The bytes of each feature, by name, of all sequences.
    m: The manifest of the store.

  Raises:
    InputError: A record is damaged, or is not the one with its index in this store.
  """
  if fields.keys() != (expected := set(names(m))):
    raise InputError(f"The record has the fields {sorted(fields)}; expected {sorted(expected)}.")
  expected_keys = [key(index, m) for index in indices]
  if fields["key"].data != b"".join(expected_keys):
    keys = zip(indices, fields["key"].parts, expected_keys, strict=True)
    index, found = next((index, found) for index, found, want in keys if found != want)
    tag, number = found[:8], int.from_bytes(found[8:], "little")
    raise InputError(
      f"The record has the index {number} and the tag {tag.hex()}; expected {index} and "
      f"{m.tag.hex()}."
    )
  decode_ids = token_codec.decode_labels if m.labels else token_codec.decode_tokens
  arrays = decode_ids(fields[_ids_feature(m)], m.seq_len, m.spec)
  mask_BT = arrays["mask_T"]
  if m.kind != "text":
    arrays |= codec.decode_targets(fields, mask_BT, m.spec)
  if m.spec.rollout:
    arrays |= codec.decode_scalars(fields["rollout"], mask_BT, m.spec.rollout_scalars)
  segments_BT = segments(arrays, m)
  if m.smoothing:
    rows = zip(fields["smoothing"].parts, segments_BT, strict=True)
    arrays["smoothing_T"] = np.stack([token_codec.decode_smoothing(*row) for row in rows])
  if m.taps is not None:
    rows = zip(fields["taps"].parts, segments_BT, strict=True)
    arrays |= Stacked.of([taps.decode(*row, m.taps) for row in rows]).arrays
  return Stacked(arrays)


def key(index: int, m: Manifest) -> bytes:
  """Returns the key of record `index`: the manifest's tag and the index."""
  return m.tag + struct.pack("<Q", index)
