"""Examples of tasks for `record`, `train` and `evaluate`, joined with records of a teacher.

A store holds only the labels and the teacher's targets of an example. The model's inputs are
re-read from the task's data, and augmented views are regenerated from their index. Records are
therefore small, and teacher and student see the same view.
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
from distill_jax.errors import InputError, bad_value
from distill_jax.hub.pretrained import Pretrained
from distill_jax.models import FamilyConfig
from distill_jax.records.fields import CLASS_IDS, TASK, WITHOUT_TARGETS, Record
from distill_jax.records.manifest import Manifest, without_targets
from distill_jax.records.multi_teacher import MultiTeacherStore
from distill_jax.records.recording import Corpus
from distill_jax.records.stacked import Stacked
from distill_jax.tasks import model_checks
from distill_jax.tasks._base import Stack, Task, TaskSource
from distill_jax.types import IN_BATCH_CLASSES, Batch

# Task fields excluded from the digest: paths (the data has its own digest), the policy for bad
# examples, and the number of views.
NOT_IN_DIGEST = ("path", "train", "heldout", "tokenizer", "on_bad", "views")


class TaskExamples(Sequence):
  """All augmented views of all examples. Row n is view n // N of example n % N.

  Augmentations depend only on (task.seed, n).

  Args:
    task: The task.
    source: Its N examples.
    augmentations: Augmentations, applied in this order.
    views: Number of augmented views of each example.
    max_rows: Maximum number of rows; 0 for all.

  Attributes:
    task: The task.
    source: Its examples, before augmentation.
    digest: Digest of the data, the task and its augmentations; the number of views is not included.
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
    """The manifest of labels without a teacher's targets."""
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
  """A random-access source of a task's examples with their recorded targets.

  Args:
    examples: The examples.
    records: Records of one or more teachers; None for labels only.
    class_range: The task's rows of a head that tasks share; None if there is one task.
    manifest: Manifest of records that do not exist yet, for preflight.

  Attributes:
    examples: The examples.
    class_range: The task's rows of the head, or None.
    manifest: Manifest of the records, or of the labels without records.
    others: Stores of further teachers, by name; see MultiTeacherStore.
    digests: Digests of the stores, or of the examples without records.

  Raises:
    InputError: The records are of another task, other data, or another number of views.
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
        f"{records.folder} was recorded with another task, data or augmentation (digest "
        f"{records.manifest.corpus[:12]}) than this config's (digest {examples.digest[:12]}). "
        "Record again."
      )
    if records is not None and len(records) != len(examples):
      raise InputError(
        f"{records.folder} holds {len(records)} records, but the task has {len(examples)} rows. "
        "Set the task's `views` to the recorded number."
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
    return self.read_many([operator.index(index)])[0]

  def read_many(self, indices: Sequence[int]) -> Stacked:
    """Returns the rows of some indices."""
    arrays = Stacked.of([self.examples[i] for i in indices]).arrays
    if self._records is not None:
      records = self._records.read_many(indices).arrays
      for name in TASK if arrays else ():
        if (differs_B := (records[name] != arrays[name]).any(1)).any():
          raise InputError(
            f"The labels of row {indices[int(differs_B.argmax())]} differ from those recorded in "
            f"{self._records.folder}: the task's data has changed. Record again."
          )
      arrays |= {name: x for name, x in records.items() if name not in WITHOUT_TARGETS}
    if self.class_range is not None:
      arrays = _in_shared_head(arrays, self.class_range)
    return Stacked(arrays)


def _in_shared_head(arrays: Mapping[str, np.ndarray], classes: range) -> dict[str, np.ndarray]:
  """Returns rows with class ids shifted into the range `classes`, and with that range."""
  shifted = {n: x + classes.start for n, x in arrays.items() if n.rpartition("/")[2] in CLASS_IDS}
  range_2 = np.array([classes.start, classes.stop], np.int32)
  range_BT2 = np.tile(range_2, (*arrays["labels_T"].shape, 1))
  return {**arrays, **shifted, "class_range_T2": range_BT2}


def open_examples(
  config: Config, name: str, split: str, pretrained: Pretrained | None, max_rows: int = 0
) -> TaskExamples:
  """Opens the examples of one task. Held-out examples are not augmented.

  Args:
    config: The config, with the task and its augmentations.
    name: Name of the task in `tasks`.
    split: "train" or "heldout".
    pretrained: Checkpoint of the model that reads them, for its tokenizer, or None.
    max_rows: Maximum number of rows; 0 for all.

  Raises:
    InputError: An augmentation is unknown, `views` is below 1, or the task cannot be opened.
  """
  task = config.tasks[name]
  source = task.open(split, pretrained)
  if split != "train":
    return TaskExamples(task, source, max_rows=max_rows)
  if missing := [n for n in task.augment if n not in config.augmentations]:
    known = ", ".join(config.augmentations) or "none are defined"
    raise bad_value(
      f"tasks.{name}.augment",
      task.augment,
      f"names in `augmentations` ({known})",
      f"Add {missing[0]!r} to `augmentations`",
    )
  if task.views < 1:
    raise bad_value(f"tasks.{name}.views", task.views, "at least 1", "Raise it")
  augmentations = [config.augmentations[n] for n in task.augment]
  return TaskExamples(task, source, augmentations, task.views, max_rows)


def recorded_task(config: Config) -> str:
  """Returns the name of the task to record.

  Raises:
    InputError: The key `records.task` does not name a task, or is empty and there are several.
  """
  name = config.records.task or (next(iter(config.tasks)) if len(config.tasks) == 1 else "")
  if name not in config.tasks:
    expected = f"one of {', '.join(config.tasks)}"
    raise bad_value("records.task", config.records.task, expected, "Name the task to record")
  return name


def open_corpus(
  config: Config, pretrained: Pretrained | None, teacher: FamilyConfig | None
) -> Corpus:
  """Opens the examples of the task to record, of the split data.split.

  Args:
    config: The config, with the tasks. data.sequences limits the examples of the held-out split.
    pretrained: The teacher's checkpoint, or None.
    teacher: The teacher's architecture config, whose head must fit all tasks; None to record
      without a teacher.

  Raises:
    InputError: The task cannot be recorded, or the teacher does not fit it.
  """
  name = recorded_task(config)
  split, most = config.data.split, config.data.sequences if config.data.split != "train" else 0
  every = {n: open_examples(config, n, split, pretrained, most) for n in config.tasks}
  examples, classes = every[name], class_ranges(every)[name]
  source = examples.source
  if source.classes == IN_BATCH_CLASSES:
    raise InputError(
      f"The task {name!r} is contrastive: its targets depend on the batch and cannot be recorded. "
      "Set train.online=True."
    )
  if teacher is not None:
    model_checks.check_model(every, teacher)
  first = classes.start if classes else 0
  return Corpus(examples, source.positions, source.classes, "", examples.digest, first)


def class_ranges(examples: Mapping[str, TaskExamples]) -> dict[str, range | None]:
  """Returns the rows of the head of each task, in order; None for a single task."""
  if len(examples) == 1:
    return dict.fromkeys(examples)
  ranges: dict[str, range | None] = {}
  first = 0
  for name, task_examples in examples.items():
    ranges[name] = range(first, first + task_examples.source.classes)
    first += task_examples.source.classes
  return ranges


def reader(tasks: Mapping[str, Task]) -> Callable[[Stack], Batch] | None:
  """Returns a function from the fields of a batch to a Batch without targets.

  Args:
    tasks: The tasks of the rows, all of one kind.

  Returns:
    The function, as the argument `read` of `records.collate`; None without tasks, i.e. for packed
    text.
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
