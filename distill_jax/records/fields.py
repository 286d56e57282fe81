"""The fields of a record: one table that sampler, recorder, codec, loader and preflight share.

A quantity has one name. As an array it carries its axes, which depend on where it is:

  device   batch first, as the recorder returns it       ids_BTN
  record   one sequence, as it is written                ids_TN
  read     the same, as a store returns it               ids_TK
  batch    the attribute of types.Targets                ids_BTK
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from distill_jax.errors import InputError

Record = dict[str, np.ndarray]  # one sequence, or one example of a task, by field
KINDS = ("sampled", "topk", "dense", "text")
TEXT = ("tokens_T", "segments_T", "mask_T")  # of packed text, beside the teacher's targets
TASK = ("labels_T", "mask_T")  # of an example of a task
SMOOTHING = "smoothing_T"  # label smoothing, where documents or examples have their own
UNTAUGHT = (*TEXT, *TASK, SMOOTHING)  # fields of a record that no teacher computed


@dataclasses.dataclass(frozen=True)
class Field:
  """One quantity that a teacher's record holds for each position.

  Attributes:
    name: its name, as `sampler.summarise` returns it.
    dtype: numpy dtype of its numbers.
    axes: axes of one record that is written; "" for what is derived when it is read.
    read_axes: axes of one record that is read.
    empty: value of unused entries.
    class_ids: its numbers are classes, i.e. rows of the head.
    scalar: stored as one float16 a position.
  """

  name: str
  dtype: type[np.generic]
  axes: str
  read_axes: str
  empty: float = 0.0
  class_ids: bool = False
  scalar: bool = False

  @property
  def device(self) -> str:
    return f"{self.name}_B{self.axes}"

  @property
  def record(self) -> str:
    return f"{self.name}_{self.axes}"

  @property
  def read(self) -> str:
    return f"{self.name}_{self.read_axes}"

  @property
  def batch(self) -> str:
    return f"{self.name}_B{self.read_axes}"


IDS = Field("ids", np.int32, "TN", "TK", class_ids=True)
LOGP = Field("logp", np.float32, "TN", "TK", empty=-np.inf)
WEIGHT = Field("weight", np.float32, "", "TK")  # counts of the sampled ids over n
ENTROPY = Field("entropy", np.float32, "T", "T", scalar=True)
LABEL_LOGP = Field("label_logp", np.float32, "T", "T", scalar=True)
ARGMAX = Field("argmax", np.int32, "T", "T", class_ids=True)
TAPS = Field("taps", np.int8, "PTD", "PTD")
TAPS_SCALE = Field("taps_scale", np.float32, "PT", "PT")

PREDICTED = (IDS, LOGP, WEIGHT, ENTROPY, LABEL_LOGP, ARGMAX)  # of the teacher's distribution
TAPPED = (TAPS, TAPS_SCALE)  # of its features
SCALARS = (LABEL_LOGP, ENTROPY)  # in the order of the stored field "scalars"
CLASS_IDS = ("labels_T", *(f.read for f in PREDICTED if f.class_ids))


@dataclasses.dataclass(frozen=True)
class RecordSpec:
  """What a record holds, the same for every record of a store.

  Attributes:
    kind: "sampled" (counts of n points), "topk" (log-probabilities, at most n entries),
      "dense" (log-probabilities of all n classes) or "text" (no targets).
    n: points or entries a position; 0 for text.
    vocab_size: ids are below it; at most 2^20.
    logp: for "sampled", true log-probabilities are kept beside the counts.
    entropy: the teacher's entropy is kept (a dump from elsewhere may not have it).
  """

  kind: str
  n: int
  vocab_size: int
  logp: bool = False
  entropy: bool = True

  def __post_init__(self) -> None:
    if self.kind not in KINDS:
      raise InputError(f"records kind is {self.kind!r}; expected one of {KINDS}")
    if not 1 <= self.vocab_size <= 1 << 20:
      raise InputError(f"vocab_size is {self.vocab_size}; records hold from 1 to {1 << 20} ids")
    low = 0 if self.kind == "text" else 1
    if not low <= self.n < 1 << 15:
      raise InputError(
        f"n is {self.n}; kind {self.kind!r} takes from {low} to {(1 << 15) - 1}"
        + (" classes; record topk instead" if self.kind == "dense" else "")
      )

  @property
  def has_logp(self) -> bool:
    return self.kind in ("topk", "dense") or (self.kind == "sampled" and self.logp)

  @functools.cached_property
  def recorded(self) -> tuple[Field, ...]:
    """The fields of the teacher's distribution in a record that is written."""
    if self.kind == "text":
      return ()
    absent = {WEIGHT} | ({LOGP} if not self.has_logp else set())
    absent |= {ENTROPY} if not self.entropy else set()
    return tuple(f for f in PREDICTED if f not in absent)

  @functools.cached_property
  def scalars(self) -> tuple[Field, ...]:
    """The fields stored as one number per position, in storage order."""
    return tuple(f for f in SCALARS if f in self.recorded)


def placeholder(
  spec: RecordSpec, positions: int, taps: int = 0, taps_width: int = 0
) -> dict[str, np.ndarray]:
  """Returns valid made-up targets of one sequence, under the names of a record.

  Args:
    spec: of the store.
    positions: of the sequence, T.
    taps: tapped layers, P; 0 for none.
    taps_width: numbers of a tapped vector, D.
  """
  sizes = {"T": positions, "N": spec.n, "P": taps, "D": taps_width}
  record = {
    f.record: np.zeros([sizes[axis] for axis in f.axes], f.dtype)
    for f in (*spec.recorded, *(TAPPED if taps else ()))
  }
  if spec.kind in ("topk", "dense"):  # whose ids are distinct
    record[IDS.record] += np.arange(spec.n, dtype=IDS.dtype)
  return record
