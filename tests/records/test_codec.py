"""Tests of the codec: exact round trips, size, and errors on bad input."""

import numpy as np
import pytest

from distill_jax.errors import InputError
from distill_jax.records import bits, codec, tap_features, taps, token_codec
from distill_jax.records.fields import ENTRIES, RecordSpec
from distill_jax.records.manifest import Taps

pytestmark = pytest.mark.smoke


def zipf(rng, V, shape, a=1.1):
  """Returns ids with a skew like that of language, scattered over the vocabulary."""
  p = 1 / np.arange(1, V + 1) ** a
  return np.minimum(np.searchsorted(np.cumsum(p / p.sum()), rng.random(shape)), V - 1)


def sequence(spec, T, seed=0, mask=0.9):
  """Returns a random sequence of a kind, as from the sampler."""
  rng = np.random.default_rng(seed)
  V, n = spec.vocab_size, spec.n
  segments = np.sort(rng.integers(0, 4, T))[::-1].astype(np.int32)
  seq = {
    "tokens_T": zipf(rng, V, T).astype(np.int32),
    "segments_T": segments,
    "mask_T": (rng.random(T) < mask) & (segments > 0),
    "entropy_T": rng.gamma(1, 2, T).astype(np.float32),
    "label_logp_T": -rng.gamma(1, 3, T).astype(np.float32),
  }
  if spec.kind == "sampled":
    distinct = rng.integers(1, n + 1, T)
    points = zipf(rng, V, (T, n))
    pick = rng.integers(0, distinct[:, None], (T, n))
    seq["ids_TN"] = np.sort(np.take_along_axis(points, pick, 1), 1).astype(np.int32)
    seq["argmax_T"] = seq["ids_TN"][:, n // 2].copy()
    seq["argmax_T"][::7] = zipf(rng, V, T)[::7]  # some were not sampled
    if spec.logp:
      seq["logp_TN"] = np.take_along_axis(-rng.gamma(1, 3, (T, V)), seq["ids_TN"], 1)
  elif spec.kind in ("topk", "dense"):
    seq["ids_TN"] = np.argsort(rng.random((T, V)), 1)[:, :n].astype(np.int32)
    seq["logp_TN"] = -np.sort(rng.gamma(1, 3, (T, n))).astype(np.float32)
    seq["logp_TN"][np.arange(n) >= rng.integers(1, n + 1, T)[:, None]] = -np.inf
    seq["argmax_T"] = seq["ids_TN"][:, 0]
  return seq


def round_trips(seqs, spec):
  """Encodes sequences one by one, and decodes them at once."""
  T = len(seqs[0]["tokens_T"])
  tokens = bits.Joined.of([token_codec.encode_tokens(s, spec) for s in seqs])
  out = token_codec.decode_tokens(tokens, T, spec)
  if spec.kind != "text":
    fields = bits.join([codec.encode_targets(s, spec) for s in seqs])
    out |= codec.decode_targets(fields, out["mask_T"], spec)
  return [{name: x[i] for name, x in out.items()} for i in range(len(seqs))]


def round_trip(seq, spec):
  return round_trips([seq], spec)[0]


def half(x):
  return np.asarray(x).astype(np.float16).astype(np.float32)


def check(seq, out, spec):
  """Checks each entry against the definition, in plain Python."""
  for name in ("tokens_T", "segments_T", "mask_T"):
    np.testing.assert_array_equal(out[name], seq[name])
  assert out["tokens_T"].dtype == out["segments_T"].dtype == np.int32
  if spec.kind == "text":
    return
  m = seq["mask_T"]
  entries = spec.kind != "labels"
  assert ("ids_TK" in out) == ("argmax_T" in out) == entries
  assert ("entropy_T" in out) == spec.entropy
  for name in ("argmax_T",) * entries + ("entropy_T",) * spec.entropy + ("label_logp_T",):
    want = seq[name] if name == "argmax_T" else half(seq[name])
    np.testing.assert_array_equal(out[name], np.where(m, want, 0))
  for t in range(len(m) * entries):
    if not m[t]:
      want = {}
    elif spec.kind == "sampled":
      ids, at, counts = np.unique(seq["ids_TN"][t], return_index=True, return_counts=True)
      logp = half(seq["logp_TN"][t, at]) if spec.logp else None
      want = dict(zip(ids, np.float32(counts / spec.n), strict=True))
    else:
      keep = seq["logp_TN"][t] > -np.inf
      want = dict(zip(seq["ids_TN"][t][keep], half(seq["logp_TN"][t][keep]), strict=True))
    K = len(want)
    value = "weight_TK" if spec.kind == "sampled" else "logp_TK"
    assert list(out["ids_TK"][t, :K]) == sorted(want)
    assert dict(zip(out["ids_TK"][t, :K], out[value][t, :K], strict=True)) == want
    empty = 0 if spec.kind == "sampled" else -np.inf
    assert np.all(out["ids_TK"][t, K:] == 0)
    assert np.all(out[value][t, K:] == empty)
    if spec.kind == "sampled" and spec.logp and m[t]:
      np.testing.assert_array_equal(out["logp_TK"][t, :K], logp)


SPECS = [
  RecordSpec("sampled", 63, 1000),
  RecordSpec("sampled", 63, 1000, logp=True),
  RecordSpec("sampled", 1, 5),
  RecordSpec("sampled", 255, 1 << 20),
  RecordSpec("sampled", 7, 1),
  RecordSpec("sampled", 32, 257, entropy=False),
  RecordSpec("topk", 16, 300),
  RecordSpec("topk", 1, 2),
  RecordSpec("topk", 3, 3),
  RecordSpec("dense", 5, 5),
  RecordSpec("labels", 0, 300),
  RecordSpec("labels", 0, 300, entropy=False),
  RecordSpec("text", 0, 50_000),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("T", [1, 2, 65])
@pytest.mark.parametrize("mask", [0.0, 0.8, 1.0])
def test_exact(spec, T, mask):
  if spec.logp and spec.vocab_size > 1000:
    pytest.skip("large")
  seqs = [sequence(spec, T, seed, mask) for seed in range(3)]
  for seq, out in zip(seqs, round_trips(seqs, spec), strict=True):
    check(seq, out, spec)
  check(seqs[0], round_trip(seqs[0], spec), spec)


def test_bits_against_plain_python():
  rng = np.random.default_rng(0)
  nbits = rng.integers(0, 33, 500)
  values = np.array([int(rng.integers(0, 1 << int(b))) for b in nbits], np.uint64)
  text = "".join(f"{int(v):0{b}b}"[::-1] if b else "" for v, b in zip(values, nbits, strict=True))
  want = bytes(int(text[i : i + 8].ljust(8, "0")[::-1], 2) for i in range(0, len(text), 8))
  assert bits.pack(values, nbits) == want
  joined = bits.Joined.of([want, want])
  found = joined.unpack_widths(np.tile(nbits, 2).astype(np.uint32), [500, 500])
  np.testing.assert_array_equal(found, np.tile(values, 2))
  for n in [0, 1, 2, 3, 4, 5, 8, 9, 255, 256, 257, 1 << 20]:
    assert bits.width(n) == bits.widths(np.array([n]))[0] == len(f"{max(n - 1, 0):b}".lstrip("0"))


def realistic(T=8192, V=151_936, n=63):
  """Returns a sequence with about 1.6 nats and 12.7 entries per position, and ids at random."""
  rng = np.random.default_rng(0)
  p = rng.dirichlet(np.full(60, 0.05), T)
  # Each row mixes a few probable tokens with a tail.
  p = 0.92 * p + 0.08 * rng.dirichlet(np.full(60, 0.5), T)
  x = (rng.random((T, 1)) + np.arange(n)) / n
  which = (np.cumsum(p, 1)[:, None, :] <= x[:, :, None]).sum(-1).clip(0, 59)
  ids = np.sort(rng.permutation(V)[zipf(rng, V, (T, 60), 1.0)], 1)
  return {
    "tokens_T": rng.integers(0, V, T),
    "segments_T": np.ones(T, np.int32),
    "mask_T": np.ones(T, bool),
    "ids_TN": np.take_along_axis(ids, which, 1),
    "argmax_T": np.take_along_axis(ids, p.argmax(1)[:, None], 1)[:, 0],
    "entropy_T": -(p * np.log(p)).sum(1),
    "label_logp_T": np.log(p[:, 0]),
  }


def test_size():
  spec, seq = RecordSpec("sampled", 63, 151_936), realistic()
  data, fields = token_codec.encode_tokens(seq, spec), codec.encode_targets(seq, spec)
  T, E = len(seq["tokens_T"]), codec.count_entries(fields)
  assert 11 < E / T < 15  # the entries per position that the target assumes
  size = len(data) + sum(map(len, fields.values()))
  assert size / T < 0.85 * (3 * E / T + 6)


BAD = {
  "tokens_T": (lambda s: s["tokens_T"] + 5000, "tokens_T is"),
  "segments_T": (lambda s: s["segments_T"][1:], "segments_T"),
  "mask_T": (lambda s: np.ones(65, bool), "padding"),
  "ids_TN": (lambda s: s["ids_TN"][:, ::-1], "not sorted"),
  "argmax_T": (lambda s: s["argmax_T"] - 1000, "argmax_T is"),
  "entropy_T": (lambda s: s["entropy_T"] * np.nan, "nan"),
  "label_logp_T": (lambda s: s["label_logp_T"] * np.inf, "inf"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sequences_are_refused(name):
  spec = RecordSpec("sampled", 63, 1000)
  change, words = BAD[name]
  seq = sequence(spec, 65)
  seq[name] = change(seq)
  with pytest.raises(InputError, match=words):
    round_trip(seq, spec)


def test_nan_logp_and_repeated_ids_are_refused():
  spec = RecordSpec("topk", 4, 100)
  for name, value, words in [("logp_TN", np.nan, "finite"), ("ids_TN", 3, "twice")]:
    seq = sequence(spec, 30, mask=1.0)
    seq["logp_TN"][:] = -1
    seq[name][:] = value
    with pytest.raises(InputError, match=words):
      codec.encode_targets(seq, spec)


def test_values_in_padding_are_ignored():
  """A teacher may output NaN in padding."""
  spec = RecordSpec("sampled", 63, 1000)
  seq = sequence(spec, 65, mask=0.5)
  for name in ("entropy_T", "label_logp_T"):
    seq[name] = np.where(seq["mask_T"], seq[name], np.nan)
  check(seq, round_trip(seq, spec), spec)


@pytest.mark.parametrize("field", ["head", "lengths", "high", "low", "counts", "scalars", "argmax"])
def test_cut_fields_do_not_decode(field):
  spec = RecordSpec("sampled", 63, 1000)
  seq = sequence(spec, 300, mask=1.0)
  fields = codec.encode_targets(seq, spec)
  fields[field] = fields[field][: len(fields[field]) // 2]
  with pytest.raises(InputError):
    codec.decode_targets(bits.join([fields]), seq["mask_T"][None], spec)


@pytest.mark.parametrize("kind", [{"kind": "other"}, {"vocab_size": (1 << 20) + 1}, {"n": 0}])
def test_invalid_specs_are_refused(kind):
  with pytest.raises(InputError):
    RecordSpec(**{"kind": "sampled", "n": 63, "vocab_size": 100} | kind)


def test_taps():
  x = np.random.default_rng(0).normal(0, 5, (2, 1, 9, 32)).astype(np.float32)
  x[0, 0, 3] = 0
  q, scale = (np.asarray(a)[:, 0] for a in tap_features.quantise(x))
  seq = {
    "taps_PTD": q,
    "taps_scale_PT": scale,
    "segments_T": np.array([1, 1, 1, 1, 2, 2, 2, 0, 0], np.int32),
  }
  m = Taps((3, 5), 32)
  out = taps.decode(taps.encode(seq, m), seq["segments_T"], m)
  back = taps.dequantise(out["taps_PTD"], out["taps_scale_PT"])
  error = np.abs(back - x[:, 0])[:, :7]
  assert np.all(error <= np.abs(x[:, 0, :7]).max(-1, keepdims=True) / 254 * 1.001)
  assert np.all(back[:, 7:] == 0)
  with pytest.raises(InputError, match=r"expected int8 \(1, 9, 32\)"):
    taps.encode(seq, Taps((3,), 32))


def test_projection_keeps_lengths_and_never_changes():
  p = taps.projection(7, 512, 128)
  x = np.random.default_rng(0).normal(size=(200, 512))
  ratio = np.linalg.norm(x @ p, axis=1) / np.linalg.norm(x, axis=1)
  assert abs(ratio.mean() - 1) < 0.02
  assert np.all(np.abs(ratio - 1) < 0.35)
  signs = "".join("+" if s > 0 else "-" for s in taps.projection(7, 4, 4).ravel())
  assert signs == GOLDEN


GOLDEN = "-+++-+-++++++++-"  # of Philox, which numpy promises not to change


def with_entries(seq, spec):
  """Returns a sampled sequence with fields.ENTRIES instead of its points."""
  found = [np.unique(ids, return_counts=True) for ids in seq["ids_TN"][seq["mask_T"]]]
  values = (
    np.concatenate([ids for ids, _ in found]),
    np.concatenate([counts for _, counts in found]),
    np.array([len(ids) for ids, _ in found]),
  )
  return {k: v for k, v in seq.items() if k != "ids_TN"} | dict(zip(ENTRIES, values, strict=True))


def test_entries_have_the_bytes_of_their_points():
  spec = RecordSpec("sampled", 31, 5000)
  seq = sequence(spec, 200)
  assert codec.encode_targets(with_entries(seq, spec), spec) == codec.encode_targets(seq, spec)


@pytest.mark.parametrize("name, change", [*zip(ENTRIES, (4999, 2, 9), strict=True)])
def test_inconsistent_entries_are_refused(name, change):
  spec = RecordSpec("sampled", 31, 5000)
  seq = with_entries(sequence(spec, 200), spec)
  seq[name] = seq[name].copy()
  seq[name][0] = change + (name == "entry_counts_E") * seq[name][0]
  with pytest.raises(InputError, match="entries of a record are inconsistent. Expected ascending"):
    codec.encode_targets(seq, spec)
  seq["entry_ids_E"] = seq["entry_ids_E"] + 5000
  with pytest.raises(InputError, match="entry_ids_E is int64 from"):
    codec.encode_targets(seq, spec)
