"""Scores of generated texts: BLEU and chrF (sacrebleu), and word error rate (jiwer)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from distill_jax.runtime import extras

WORD_ERROR_PACKAGES = ("jiwer", "transformers")


class WordErrors(NamedTuple):
  """Number of wrong words of an output, and of words of its reference."""

  wrong: int
  words: int


def bleu_and_chrf(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
  """Returns corpus BLEU and chrF from 0 to 100 (arXiv:1804.08771); {} without sacrebleu."""
  if packages := extras.not_installed("sacrebleu"):
    print(f"Skipping bleu and chrf. {extras.missing(packages[0], 'text')}", file=sys.stderr)
    return {}
  import sacrebleu

  return {
    "bleu": sacrebleu.corpus_bleu(outputs, [references]).score,
    "chrf": sacrebleu.corpus_chrf(outputs, [references]).score,
  }


def word_error_rate(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
  """Returns the word error rate of all texts; {} without jiwer or transformers."""
  if packages := extras.not_installed(*WORD_ERROR_PACKAGES):
    print(f"Skipping wer. {extras.missing(packages[0], 'text')}", file=sys.stderr)
    return {}
  errors = word_errors(outputs, references)
  return {"wer": sum(e.wrong for e in errors) / max(1, sum(e.words for e in errors))}


def word_errors(outputs: Sequence[str], references: Sequence[str]) -> list[WordErrors]:
  """Returns the word errors of each output, after Whisper's text normalisation."""
  import jiwer
  from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

  normalise = EnglishTextNormalizer({})  # keeps British spelling
  errors = []
  for output, reference in zip(outputs, references, strict=True):
    output, reference = normalise(output), normalise(reference)
    if not reference:  # jiwer raises; every word of the output is wrong
      errors.append(WordErrors(len(output.split()), 0))
      continue
    counts = jiwer.process_words(reference, output)
    wrong = counts.substitutions + counts.deletions + counts.insertions
    errors.append(WordErrors(wrong, len(reference.split())))
  return errors
