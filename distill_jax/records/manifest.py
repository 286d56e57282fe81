"""What a store of records is: made once, checked by everything that touches the folder."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from distill_jax.errors import InputError
from distill_jax.records.fields import RecordSpec
from distill_jax.runtime import json_io
from distill_jax.runtime.atomic_io import atomic_write

if TYPE_CHECKING:  # reading a store needs no jax
  from distill_jax.types import JsonObject

FORMAT = 2  # of stores of tasks and of kind "dense"; all others are still of format 1
FORMATS = (1, 2)
NAME = "manifest.json"
# Where the mass outside the entries goes, by kind; the other kinds miss none in expectation.
CONVENTIONS = {"topk": ("tail_bucket", "renormalise"), "dense": ("renormalise",)}


@dataclasses.dataclass(frozen=True)
class Taps:
  """Features of some layers, kept beside the targets.

  Attributes:
    layers: the layers, in the order of the P axis.
    width: numbers a vector, after the projection.
    seed: of the fixed random projection (taps.projection), or None without one.
    kind: "hidden", the layers' outputs, or "qkv", their queries, keys and values end to end;
      the file calls it "of".
  """

  layers: tuple[int, ...]
  width: int
  seed: int | None = None
  kind: str = "hidden"


@dataclasses.dataclass(frozen=True)
class Shard:
  """One finished shard: sequences first .. first + count - 1."""

  name: str
  first: int
  count: int
  bytes: int
  sha256: str
  tokens: int  # positions that are not padding
  targets: int  # positions with targets (mask_T set)
  entries: int
  fields: dict[str, int]  # payload bytes by field


@dataclasses.dataclass(frozen=True)
class Manifest:
  """Everything a reader must know before the first record.

  Attributes:
    kind, n, logp, entropy: see fields.RecordSpec.
    vocab_size: of the tokenizer; ids are below it.
    seq_len: tokens a sequence.
    teacher: {"name", "config", "digest"}; {} for kind "text" without one.
    tokenizer, corpus: their digests.
    sequences_per_shard: of every shard but the last of each extent.
    extents: sequences recorded by each run that made the store longer; a run gives the one
      total it wants, as `extents=(total,)`.
    missing_mass: where the mass outside the entries goes: of topk "tail_bucket" or
      "renormalise"; of dense "renormalise", which makes up for float16; "none" for kinds that
      miss nothing in expectation.
    nucleus: topk entries are cut where they hold this mass; 1 is no cut.
    temperature: of the recorded distribution.
    taps: hidden states kept, or None.
    smoothing: each document has its own label smoothing.
    labels: records hold labels_T, of the examples of a task, and not packed tokens.
    format_version: see `format_of`.
    shards: finished shards, in order.
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
  format_version: int = 1
  shards: tuple[Shard, ...] = ()

  def __post_init__(self):
    RecordSpec(self.kind, self.n, self.vocab_size, self.logp, self.entropy)
    if self.kind == "dense" and self.n != self.vocab_size:
      raise InputError(
        f"n is {self.n} for kind 'dense' of {self.vocab_size} classes; it records all of them"
      )
    conventions = CONVENTIONS.get(self.kind, ("none",))
    if self.missing_mass not in conventions:
      raise InputError(
        f"missing_mass is {self.missing_mass!r} for kind {self.kind!r}; expected "
        f"{' or '.join(conventions)}"
      )
    if self.temperature != 1.0 and self.kind == "dense":
      raise InputError(
        f"temperature is {self.temperature} for kind 'dense'; expected 1. Losses apply their own "
        "temperature to dense records"
      )
    if self.temperature != 1.0 and self.missing_mass == "renormalise":
      raise InputError(
        f"temperature is {self.temperature} over renormalised top-k records, which does not "
        "define the mass left out; record at temperature 1 or with tail_bucket"
      )
    if self.sequences_per_shard < 1 or self.seq_len < 1 or min(self.extents, default=0) < 1:
      raise InputError(
        f"sequences_per_shard={self.sequences_per_shard}, seq_len={self.seq_len}, extents="
        f"{self.extents}: each is at least 1; an empty corpus makes no records"
      )

  @functools.cached_property
  def spec(self) -> RecordSpec:
    return RecordSpec(self.kind, self.n, self.vocab_size, self.logp, self.entropy)

  @property
  def total(self) -> int:
    """Sequences in all, finished or not."""
    return sum(self.extents)

  @property
  def ranges(self) -> list[range]:
    """The sequences of every shard, by shard number."""
    out, first = [], 0
    for extent in self.extents:
      last = first + extent
      for start in range(first, last, self.sequences_per_shard):
        out.append(range(start, min(start + self.sequences_per_shard, last)))
      first = last
    return out

  @property
  def identity(self) -> JsonObject:
    """All that two runs must agree on to write into one folder."""
    without = ["extents", "shards"] + ["smoothing"] * (not self.smoothing)  # older than it is
    return {k: v for k, v in self._json().items() if k not in without}

  def _json(self) -> JsonObject:
    """All fields as the file spells them."""
    fields = _plain(dataclasses.asdict(self))
    if self.format_version == 1:  # which knows no labels: those of a task are under "tokens"
      del fields["labels"]
    if fields["taps"]:
      fields["taps"]["of"] = fields["taps"].pop("kind")
    return fields

  @property
  def ids_name(self) -> str:
    """The field of a record that holds its tokens, or its labels."""
    return "labels_T" if self.labels else "tokens_T"

  @functools.cached_property
  def tag(self) -> bytes:
    """Eight bytes of the identity's digest: every record carries them, and asks for them."""
    text = json.dumps(self.identity, sort_keys=True)
    return hashlib.sha256(text.encode()).digest()[:8]

  @functools.cached_property
  def digest(self) -> str:
    """sha256, in hex, of what the store holds: another if a shard differs, or one is added."""
    text = json.dumps({**self.identity, "shards": [s.sha256 for s in self.shards]}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

  def save(self, folder: Path) -> None:
    text = json.dumps(self._json(), indent=1)
    atomic_write(folder / NAME, text + "\n")


def format_of(kind: str, labels: bool) -> int:
  """The format of a new store.

  Format 2 adds labels_T (format 1 stores the labels of a task as tokens) and kind "dense"
  (format 1 stores it as renormalised topk). Others stay format 1, so that their bytes do.
  """
  return FORMAT if labels or kind == "dense" else 1


def without_targets(
  *, vocab_size: int, positions: int, sequences: int, corpus: str = ""
) -> Manifest:
  """The manifest of a task's labels that no teacher has recorded: no folder holds it.

  Args:
    vocab_size: classes of the task.
    positions: labels of an example.
    sequences: examples.
    corpus: digest of the data.
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
    format_version=FORMAT,
  )


def shard_name(number: int) -> str:
  """The file of shard `number`; tfds finds it by {SPLIT}-{SHARD_INDEX}.{FILEFORMAT}."""
  return f"records-{number:05d}.array_record"


def load(folder: str | os.PathLike) -> Manifest:
  """Reads the manifest of a folder.

  Raises:
    InputError: there is none, or it is not one this version reads.
  """
  path = Path(folder) / NAME
  try:
    fields = json_io.parse(path.read_bytes())
  except FileNotFoundError as e:
    raise InputError(f"{folder} holds no {NAME}; give a folder that `record` wrote") from e
  except (OSError, InputError) as e:
    why = str(e).rstrip(".")
    raise InputError(f"{path} cannot be read ({why}). Delete it and run `record` again.") from e
  version = fields.get("format_version") if isinstance(fields, dict) else None
  if version not in FORMATS:
    raise InputError(
      f"{path} has format {version!r}, this version reads {' and '.join(map(str, FORMATS))}; "
      "record again"
    )
  try:
    fields["extents"] = tuple(fields["extents"])
    fields["shards"] = tuple(Shard(**s) for s in fields["shards"])
    if taps := fields["taps"]:
      taps = {**taps, "kind": taps.get("of", "hidden"), "layers": tuple(taps["layers"])}
      fields["taps"] = Taps(**{k: v for k, v in taps.items() if k != "of"})
    if version == 1:  # text has a tokenizer, whose digest is never empty
      fields["labels"] = not fields["tokenizer"]
    return Manifest(**fields)
  except (TypeError, KeyError) as e:
    raise InputError(
      f"{path} is not a whole manifest ({e}); delete it and run `record` again"
    ) from e


def require_same(want: Manifest, found: Manifest, folder: Path) -> None:
  """Refuses to mix two recordings in one folder, naming both sides."""
  if want.format_version != found.format_version:
    raise InputError(
      f"{folder} holds records of format {found.format_version} and this run writes format "
      f"{want.format_version}; train on them as they are, or record into another folder"
    )
  a, b = ({"smoothing": False, **m.identity} for m in (want, found))
  for key, planned in a.items():
    if planned != b[key]:
      if isinstance(planned, dict) and isinstance(b[key], dict):
        sub = next(k for k in {**planned, **b[key]} if planned.get(k) != b[key].get(k))
        key, planned, recorded = f"{key}.{sub}", planned.get(sub), b[key].get(sub)
      else:
        recorded = b[key]
      raise InputError(
        f"{folder} holds records with {key}={recorded!r} and this run has {key}={planned!r}; "
        "choose another folder, or the settings of the first recording"
      )


def _plain(x: JsonObject) -> JsonObject:
  """Converts a value as a JSON round trip does: tuples become lists."""
  return json.loads(json.dumps(x))
