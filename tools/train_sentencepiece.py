"""Trains a sentencepiece model. Other scripts import this module."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from distill_jax.data.tokenizers import Tokenizer, load_tokenizer
from distill_jax.errors import InputError, bad_value
from distill_jax.runtime.atomic_io import atomic_write


def train_sentencepiece(
  documents: Iterable[str], vocab_size: int, out_path: str | Path, model_type: str = "unigram"
) -> Tokenizer:
  """Trains a sentencepiece model on a corpus and writes it to a file.

  The file appears only when it is complete. The same documents give the same file. Text is not
  normalised, and unknown characters are encoded as bytes, so that encoding is lossless, except that
  U+2581, which sentencepiece uses as a mark, is decoded as a space.

  Args:
    documents: the texts, which are read once.
    vocab_size: number of pieces, including the 256 bytes and <unk>, <s> and </s>.
    out_path: the .model file; an existing file is replaced.
    model_type: "unigram" or "bpe".

  Returns:
    The trained tokenizer.

  Raises:
    InputError: The corpus is empty or too small for the vocabulary.
  """
  if model_type not in ("unigram", "bpe"):
    raise bad_value("model_type", model_type, "'unigram' or 'bpe'", "Choose one of them")
  out, model = Path(out_path), io.BytesIO()
  # The whole corpus is read here (sentencepiece holds it in memory, too), so that an error in
  # `documents` is raised unchanged.
  if not (lines := [line for text in documents for line in text.split("\n") if line]):
    raise InputError("The corpus for the sentencepiece model has no text. Add text.")
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines),
      model_writer=model,
      vocab_size=vocab_size,
      model_type=model_type,
      byte_fallback=True,
      character_coverage=0.9995,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      max_sentence_length=1 << 30,  # the default silently skips longer lines
      num_threads=1,  # the result depends on the number of threads
      minloglevel=2,
    )
  except RuntimeError as e:
    reason = " ".join(str(e).split("] ")[-1].split()).rstrip(".")
    raise InputError(
      f"A sentencepiece model with {vocab_size} pieces cannot be trained on this corpus "
      f"({reason}). Add text, or choose another vocab_size."
    ) from e
  atomic_write(out, model.getvalue())
  return load_tokenizer(out)
