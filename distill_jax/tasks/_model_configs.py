"""What tasks ask of a model family's Config, to tell whether its model is of the right kind."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from distill_jax.errors import InputError


@runtime_checkable
class PositionLimitedConfig(Protocol):
  """The config of a model that reads texts up to a length."""

  @property
  def max_position_embeddings(self) -> int:
    """The most tokens of a text."""


class VisionConfig(Protocol):
  """The config of a model's part that reads images."""

  image_size: int
  num_channels: int

  @property
  def num_patches(self) -> int:
    """How many vectors an image becomes."""


class TextTowerConfig(Protocol):
  """The config of a model's part that reads texts whose end token stands for all of it."""

  eos_token_id: int


@runtime_checkable
class TextEncoderConfig(Protocol):
  """The config of a text encoder, such as bert: a classifier if `num_labels` is above 0."""

  num_labels: int
  max_position_embeddings: int

  @property
  def embedding_size(self) -> int:
    """Width of the vector that stands for a whole text."""


@runtime_checkable
class ImageEncoderConfig(Protocol):
  """The config of an image encoder, such as vit."""

  image_size: int
  num_channels: int


@runtime_checkable
class ImageDecoderConfig(Protocol):
  """The config of a decoder that reads images, such as llava."""

  image_token: int
  vision: VisionConfig
  head_rows: int

  @property
  def max_position_embeddings(self) -> int:
    """The most tokens of a row, those of the image among them."""


class ImageTextConfig(Protocol):
  """The config of a model of images and texts, such as clip."""

  vision: VisionConfig
  text: TextTowerConfig

  @property
  def vocab_size(self) -> int:
    """The rows of the text tower's table."""

  @property
  def max_position_embeddings(self) -> int:
    """The most tokens of a text."""


@runtime_checkable
class Seq2SeqConfig(Protocol):
  """The config of an encoder-decoder, such as t5."""

  decoder_start_token_id: int
  pad_token_id: int


@runtime_checkable
class SpeechConfig(Seq2SeqConfig, Protocol):
  """The config of an encoder-decoder that reads sounds, such as whisper."""

  num_mel_bins: int
  max_source_positions: int
  max_target_positions: int


def wrong_kind(kind: str, expected: str, config: object) -> InputError:
  """Returns the error for a model of another kind than a task needs.

  Args:
    kind: the task's name in the registry.
    expected: what it needs, such as "a model of sounds, such as whisper".
    config: what it was given.
  """
  family = type(config).__module__.rpartition(".")[2]
  return InputError(f"{kind} wants {expected}, and this is a {family}")
