"""Base classes of tasks, and the protocol of their examples."""

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
  """The examples of one split, in a fixed order.

  An example is a dict of arrays. It holds the fields that the task's `inputs` reads, `labels_T`
  (int32), and `mask_T` (bool, True at labels that are trained on). The shapes of a field are the
  same in all examples.
  """

  @property
  def classes(self) -> int:
    """Number of classes, i.e. of rows of the head."""

  @property
  def positions(self) -> int:
    """Number of labels of an example, T."""

  @property
  def token_rows(self) -> int:
    """Number of rows of the embedding table that the input tokens need; 0 without tokens."""

  @property
  def digest(self) -> str:
    """sha256, in hex, of the data and of everything that decides how it is read."""

  def __len__(self) -> int:
    """Returns the number of examples."""

  def __getitem__(self, i: int) -> Example:
    """Returns example i."""


class Task(abc.ABC):
  """The inputs of a model and its training labels."""

  # A subclass declares these as fields if they are its config keys.
  heldout: str = ""
  """Path of the held-out examples; "" holds out a fraction of the others."""
  augment: tuple[str, ...] = ()
  """Names in `augmentations`, applied to training examples in this order."""
  views: int = 1
  """Number of augmented views of each training example."""
  seed: int = 0
  """Random seed of the augmentations."""

  @property
  def kind(self) -> str:
    """Name of the task in the registry."""
    return type(self).__module__.rpartition(".")[2]

  @abc.abstractmethod
  def open(self, split: str, pretrained: Pretrained | None) -> TaskSource:
    """Opens the examples of a split.

    Args:
      split: "train" or "heldout".
      pretrained: The model's checkpoint, whose tokenizer is used by default; None without one.

    Raises:
      InputError: The examples cannot be read.
    """

  @abc.abstractmethod
  def inputs(self, stack: Stack) -> Inputs | Images | SourceTarget | ImageText:
    """Returns the model's inputs for a batch, as numpy arrays.

    Args:
      stack: Returns a field of all examples of the batch.
    """

  @abc.abstractmethod
  def check(self, config: FamilyConfig) -> None:
    """Checks that a model can read this task's inputs and has its outputs.

    Args:
      config: The model's architecture config.

    Raises:
      InputError: The model does not fit the task.
    """

  @abc.abstractmethod
  def hub_files(self, config: FamilyConfig) -> JsonObject:
    """Returns JSON files for the exported folder of a model, e.g. of its image processor.

    Args:
      config: The model's architecture config.

    Returns:
      JSON by file name, e.g. {"config.json": {"id2label": ...}}. It is merged into existing files.
    """

  def valid(self, stack: Stack) -> np.ndarray | None:
    """Returns which input positions of a batch are not padding, for encoders.

    Returns:
      bool [B, S], or [B, 1] without padding; None for decoders, whose features are compared at the
      labels.
    """
    del stack
    return None


class PseudoLabels(NamedTuple):
  """A model's outputs as training data.

  Attributes:
    lines: Lines of a .jsonl file in the task's format, with the outputs as labels.
    left_out: Number of outputs that were rejected.
  """

  lines: list[JsonObject]
  left_out: int


class TextTask(Task):
  """A task of encoder-decoders, which generate a text for each example."""

  batch_size: int
  """Number of texts that are decoded at once."""

  @abc.abstractmethod
  def inputs(self, stack: Stack) -> SourceTarget:
    """Returns the model's inputs for a batch, as numpy arrays.

    Args:
      stack: Returns a field of all examples of the batch.
    """

  @abc.abstractmethod
  def search(self, config: Seq2SeqConfig, source: Any, generation: JsonObject) -> Search:
    """Returns the beam-search settings for a model.

    Args:
      config: The model's architecture config.
      source: The examples of this task, from `open`.
      generation: The contents of the model's generation_config.json.
    """

  @abc.abstractmethod
  def scores(self, outputs: Sequence[str], source: Any) -> dict[str, float]:
    """Returns metrics of generated texts.

    Args:
      outputs: Texts for the first examples of the source, in its order.
      source: The examples of this task, from `open`.
    """

  @abc.abstractmethod
  def shown(self, source: Any, count: int) -> list[tuple[str, str]]:
    """Returns what to show of the first examples: (the input or its file, the expected text).

    Args:
      source: The examples of this task, from `open`.
      count: The number of examples, at most.
    """

  @abc.abstractmethod
  def pseudo_labels(self, outputs: Sequence[str], source: Any) -> PseudoLabels:
    """Returns generated texts as training data.

    Args:
      outputs: Texts for all examples of the source, in its order.
      source: The examples of this task, from `open`.
    """
