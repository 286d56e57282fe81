"""The contract of a task and of its examples."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from distill_jax.generation.beam_search import Search
from distill_jax.hub.pretrained import Pretrained
from distill_jax.models import FamilyConfig
from distill_jax.tasks._model_configs import Seq2SeqConfig
from distill_jax.types import Images, ImageText, Inputs, JsonObject, SourceTarget

Example = dict[str, np.ndarray]
# Returns a field of every example of a batch, [B, ...], given the field's name.
Stack = Callable[[str], np.ndarray]


class TaskSource(Protocol):
  """The examples of one split, in an order that never changes.

  An example is a dict of arrays, each of one shape for all examples: the fields that the task's
  `inputs` asks for, `labels_T` int32 and `mask_T` bool, the labels that are trained on.
  """

  @property
  def classes(self) -> int:
    """The number of classes: the rows of a head that the labels name."""

  @property
  def positions(self) -> int:
    """The number of labels of an example, T."""

  @property
  def digest(self) -> str:
    """sha256, in hex, of the data and of all that decides how it is read."""

  def __len__(self) -> int:
    """Returns the number of examples."""

  def __getitem__(self, i: int) -> Example:
    """Returns example i."""


class Task(abc.ABC):
  """What a model reads and which labels it is trained on.

  Attributes:
    heldout: where the held-out examples are; "": a share of the others.
    augment: names in `augmentations` that change the training examples, in order.
    views: how many times each training example is seen, with other augmentations each time.
    seed: of the augmentations.
  """

  # Those of a task without keys of these names.
  heldout: str = ""
  augment: tuple[str, ...] = ()
  views: int = 1
  seed: int = 0

  @property
  def kind(self) -> str:
    """The task's name in the registry."""
    return type(self).__module__.rpartition(".")[2]

  @abc.abstractmethod
  def open(self, split: str, pretrained: Pretrained | None) -> TaskSource:
    """Opens the examples of a split.

    Args:
      split: "train" or "heldout".
      pretrained: the model that reads them, which may bring a tokenizer.
    """

  @abc.abstractmethod
  def inputs(self, stack: Stack) -> Inputs | Images | SourceTarget | ImageText:
    """Returns the model's inputs for a batch, as numpy arrays."""

  @abc.abstractmethod
  def check(self, config: FamilyConfig) -> None:
    """Refuses a family's Config whose model cannot read this task's inputs or has other outputs."""

  @abc.abstractmethod
  def hub_files(self, config: FamilyConfig) -> JsonObject:
    """Returns what the exported folder of a model holds for this task.

    Args:
      config: the family's Config.

    Returns:
      A tree of JSON by file name, such as {"config.json": {"id2label": ...}}; it is merged into a
      file that is there.
    """

  def valid(self, stack: Stack) -> np.ndarray | None:
    """Returns the positions of a batch's inputs that are not padding, for encoders.

    Returns:
      bool [B, S], or [B, 1] if there is no padding; None for decoders, whose features are compared
      at the labels.
    """
    del stack
    return None


class PseudoLabels(NamedTuple):
  """A model's outputs as training data.

  Attributes:
    lines: objects of a .jsonl file that the task reads, with the outputs as labels.
    left_out: how many outputs are not among them.
  """

  lines: list[JsonObject]
  left_out: int


class TextTask(Task):
  """A task of encoder-decoders, which write a text for each example.

  Attributes:
    batch_size: texts that are decoded at once.
  """

  batch_size: int

  @abc.abstractmethod
  def inputs(self, stack: Stack) -> SourceTarget:
    """Returns the model's inputs for a batch, as numpy arrays."""

  @abc.abstractmethod
  def search(self, config: Seq2SeqConfig, source: Any, generation: JsonObject) -> Search:
    """Returns how a model decodes its outputs.

    Args:
      config: the family's Config.
      source: this task's examples.
      generation: the model's generation_config.json.
    """

  @abc.abstractmethod
  def scores(self, outputs: Sequence[str], source: Any) -> dict[str, float]:
    """Returns metrics of the outputs for the first examples of a source, in their order."""

  @abc.abstractmethod
  def pseudo_labels(self, outputs: Sequence[str], source: Any) -> PseudoLabels:
    """Returns the outputs for all examples of a source, in their order, as training data."""
