"""Tasks as record, train and evaluate see them: rows, as a corpus gives them.

A store holds of an example its labels and what the teacher said. What a model reads is made
again from the task's own data by the row's number, so that a row costs little and teacher
and student see the same augmented view of it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.config import Config
from distill_jax.errors import InputError
from distill_jax.records.fields import CLASS_IDS, UNTAUGHT
from distill_jax.records.manifest import Manifest, without_targets
from distill_jax.records.multi_teacher import MultiTeacherStore
from distill_jax.records.recorder import Corpus
from distill_jax.types import IN_BATCH_CLASSES, Batch

Row = dict[str, np.ndarray]
# Keys of a task that are in no digest: where its data lies, which has one of its own, and how much.
WHERE = ("path", "train", "heldout", "tokenizer", "on_bad", "views")


class Rows(Sequence):
  """Every view of every example: row n is view n // N of example n % N, of N examples.

  What an augmentation draws depends on (task.seed, n) alone.

  Attributes:
    task, source: see distill_jax/tasks.
    digest: of the data, the task and its augmentations, but for how many views there are.
  """

  def __init__(
    self, task: Any, source: Any, augmentations: Sequence[Any] = (), views: int = 1, most: int = 0
  ):
    """Args: most, rows that there are at the most; 0: all."""
    self.task, self.source = task, source
    self._augmentations, self._len = augmentations, len(source) * views
    self._len = min(self._len, most or self._len)
    fields = [dataclasses.asdict(x) for x in (task, *augmentations)]
    fields[0] = {key: value for key, value in fields[0].items() if key not in WHERE}
    text = json.dumps([type(task).__module__, fields, source.digest], sort_keys=True)
    self.digest = hashlib.sha256(text.encode()).hexdigest()

  def __len__(self) -> int:
    return self._len

  @property
  def manifest(self) -> Manifest:
    """The manifest of the labels alone, where no teacher is recorded."""
    return without_targets(
      vocab_size=self.source.classes,
      positions=self.source.positions,
      sequences=len(self),
      corpus=self.digest,
    )

  def __getitem__(self, index: Any) -> Any:
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    n = operator.index(index)
    if not 0 <= n < len(self):
      raise IndexError(f"row {n} of {len(self)}")
    example = self.source[n % len(self.source)]
    if self._augmentations:
      rng = np.random.default_rng([self.task.seed, n])
      other = lambda: self.source[int(rng.integers(len(self.source)))]
      for augmentation in self._augmentations:
        example = augmentation(rng, example, other)
    example = dict(example)
    labels_T = example.pop("labels_T")
    return {"tokens_T": labels_T, "segments_T": np.ones_like(labels_T), **example}


class RecordedTask(Sequence):
  """A random-access source as Joined is, of a task's rows beside what was recorded of them.

  Attributes:
    manifest, others: as of Joined; of a task without records, what the caller gives.
    rows: the task's.
    part: the rows of a head of several tasks that are this one's, or None.
  """

  def __init__(
    self,
    rows: Rows,
    said: MultiTeacherStore | None,
    manifest: Any = None,
    part: range | None = None,
  ):
    """Raises: InputError: the records are of another task, other data, or fewer views."""
    if said is not None and said.manifest.corpus != rows.digest:
      raise InputError(
        f"the records in {said.folder} are of other data or another task or augmentation (digest "
        f"{said.manifest.corpus[:12]}) than this config's ({rows.digest[:12]}); record again"
      )
    if said is not None and len(said) != len(rows):
      raise InputError(
        f"the records in {said.folder} are of {len(said)} rows and the task has {len(rows)}; set "
        "its views as they were recorded"
      )
    self.rows, self._said, self.manifest, self.part = rows, said, manifest, part
    self.others = said.others if said else {}
    self.digests = said.digests if said else [rows.digest]

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: Any) -> Any:
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    row = dict(self.rows[index])
    if self._said is not None:
      said = self._said[index]
      if not all(np.array_equal(said[name], row[name]) for name in ("tokens_T", "mask_T")):
        raise InputError(
          f"row {operator.index(index)} has other labels than when {self._said.folder} was "
          "recorded; the task's data has changed, so record again"
        )
      row |= {name: x for name, x in said.items() if name not in UNTAUGHT}
    return row if self.part is None else _shifted(row, self.part)


def _shifted(row: Row, part: range) -> Row:
  """A row whose classes are those rows of a head that several tasks share."""
  ids = ("tokens_T", *CLASS_IDS)
  own = {n: x + part.start for n, x in row.items() if n.rpartition("/")[2] in ids}
  among = np.tile(np.array([part.start, part.stop], np.int32), (len(row["tokens_T"]), 1))
  return row | own | {"rows_T2": among}


def open_rows(config: Config, name: str, split: str, pretrained: Any, most: int = 0) -> Rows:
  """The rows of one task; of what is held out, each example once and as it is.

  Args:
    came: the model that reads them, for its tokenizer (hub.pretrained.Pretrained), or None.
    most: rows at the most; 0: all.

  Raises:
    InputError: an augmentation that the config does not have, or what the task itself refuses.
  """
  task = config.tasks[name]
  source = task.open(split, pretrained)
  if split != "train":
    return Rows(task, source, most=most)
  if lost := [n for n in task.augment if n not in config.augmentations]:
    raise InputError(
      f"tasks.{name}.augment names {lost[0]!r} and augmentations holds "
      f"{', '.join(config.augmentations) or 'none'}; add it there"
    )
  if task.views < 1:
    raise InputError(f"tasks.{name}.views is {task.views}; it is at least 1")
  return Rows(task, source, [config.augmentations[n] for n in task.augment], task.views, most)


def chosen(config: Config) -> Config:
  """The config with that one of its tasks that is recorded."""
  name = config.records.task or (next(iter(config.tasks)) if len(config.tasks) == 1 else "")
  if name not in config.tasks:
    raise InputError(
      f"records.task is {config.records.task!r} and tasks holds {', '.join(config.tasks)}; name one"
    )
  return dataclasses.replace(config, tasks={name: config.tasks[name]})


def open_corpus(config: Config, pretrained: Any, teacher: Any) -> Corpus:
  """The examples of the one task that is recorded.

  Args:
    pretrained: the teacher's source (hub.pretrained.Pretrained), or None.
    teacher: the teacher's architecture config, which must have a place for all tasks; None
      where no teacher is recorded.

  Raises:
    InputError: the task cannot be recorded, or the teacher cannot read it.
  """
  (name,) = chosen(config).tasks
  every = {n: open_rows(config, n, "train", pretrained) for n in config.tasks}
  rows, part = every[name], parts(every)[name]
  if rows.source.classes == IN_BATCH_CLASSES:
    raise InputError(
      f"task {name} is contrastive; its targets within a batch cannot be recorded. Set "
      "train.online=True"
    )
  if teacher is not None:
    check(every, teacher)
  first = part.start if part else 0
  return Corpus(rows, rows.source.positions, rows.source.classes, "", rows.digest, first)


def parts(rows: Mapping[str, Rows]) -> dict[str, range | None]:
  """The rows of the head that are each task's: one after another; None where there is one."""
  if len(rows) == 1:
    return dict.fromkeys(rows)
  found: dict[str, range | None] = {}
  first = 0
  for name, of in rows.items():
    found[name] = range(first, first + of.source.classes)
    first += of.source.classes
  return found


def check(rows: Mapping[str, Rows], shape: Any) -> None:
  """Refuses a model that has no place for all classes, or cannot read the tasks."""
  for of in rows.values():
    of.task.check(shape)
  total = sum(of.source.classes for of in rows.values())
  if total > shape.head_rows:
    raise InputError(
      f"the tasks {', '.join(rows)} have {total} classes and the model's head "
      f"{shape.head_rows} rows; set changes={{'num_labels': {total}}} of the model"
    )
  if len(rows) > 1 and any(of.source.classes == IN_BATCH_CLASSES for of in rows.values()):
    raise InputError(f"the tasks {', '.join(rows)} are several, and one has pairs; train it alone")
  kinds = {type(of.task) for of in rows.values()}
  sizes = {of.source.positions for of in rows.values()}
  if len(kinds) > 1 or len(sizes) > 1:
    raise InputError(
      f"tasks {', '.join(rows)} are of {len(kinds)} kinds with {sorted(sizes)} labels an example; "
      "tasks that are trained together are of one kind"
    )


def reader(config: Config) -> Callable[[Callable[[str], Any]], Batch] | None:
  """What makes a batch, without targets, of its rows' fields; None: they are packed text."""
  if not config.tasks:
    return None
  first = next(iter(config.tasks.values()))
  return functools.partial(_read, first, len(config.tasks) > 1)


def _read(task: Any, several: bool, stack: Callable[[str], Any]) -> Batch:
  among = stack("rows_T2") if several else None
  labels, mask = stack("tokens_T"), stack("mask_T")
  return Batch(task.inputs(stack), labels, mask, class_range_BT2=among, valid_BS=task.valid(stack))
