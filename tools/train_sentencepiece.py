"""Trains a sentencepiece model; a module for other scripts."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from distill_jax.data.tokenizers import Tokenizer, load_tokenizer
from distill_jax.errors import InputError
from distill_jax.runtime.atomic_io import atomic_write


def train_sentencepiece(
  documents: Iterable[str], vocab_size: int, out_path: str | Path, model_type: str = "unigram"
) -> Tokenizer:
  """Trains a sentencepiece model on a corpus and writes it, whole or not at all.

  The same documents give the same bytes. Text is not normalised and unknown characters
  fall back to bytes, so that encoding loses nothing (only U+2581, sentencepiece's own
  mark, comes back as a space).

  Args:
    documents: read once, line by line.
    vocab_size: pieces, the 256 bytes and <unk>, <s>, </s> included.
    out_path: where the .model file goes; one that is there is replaced.
    model_type: "unigram" or "bpe".

  Raises:
    InputError: a corpus that is empty or too small for the vocabulary.
  """
  if model_type not in ("unigram", "bpe"):
    raise InputError(f"model_type is {model_type!r}; it can be 'unigram' or 'bpe'")
  out, model = Path(out_path), io.BytesIO()
  # All of it at once, as sentencepiece keeps it too: an error in `documents` stays itself.
  if not (lines := [line for text in documents for line in text.split("\n") if line]):
    raise InputError("the corpus to train a sentencepiece model on holds no text; give some")
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
      max_sentence_length=1 << 30,  # the default leaves longer lines out without a word
      num_threads=1,
      minloglevel=2,  # sums over threads would depend on their number
    )
  except RuntimeError as e:
    reason = " ".join(str(e).split("] ")[-1].split()).rstrip(".")
    raise InputError(
      f"no sentencepiece model of {vocab_size} pieces can be trained on this corpus ({reason}); "
      "give more text or another vocab_size"
    ) from e
  atomic_write(out, model.getvalue())
  return load_tokenizer(out)
