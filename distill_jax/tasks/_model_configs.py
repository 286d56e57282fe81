"""Protocols of architecture configs, with which tasks check that a model is of the right kind."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from distill_jax.errors import InputError, bad_value


@runtime_checkable
class PositionLimitedConfig(Protocol):
  """The config of a model that reads texts of limited length."""

  @property
  def max_position_embeddings(self) -> int:
    """Maximum number of tokens of a text."""


class VisionConfig(Protocol):
  """The config of a vision tower."""

  image_size: int
  num_channels: int

  @property
  def num_patches(self) -> int:
    """Number of vectors that represent an image."""


class TextTowerConfig(Protocol):
  """The config of a text tower, where the state at the end token represents the text."""

  eos_token_id: int


@runtime_checkable
class TextEncoderConfig(Protocol):
  """The config of a text encoder, e.g. bert; a classifier if `num_labels` is above 0."""

  num_labels: int
  max_position_embeddings: int
  pooling: str

  @property
  def embedding_size(self) -> int:
    """Width of the embedding of a whole text."""


@runtime_checkable
class ImageEncoderConfig(Protocol):
  """The config of an image encoder, e.g. vit."""

  image_size: int
  num_channels: int


@runtime_checkable
class ImageDecoderConfig(Protocol):
  """The config of a decoder that reads images, e.g. llava."""

  image_token: int
  vision: VisionConfig
  head_rows: int

  @property
  def max_position_embeddings(self) -> int:
    """Maximum number of tokens of a row, including those of the image."""


class ImageTextConfig(Protocol):
  """The config of a model of images and texts, e.g. clip."""

  vision: VisionConfig
  text: TextTowerConfig

  @property
  def vocab_size(self) -> int:
    """Number of rows of the text tower's embedding table."""

  @property
  def max_position_embeddings(self) -> int:
    """Maximum number of tokens of a text."""


@runtime_checkable
class Seq2SeqConfig(Protocol):
  """The config of an encoder-decoder, e.g. t5."""

  decoder_start_token_id: int
  pad_token_id: int


@runtime_checkable
class SpeechConfig(Seq2SeqConfig, Protocol):
  """The config of an encoder-decoder that reads audio, e.g. whisper."""

  num_mel_bins: int
  max_source_positions: int
  max_target_positions: int


def wrong_kind(kind: str, expected: str, config: object) -> InputError:
  """Returns the error for a model that is not of the kind that a task needs.

  Args:
    kind: Name of the task in the registry.
    expected: The kind of model it needs, e.g. "a speech model, e.g. whisper".
    config: The model's architecture config.
  """
  family = type(config).__module__.rpartition(".")[2]
  return InputError(
    f"The task {kind} needs {expected}, but this model is of the family {family}. Choose another "
    "model."
  )


def check_as_in_model(
  kind: str, key: str, value: int, of_model: int, meaning: str = "as in the model"
) -> None:
  """Raises InputError if a number of a task is not that of the model.

  Args:
    kind: Name of the task in the registry.
    key: The task's key.
    value: The value of the key.
    of_model: The model's number.
    meaning: The end of the message's part "expected 28, the model's image size".
  """
  if value != of_model:
    raise bad_value(f"{kind}.{key}", value, f"{of_model}, {meaning}", "Set it so")


def check_images(
  kind: str, size: int, channels: int, model: ImageEncoderConfig | VisionConfig
) -> None:
  """Raises InputError if a model reads images of another size or other channels.

  Args:
    kind: Name of the task in the registry.
    size: The width and height of the task's images in pixels.
    channels: The number of channels of the task's images.
    model: The config of the model, or of its vision tower.
  """
  check_as_in_model(kind, "size", size, model.image_size, "the model's image size")
  check_as_in_model(
    kind, "channels", channels, model.num_channels, "the model's number of channels"
  )
