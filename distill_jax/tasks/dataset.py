"""The examples of a task for record, train and evaluate, with what a teacher recorded of them.

A store holds only an example's labels and the teacher's targets. The model's inputs are read
again from the task's own data by the example's number, so that a record is small, and teacher
and student see the same augmented view.
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

from distill_jax.augmentations import Augmentation
from distill_jax.config import Config
from distill_jax.errors import InputError
from distill_jax.hub.pretrained import Pretrained
from distill_jax.models import FamilyConfig
from distill_jax.records.fields import CLASS_IDS, TASK, UNTAUGHT, Record
from distill_jax.records.manifest import Manifest, without_targets
from distill_jax.records.multi_teacher import MultiTeacherStore
from distill_jax.records.recorder import Corpus
from distill_jax.tasks._base import Stack, Task, TaskSource
from distill_jax.types import IN_BATCH_CLASSES, Batch

# Fields of a task that are not in its digest: paths, whose data has a digest of its own, and how
# many examples there are.
NOT_IN_DIGEST = ("path", "train", "heldout", "tokenizer", "on_bad", "views")


class TaskExamples(Sequence):
  """Every view of every example: row n is view n // N of example n % N, of N examples.

  What an augmentation draws depends on (task.seed, n) alone.

  Args:
    task: what is read and predicted.
    source: its examples.
    augmentations: change an example, in this order.
    views: augmented views of each example.
    max_rows: keeps this many rows at most; 0 keeps all.

  Attributes:
    task, source: as given.
    digest: of the data, the task and its augmentations, but not of the number of views.
  """

  def __init__(
    self,
    task: Task,
    source: TaskSource,
    augmentations: Sequence[Augmentation] = (),
    views: int = 1,
    max_rows: int = 0,
  ):
    self.task, self.source = task, source
    self._augmentations, self._len = augmentations, len(source) * views
    self._len = min(self._len, max_rows or self._len)
    entries: tuple[Any, ...] = (task, *augmentations)  # dataclasses
    fields = [dataclasses.asdict(entry) for entry in entries]
    fields[0] = {key: value for key, value in fields[0].items() if key not in NOT_IN_DIGEST}
    text = json.dumps([type(task).__module__, fields, source.digest], sort_keys=True)
    self.digest = hashlib.sha256(text.encode()).hexdigest()

  @property
  def manifest(self) -> Manifest:
    """The manifest of the labels alone, where no teacher is recorded."""
    return without_targets(
      vocab_size=self.source.classes,
      positions=self.source.positions,
      sequences=len(self),
      corpus=self.digest,
    )

  def __len__(self) -> int:
    return self._len

  def __getitem__(self, index: Any) -> Any:
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    n = operator.index(index)
    if not 0 <= n < len(self):
      raise IndexError(f"row {n} of {len(self)}")
    example = self.source[n % len(self.source)]
    if self._augmentations:
      rng = np.random.default_rng([self.task.seed, n])

      def another() -> Record:
        return self.source[int(rng.integers(len(self.source)))]

      for augmentation in self._augmentations:
        example = augmentation(rng, example, another)
    return dict(example)


class RecordedTask(Sequence):
  """A task's examples, each with what was recorded of it: a random-access source of rows.

  Args:
    examples: of the task.
    records: of a teacher, or of several; None for labels alone.
    class_range: the task's rows of a head that several tasks share; None if it has its own.
    manifest: of records that do not exist yet, for preflight.

  Attributes:
    examples, class_range: as given.
    manifest: of the records; without any, of the labels.
    others: the stores of further teachers, by name; see MultiTeacherStore.
    digests: of all that a row is made of.

  Raises:
    InputError: the records are of another task, other data, or fewer views.
  """

  def __init__(
    self,
    examples: TaskExamples,
    records: MultiTeacherStore | None = None,
    class_range: range | None = None,
    manifest: Manifest | None = None,
  ):
    if records is not None and records.manifest.corpus != examples.digest:
      raise InputError(
        f"the records in {records.folder} are of other data or another task or augmentation "
        f"(digest {records.manifest.corpus[:12]}) than this config's ({examples.digest[:12]}); "
        "record again"
      )
    if records is not None and len(records) != len(examples):
      raise InputError(
        f"the records in {records.folder} are of {len(records)} rows and the task has "
        f"{len(examples)}; set its views as they were recorded"
      )
    self.examples, self._records, self.class_range = examples, records, class_range
    self.manifest = manifest or (records.manifest if records else examples.manifest)
    self.others = records.others if records else {}
    self.digests = records.digests if records else [examples.digest]

  def __len__(self) -> int:
    return len(self.examples)

  def __getitem__(self, index: Any) -> Any:
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    row = dict(self.examples[index])
    if self._records is not None:
      record = self._records[index]
      if not all(np.array_equal(record[name], row[name]) for name in TASK):
        raise InputError(
          f"row {operator.index(index)} has other labels than when {self._records.folder} was "
          "recorded; the task's data has changed, so record again"
        )
      row |= {name: x for name, x in record.items() if name not in UNTAUGHT}
    return row if self.class_range is None else _in_shared_head(row, self.class_range)


def _in_shared_head(row: Record, classes: range) -> Record:
  """Returns a row whose class ids are these rows of the head, and that says so."""
  shifted = {n: x + classes.start for n, x in row.items() if n.rpartition("/")[2] in CLASS_IDS}
  range_2 = np.array([classes.start, classes.stop], np.int32)
  return row | shifted | {"class_range_T2": np.tile(range_2, (len(row["labels_T"]), 1))}


def open_examples(
  config: Config, name: str, split: str, pretrained: Pretrained | None, max_rows: int = 0
) -> TaskExamples:
  """Opens the examples of one task; held-out ones come once each and are not augmented.

  Args:
    config: with the task and its augmentations.
    name: of the task.
    split: "train" or "heldout".
    pretrained: the source of the model that reads them, for its tokenizer, or None.
    max_rows: keeps this many rows at most; 0 keeps all.

  Raises:
    InputError: an augmentation that the config does not have, or what the task itself refuses.
  """
  task = config.tasks[name]
  source = task.open(split, pretrained)
  if split != "train":
    return TaskExamples(task, source, max_rows=max_rows)
  if missing := [n for n in task.augment if n not in config.augmentations]:
    raise InputError(
      f"tasks.{name}.augment names {missing[0]!r} and augmentations holds "
      f"{', '.join(config.augmentations) or 'none'}; add it there"
    )
  if task.views < 1:
    raise InputError(f"tasks.{name}.views is {task.views}; it is at least 1")
  augmentations = [config.augmentations[n] for n in task.augment]
  return TaskExamples(task, source, augmentations, task.views, max_rows)


def recorded_task(config: Config) -> str:
  """Returns the name of the task that is recorded."""
  name = config.records.task or (next(iter(config.tasks)) if len(config.tasks) == 1 else "")
  if name not in config.tasks:
    raise InputError(
      f"records.task is {config.records.task!r} and tasks holds {', '.join(config.tasks)}; name one"
    )
  return name


def open_corpus(
  config: Config, pretrained: Pretrained | None, teacher: FamilyConfig | None
) -> Corpus:
  """Opens the examples of the one task that is recorded.

  Args:
    config: with the tasks.
    pretrained: the teacher's source, or None.
    teacher: the teacher's architecture config, which must have a place for all tasks; None
      where no teacher is recorded.

  Raises:
    InputError: the task cannot be recorded, or the teacher cannot read it.
  """
  name = recorded_task(config)
  every = {n: open_examples(config, n, "train", pretrained) for n in config.tasks}
  examples, classes = every[name], class_ranges(every)[name]
  source = examples.source
  if source.classes == IN_BATCH_CLASSES:
    raise InputError(
      f"task {name} is contrastive; its targets within a batch cannot be recorded. Set "
      "train.online=True"
    )
  if teacher is not None:
    check_model(every, teacher)
  first = classes.start if classes else 0
  return Corpus(examples, source.positions, source.classes, "", examples.digest, first)


def class_ranges(examples: Mapping[str, TaskExamples]) -> dict[str, range | None]:
  """Returns each task's rows of the head, one task after another; None if there is one task."""
  if len(examples) == 1:
    return dict.fromkeys(examples)
  ranges: dict[str, range | None] = {}
  first = 0
  for name, task_examples in examples.items():
    ranges[name] = range(first, first + task_examples.source.classes)
    first += task_examples.source.classes
  return ranges


def check_model(examples: Mapping[str, TaskExamples], model_config: FamilyConfig) -> None:
  """Refuses a model whose head is too small for all classes, or that cannot read the tasks."""
  for task_examples in examples.values():
    task_examples.task.check(model_config)
  sources = [task_examples.source for task_examples in examples.values()]
  total = sum(source.classes for source in sources)
  if total > model_config.head_rows:
    raise InputError(
      f"the tasks {', '.join(examples)} have {total} classes and the model's head "
      f"{model_config.head_rows} rows; set changes={{'num_labels': {total}}} of the model"
    )
  if len(sources) > 1 and any(source.classes == IN_BATCH_CLASSES for source in sources):
    raise InputError(
      f"the tasks {', '.join(examples)} are several, and one has pairs; train it alone"
    )
  kinds = {type(task_examples.task) for task_examples in examples.values()}
  sizes = {source.positions for source in sources}
  if len(kinds) > 1 or len(sizes) > 1:
    raise InputError(
      f"tasks {', '.join(examples)} are of {len(kinds)} kinds with {sorted(sizes)} labels an "
      "example; tasks that are trained together are of one kind"
    )


def reader(tasks: Mapping[str, Task]) -> Callable[[Stack], Batch] | None:
  """Returns what makes a batch, without targets, of its rows' fields; None for packed text.

  Args:
    tasks: those that the rows belong to, all of one kind.
  """
  if not tasks:
    return None
  return functools.partial(_read, next(iter(tasks.values())), len(tasks) > 1)


def _read(task: Task, several: bool, stack: Stack) -> Batch:
  class_range: Any = stack("class_range_T2") if several else None
  labels: Any = stack("labels_T")
  mask: Any = stack("mask_T")
  valid: Any = task.valid(stack)
  return Batch(task.inputs(stack), labels, mask, class_range_BT2=class_range, valid_BS=valid)
