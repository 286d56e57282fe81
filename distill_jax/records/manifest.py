"""The manifest of a store: its description, written once and checked by every reader and writer."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from typing import TYPE_CHECKING

from distill_jax.errors import InputError
from distill_jax.records import manifest_checks
from distill_jax.records.fields import RecordSpec
from distill_jax.runtime import files, json_io

if TYPE_CHECKING:  # reading a store must not import jax
  from distill_jax.types import JsonObject

FORMATS = (1, 2, 3)
NAME = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Taps:
  """Features of some layers that are stored in addition to targets.

  Attributes:
    layers: The layers, in the order of the P axis.
    width: Width of a vector, after projection.
    seed: Seed of the fixed random projection (taps.projection), or None without one.
    kind: "hidden" for the layers' outputs, or "qkv" for their concatenated queries, keys and
      values. Its name in the file is "of".
  """

  layers: tuple[int, ...]
  width: int
  seed: int | None = None
  kind: str = "hidden"


@dataclasses.dataclass(frozen=True)
class Shard:
  """One finished shard, with sequences first .. first + count - 1.

  Attributes:
    name: Name of the file.
    first: Index of the first sequence.
    count: Number of sequences.
    bytes: Size of the file.
    sha256: sha256 of the file, in hex.
    tokens: Number of positions that are not padding.
    targets: Number of positions with targets (mask_T set).
    entries: Number of entries of all positions.
    fields: Payload in bytes, by field.
  """

  name: str
  first: int
  count: int
  bytes: int
  sha256: str
  tokens: int
  targets: int
  entries: int
  fields: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Manifest:
  """The description of a store, which readers need before the first record.

  Attributes:
    kind: See fields.RecordSpec.
    n: See fields.RecordSpec.
    vocab_size: Number of tokens of the tokenizer, or of classes of the task.
    seq_len: Number of tokens, or labels, of a sequence.
    teacher: {"name", "config", "digest"}; {} for kind "text" without a teacher.
    tokenizer: Digest of the tokenizer; "" for a task.
    corpus: Digest of the corpus or task.
    sequences_per_shard: Number of sequences of each shard; the last of each extent may have fewer.
    extents: Number of sequences that each run added to the store. A run that writes passes the
      total as `extents=(total,)`.
    logp: See fields.RecordSpec.
    entropy: See fields.RecordSpec.
    missing_mass: Convention for the mass outside the entries: "tail_bucket" or "renormalise" for
      "topk"; "renormalise" for "dense", which corrects float16 rounding; otherwise "none".
    nucleus: Probability mass at which "topk" entries are cut; 1 for no cut.
    temperature: Temperature of the recorded distribution.
    taps: The stored features, or None.
    smoothing: True if documents have different label smoothing.
    labels: True if records hold labels_T of a task's examples instead of packed tokens.
    heldout_fraction: Of a store of held-out documents, the fraction of documents that were held
      out, which decides which ones are; 0 for other stores.
    retargeted: For records of a teacher with another tokenizer: "tokenizer", the digest of the
      teacher's tokenizer; "method", "samples" for records that `retarget` converted, or "exact" for
      projected distributions that `record` sampled; "store", the digest of the converted store, ""
      for "exact"; and "min_mass", see RetargetOptions. {} for other stores.
    rollout: For texts that a student wrote: "round", their number in its training; "student", its
      fingerprint; "sampling", the options with which it wrote them; and "scalars", the names of
      the stored fields of fields.ROLLOUT. {} for other stores; see `with_rollout`.
    format_version: Version of the format; see `format_of`.
    shards: The finished shards, in order.
  """

  kind: str
  n: int
  vocab_size: int
  seq_len: int
  teacher: JsonObject
  tokenizer: str
  corpus: str
  sequences_per_shard: int
  extents: tuple[int, ...]
  logp: bool = False
  entropy: bool = True
  missing_mass: str = "none"
  nucleus: float = 1.0
  temperature: float = 1.0
  taps: Taps | None = None
  smoothing: bool = False
  labels: bool = False
  heldout_fraction: float = 0.0
  retargeted: JsonObject = dataclasses.field(default_factory=dict)
  rollout: JsonObject = dataclasses.field(default_factory=dict)
  format_version: int = 1
  shards: tuple[Shard, ...] = ()

  def __post_init__(self):
    manifest_checks.check(self)

  @functools.cached_property
  def spec(self) -> RecordSpec:
    """The contents of a record."""
    scalars = tuple(self.rollout.get("scalars", ()))
    return RecordSpec(self.kind, self.n, self.vocab_size, self.logp, self.entropy, scalars)

  @property
  def total(self) -> int:
    """Total number of sequences, finished or not."""
    return sum(self.extents)

  @functools.cached_property
  def ranges(self) -> list[range]:
    """The range of sequences of every shard, in order."""
    out, first = [], 0
    for extent in self.extents:
      last = first + extent
      for start in range(first, last, self.sequences_per_shard):
        out.append(range(start, min(start + self.sequences_per_shard, last)))
      first = last
    return out

  @property
  def identity(self) -> JsonObject:
    """The fields that must be equal for two runs to write into one folder."""
    # False is omitted, because older manifests lack the field.
    without = ["extents", "shards"] + ["smoothing"] * (not self.smoothing)
    return {k: v for k, v in self._json().items() if k not in without}

  def _json(self) -> JsonObject:
    """Returns all fields in the format of the file."""
    fields = _plain(dataclasses.asdict(self))
    for name in ("heldout_fraction", "retargeted", "rollout"):  # older manifests lack these fields
      if not fields[name]:
        del fields[name]
    if self.format_version == 1:  # it stores labels of a task as "tokens"
      del fields["labels"]
    if fields["taps"]:
      fields["taps"]["of"] = fields["taps"].pop("kind")
    return fields

  @property
  def ids_name(self) -> str:
    """Name of the field with the tokens, or labels, of a record."""
    return "labels_T" if self.labels else "tokens_T"

  @functools.cached_property
  def tag(self) -> bytes:
    """8 bytes of the digest of the identity, which are stored in every record."""
    text = json.dumps(self.identity, sort_keys=True)
    return hashlib.sha256(text.encode()).digest()[:8]

  @functools.cached_property
  def digest(self) -> str:
    """sha256, in hex, of the identity and the shards' digests."""
    text = json.dumps({**self.identity, "shards": [s.sha256 for s in self.shards]}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes the manifest to a folder, a path or a URL, atomically."""
    text = json.dumps(self._json(), indent=1)
    files.write(files.join(folder, NAME), (text + "\n").encode())


def format_of(kind: str, labels: bool, rollout: bool = False) -> int:
  """Returns the format version of a new store.

  Format 2 adds labels_T (format 1 stores labels of a task as tokens) and kind "dense" (format 1
  stores it as renormalised "topk"). Format 3 adds kind "labels" and the scalars of rollouts. Other
  stores keep format 1, so that their bytes do not change.

  Args:
    kind: Kind of the records.
    labels: True for a store of a task.
    rollout: True for a store with scalars of rollouts.
  """
  if kind == "labels" or rollout:
    return 3
  return 2 if labels or kind == "dense" else 1


def with_rollout(m: Manifest, rollout: JsonObject) -> Manifest:
  """Returns the manifest of a store of rollouts, in the format of such stores.

  Args:
    m: A manifest without them.
    rollout: See Manifest; {} for no rollouts.
  """
  version = format_of(m.kind, m.labels, bool(rollout))
  return dataclasses.replace(m, rollout=rollout, format_version=version)


def without_targets(
  *, vocab_size: int, positions: int, sequences: int, corpus: str = ""
) -> Manifest:
  """Returns a manifest of a task's labels without a teacher, which is not stored in a folder.

  Args:
    vocab_size: Number of classes of the task.
    positions: Number of labels of an example.
    sequences: Number of examples.
    corpus: Digest of the data.
  """
  return Manifest(
    kind="text",
    n=0,
    vocab_size=vocab_size,
    seq_len=positions,
    teacher={},
    tokenizer="",
    corpus=corpus,
    sequences_per_shard=sequences,
    extents=(sequences,),
    labels=True,
    format_version=format_of("text", labels=True),
  )


def shard_name(number: int) -> str:
  """Returns the file name of a shard, which matches tfds_info.TEMPLATE."""
  return f"records-{number:05d}.array_record"


def load(folder: str | os.PathLike) -> Manifest:
  """Reads the manifest of a folder or URL.

  Raises:
    InputError: The manifest is missing or damaged, or has an unknown format version.
  """
  if (found := find(folder)) is None:
    is_there = files.listing(folder) or files.folders(folder)
    problem = f"has no {NAME}" if is_there else "is empty or does not exist"
    action = "Name a folder that `record` finished."
    if str(folder).endswith("/heldout"):  # see planned_stores.py
      action = "Set records.heldout_sequences and record again, or name another folder."
    raise InputError(f"{folder} {problem}. {action}")
  return found


def find(folder: str | os.PathLike) -> Manifest | None:
  """Reads the manifest of a folder or URL; returns None if it does not exist. See `load`."""
  path = files.join(folder, NAME)
  if files.info(path) is None:
    return None
  try:
    fields = json_io.parse(files.read(path))
  except (OSError, InputError) as e:
    why = str(e).rstrip(".")
    raise InputError(f"{path} cannot be read ({why}). Delete it and run `record` again.") from e
  version = fields.get("format_version") if isinstance(fields, dict) else None
  if version not in FORMATS:
    raise InputError(
      f"{path} has format {version!r}, but this version of distill_jax reads the formats "
      f"{FORMATS[0]} to {FORMATS[-1]}. Record again."
    )
  try:
    fields["extents"] = tuple(fields["extents"])
    fields["shards"] = tuple(Shard(**s) for s in fields["shards"])
    if taps := fields["taps"]:
      taps = {**taps, "kind": taps.get("of", "hidden"), "layers": tuple(taps["layers"])}
      fields["taps"] = Taps(**{k: v for k, v in taps.items() if k != "of"})
    if version == 1:  # only tasks lack the digest of a tokenizer
      fields["labels"] = not fields["tokenizer"]
    return Manifest(**fields)
  except (TypeError, KeyError, AttributeError) as e:
    raise InputError(
      f"{path} is not a complete manifest ({e}). Delete it and run `record` again."
    ) from e


def with_shards_of(folder: str, want: Manifest) -> Manifest:
  """Returns the manifest of a run with the size of the shards that are in the folder, if any.

  So a store is resumed with the shards that it has when records.tokens_per_shard was changed.
  """
  if (found := find(folder)) is None:
    return want
  return dataclasses.replace(want, sequences_per_shard=found.sequences_per_shard)


def require_same(want: Manifest, found: Manifest, folder: str) -> None:
  """Raises InputError if two recordings cannot share a folder.

  Args:
    want: The manifest of this run.
    found: The manifest in the folder.
    folder: The folder.
  """
  if want.format_version != found.format_version:
    raise InputError(
      f"{folder} holds records of format {found.format_version}, but this run writes format "
      f"{want.format_version}. Train on the existing records, or record into another folder."
    )
  defaults = {"smoothing": False, "heldout_fraction": 0.0, "retargeted": {}, "rollout": {}}
  a, b = ({**defaults, **m.identity} for m in (want, found))
  for key, planned in a.items():
    if planned != b[key]:
      if isinstance(planned, dict) and isinstance(b[key], dict):
        sub = next(k for k in {**planned, **b[key]} if planned.get(k) != b[key].get(k))
        key, planned, recorded = f"{key}.{sub}", planned.get(sub), b[key].get(sub)
      else:
        recorded = b[key]
      raise InputError(
        f"{folder} holds records with {key}={recorded!r}, but this run has {key}={planned!r}. "
        "Choose another folder, or use the settings of the first recording."
      )


def _plain(x: JsonObject) -> JsonObject:
  """Returns a value after a JSON round trip, in which tuples become lists."""
  return json.loads(json.dumps(x))
