"""Checks that models can read the examples of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from distill_jax.errors import InputError
from distill_jax.models import FamilyConfig
from distill_jax.models.loading import ModelSource
from distill_jax.tasks._base import Task
from distill_jax.tasks._jsonl_task import JsonlTask
from distill_jax.types import IN_BATCH_CLASSES, TextConfig

if TYPE_CHECKING:
  from distill_jax.tasks.dataset import TaskExamples


def check_model(examples: Mapping[str, TaskExamples], model_config: FamilyConfig) -> None:
  """Checks that a model can be trained on tasks.

  Args:
    examples: The examples of each task, by name.
    model_config: The model's architecture config.

  Raises:
    InputError: The model cannot read a task, its head is too small for all classes, or the tasks
      cannot be trained together.
  """
  for task_examples in examples.values():
    task_examples.task.check(model_config)
  sources = [task_examples.source for task_examples in examples.values()]
  total = sum(source.classes for source in sources)
  if total > model_config.head_rows:
    raise InputError(
      f"The tasks {', '.join(examples)} have {total} classes, but the model's head has "
      f"{model_config.head_rows} rows. Set changes={{'num_labels': {total}}} of the model."
    )
  if rows := max(source.token_rows for source in sources):
    found = cast(TextConfig, model_config).vocab_size
    if rows > found:
      raise InputError(
        f"The texts of {', '.join(examples)} have the token {rows - 1}, but the model has {found} "
        "tokens. Use its own tokenizer."
      )
  if len(sources) > 1 and any(source.classes == IN_BATCH_CLASSES for source in sources):
    raise InputError(
      f"One of the tasks {', '.join(examples)} is contrastive and cannot be trained with other "
      "tasks. Train it alone."
    )
  kinds = {type(task_examples.task) for task_examples in examples.values()}
  sizes = {source.positions for source in sources}
  if len(kinds) > 1:
    raise InputError(
      f"The tasks {', '.join(examples)} are of {len(kinds)} kinds. Only tasks of one kind can be "
      "trained together."
    )
  if len(sizes) > 1:
    raise InputError(
      f"The tasks {', '.join(examples)} have {sorted(sizes)} labels per example. Only tasks with "
      "the same number of labels can be trained together."
    )


def check_tokenizer(
  tasks: Mapping[str, Task], student: ModelSource, name: str, teacher: ModelSource
) -> None:
  """Raises InputError if an online teacher has another tokenizer than the student of a task.

  Args:
    tasks: The tasks, by name. A key `tokenizer` is that of all models.
    student: The model to train.
    name: The teacher's name.
    teacher: The teacher.
  """
  if teacher.tokenizer in (None, student.tokenizer):  # the same files: they need not be parsed
    return
  for task_name, task in tasks.items():
    if not isinstance(task, JsonlTask) or task.tokenizer:
      continue
    ours = task.load_tokenizer(student.pretrained)
    theirs = task.load_tokenizer(teacher.pretrained)
    if ours.digest != theirs.digest:
      raise InputError(
        f"The task {task_name!r} has the tokens of {ours.where} (digest {ours.digest[:12]}), but "
        f"the online teacher {name!r} has {theirs.where} (digest {theirs.digest[:12]}). Set "
        f"tasks.{task_name}.tokenizer if both models have it, or train on the teacher's records."
      )
