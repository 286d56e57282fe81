"""The fields of a record, a table shared by sampler, recorder, codec, loader and preflight.

A quantity has one name. The name of an array adds its axes, which depend on the place:

  device   with the batch axis, from the recorder        ids_BTN
  record   one sequence, to be written                   ids_TN
  read     one sequence, from a store                    ids_TK
  batch    an attribute of types.Targets or Rollout      ids_BTK
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from distill_jax.errors import bad_value, check_choice
from distill_jax.records.options import KINDS

Record = dict[str, np.ndarray]  # one sequence, or one example of a task, by field
WITHOUT_ENTRIES = ("labels", "text")  # kinds whose records hold no entries
TEXT = ("tokens_T", "segments_T", "mask_T")  # fields of packed text
TASK = ("labels_T", "mask_T")  # fields of an example of a task
SMOOTHING = "smoothing_T"  # label smoothing, if documents or examples differ in it
# A record of kind "sampled" to be written may hold its distinct ids (ascending at a position),
# their counts, and their number at each position of mask_T, in place of ids_TN.
ENTRIES = ("entry_ids_E", "entry_counts_E", "entries_S")


@dataclasses.dataclass(frozen=True)
class Field:
  """One quantity of a teacher's record, with values at each position.

  Attributes:
    name: Its name in the output of `sampler.summarise`.
    dtype: Its numpy dtype.
    axes: Axes in a record to be written; "" for a quantity that is computed on reading.
    read_axes: Axes in a record that is read.
    empty: Value of unused entries.
    class_ids: True if its values are classes, i.e. rows of the head.
    scalar: True if it is stored as one float16 per position.
  """

  name: str
  dtype: type[np.generic]
  axes: str
  read_axes: str
  empty: float = 0.0
  class_ids: bool = False
  scalar: bool = False

  @functools.cached_property
  def device(self) -> str:
    """The name in a batch on the device."""
    return f"{self.name}_B{self.axes}"

  @functools.cached_property
  def record(self) -> str:
    """The name in a record to be written."""
    return f"{self.name}_{self.axes}"

  @functools.cached_property
  def read(self) -> str:
    """The name in a record that is read."""
    return f"{self.name}_{self.read_axes}"

  @functools.cached_property
  def batch(self) -> str:
    """The name as an attribute of types.Targets."""
    return f"{self.name}_B{self.read_axes}"


IDS = Field("ids", np.int32, "TN", "TK", class_ids=True)
LOGP = Field("logp", np.float32, "TN", "TK", empty=-np.inf)
WEIGHT = Field("weight", np.float32, "", "TK")  # counts of the sampled ids over n
ENTROPY = Field("entropy", np.float32, "T", "T", scalar=True)
LABEL_LOGP = Field("label_logp", np.float32, "T", "T", scalar=True)  # every kind but "text" has it
ARGMAX = Field("argmax", np.int32, "T", "T", class_ids=True)
BEHAVIOUR_LOGP = Field("behaviour_logp", np.float32, "T", "T", scalar=True)
REWARD = Field("reward", np.float32, "T", "T", scalar=True)
TAPS = Field("taps", np.int8, "PTD", "PTD")
TAPS_SCALE = Field("taps_scale", np.float32, "PT", "PT")

PREDICTED = (IDS, LOGP, WEIGHT, ENTROPY, LABEL_LOGP, ARGMAX)  # the teacher's distribution
TAPPED = (TAPS, TAPS_SCALE)  # the teacher's features
SCALARS = (LABEL_LOGP, ENTROPY)  # in the order of the stored field "scalars"
ROLLOUT = (BEHAVIOUR_LOGP, REWARD)  # of a text that a student wrote; see types.Rollout
# Fields of a record that are not from a teacher.
WITHOUT_TARGETS = (*TEXT, *TASK, SMOOTHING, *(f.record for f in ROLLOUT))
CLASS_IDS = ("labels_T", *(f.read for f in PREDICTED if f.class_ids))


def rollout_scalars(has_reward: bool) -> list[str]:
  """Returns the names of the stored numbers of a rollout: Manifest.rollout["scalars"]."""
  return [field.name for field in ROLLOUT if has_reward or field is not REWARD]


@dataclasses.dataclass(frozen=True)
class RecordSpec:
  """The contents of a record, equal for all records of a store.

  Attributes:
    kind: "sampled" (counts of n points), "topk" (log-probabilities of at most n entries), "dense"
      (log-probabilities of all n classes), "labels" (the labels' log-probabilities) or "text" (no
      targets).
    n: Number of points or entries per position; 0 for "labels" and "text".
    vocab_size: Number of tokens or classes; at most 2^20.
    logp: True if "sampled" records hold exact log-probabilities in addition to counts.
    entropy: True if the teacher's entropy is stored. Imported dumps may lack it.
    rollout: Names of the stored fields of ROLLOUT, in storage order; () for none.
  """

  kind: str
  n: int
  vocab_size: int
  logp: bool = False
  entropy: bool = True
  rollout: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    check_choice("records.kind", self.kind, KINDS, "Correct it")
    if not 1 <= self.vocab_size <= 1 << 20:
      raise bad_value(
        "vocab_size", self.vocab_size, f"from 1 to {1 << 20}", "Use another tokenizer"
      )
    low = 0 if self.kind in WITHOUT_ENTRIES else 1
    if not low <= self.n < 1 << 15:
      raise bad_value(
        "records.n",
        self.n,
        f"from {low} to {(1 << 15) - 1} for kind {self.kind!r}",
        "Set records.kind=topk" if self.kind == "dense" else "Correct it",
      )
    names = tuple(f.name for f in ROLLOUT)
    if self.rollout not in ((), names[:1], names):
      expected = f"[], {list(names[:1])} or {list(names)}"
      raise bad_value("rollout.scalars", [*self.rollout], expected, "Correct it")

  @property
  def has_logp(self) -> bool:
    """True if records hold log-probabilities of their entries."""
    return self.kind in ("topk", "dense") or (self.kind == "sampled" and self.logp)

  @functools.cached_property
  def recorded(self) -> tuple[Field, ...]:
    """Fields of the teacher's distribution in a record to be written."""
    if self.kind == "text":
      return ()
    absent = {WEIGHT} | ({LOGP} if not self.has_logp else set())
    absent |= {ENTROPY} if not self.entropy else set()
    absent |= {IDS, ARGMAX} if self.kind == "labels" else set()
    return tuple(f for f in PREDICTED if f not in absent)

  @functools.cached_property
  def scalars(self) -> tuple[Field, ...]:
    """Fields of the teacher that are stored as one number per position, in storage order."""
    return tuple(f for f in SCALARS if f in self.recorded)

  @functools.cached_property
  def rollout_scalars(self) -> tuple[Field, ...]:
    """Fields of a rollout that are stored as one number per position, in storage order."""
    return tuple(f for f in ROLLOUT if f.name in self.rollout)


def placeholder(
  spec: RecordSpec, positions: int, taps: int = 0, taps_width: int = 0
) -> dict[str, np.ndarray]:
  """Returns valid placeholder targets and rollout scalars of one sequence, by name in a record.

  Args:
    spec: The contents of a record.
    positions: Number of positions, T.
    taps: Number of tapped layers, P; 0 for none.
    taps_width: Width of a tapped vector, D.
  """
  sizes = {"T": positions, "N": spec.n, "P": taps, "D": taps_width}
  record = {
    f.record: np.zeros([sizes[axis] for axis in f.axes], f.dtype)
    for f in (*spec.recorded, *spec.rollout_scalars, *(TAPPED if taps else ()))
  }
  if spec.kind in ("topk", "dense"):  # ids are distinct
    record[IDS.record] += np.arange(spec.n, dtype=IDS.dtype)
  return record
