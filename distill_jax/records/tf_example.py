"""A record on disk: a tf.train.Example whose features are single byte strings.

Packed bytes, because tf.Example itself stores float16 as float32 and integers as varints.
Every record begins with a `key`: the manifest's tag and the record's place in the store,
so that a shard of another store, or one under another's name, is found when it is read.
"""

from __future__ import annotations

import struct

import numpy as np

from distill_jax.errors import InputError
from distill_jax.records import codec, taps, token_codec
from distill_jax.records.example_wire import parse, serialize
from distill_jax.records.fields import Record
from distill_jax.records.manifest import Manifest

__all__ = ["FIELDS", "decode", "encode", "key", "names", "parse", "segments", "serialize"]

FIELDS = {
  "key": "8 bytes of the manifest's digest, then the sequence's number, little-endian uint64",
  "tokens": "token ids, segment ids and loss mask; read with distill_jax.records",
  "labels": "labels of an example of a task and loss mask; read with distill_jax.records",
  "head": "counts of positions and entries, and the pieces the id space is cut into",
  "lengths": "entries of each position",
  "high": "which piece of the id space each entry is in: unary gaps",
  "low": "where in its piece each entry is",
  "argmax": "which entry is the teacher's likeliest token",
  "counts": "sample counts of the other entries: unary",
  "logp": "float16 log-probabilities of the entries",
  "scalars": "float16 log-probability of each label, then float16 entropies, in nats",
  "smoothing": "float16 label smoothing of each segment",
  "taps": "int8 hidden states, then a float32 scale a vector",
}


def names(m: Manifest) -> list[str]:
  """The features a record of this store has."""
  out = ["key", _ids_feature(m)]
  if m.kind != "text":
    out += ["head", "lengths", "high", "low", "argmax", "scalars"]
    out += ["counts"] * (m.kind == "sampled") + ["logp"] * m.spec.has_logp
  return out + ["smoothing"] * m.smoothing + ["taps"] * (m.taps is not None)


def _ids_feature(m: Manifest) -> str:
  """The feature of tokens, or of labels; format 1 stores labels as tokens."""
  return "labels" if m.labels and m.format_version > 1 else "tokens"


def segments(seq: Record, m: Manifest) -> np.ndarray:
  """segments_T of a record; the labels of an example are one segment."""
  return np.ones_like(seq["labels_T"]) if m.labels else seq["segments_T"]


def encode(index: int, seq: Record, m: Manifest) -> dict[str, bytes]:
  """The fields of sequence number `index`; see codec for what `seq` holds.

  Raises:
    InputError: the sequence does not fit the manifest.
  """
  if (found := len(seq[m.ids_name])) != m.seq_len:
    unit = "labels" if m.labels else "tokens"
    raise InputError(f"sequence {index} has {found} {unit}, not {m.seq_len}")
  encode_ids = token_codec.encode_labels if m.labels else token_codec.encode_tokens
  fields = {"key": key(index, m), _ids_feature(m): encode_ids(seq, m.spec)}
  if m.kind != "text":
    fields |= codec.encode_targets(seq, m.spec)
  if m.smoothing:
    fields["smoothing"] = token_codec.encode_smoothing({**seq, "segments_T": segments(seq, m)})
  if m.taps is not None:
    fields["taps"] = taps.encode(seq, m.taps)
  return fields


def decode(index: int, fields: dict[str, bytes], m: Manifest) -> Record:
  """The inverse of `encode`; raises InputError if the record is not number `index` of m."""
  if sorted(fields) != sorted(names(m)):
    raise InputError(f"it has the fields {sorted(fields)} where {sorted(names(m))} belong")
  if fields["key"] != key(index, m):
    tag, number = fields["key"][:8], int.from_bytes(fields["key"][8:], "little")
    raise InputError(
      f"it is record {number} of store {tag.hex()} where record {index} of store {m.tag.hex()} "
      "belongs"
    )
  decode_ids = token_codec.decode_labels if m.labels else token_codec.decode_tokens
  seq = decode_ids(fields[_ids_feature(m)], m.spec)
  if m.kind != "text":
    seq |= codec.decode_targets(fields, seq["mask_T"], m.spec)
  if m.smoothing:
    seq["smoothing_T"] = token_codec.decode_smoothing(fields["smoothing"], segments(seq, m))
  if m.taps is not None:
    seq |= taps.decode(fields["taps"], seq["segments_T"], m.taps)
  return seq


def key(index: int, m: Manifest) -> bytes:
  return m.tag + struct.pack("<Q", index)
