"""What was said against what was wanted: BLEU and chrF by sacrebleu, word error rate by jiwer."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence


def missing(*packages: str) -> list[str]:
  return [p for p in packages if importlib.util.find_spec(p) is None]


def bleu_and_chrf(said: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
  """Of a corpus, from 0 to 100 (arXiv:1804.08771); {} where sacrebleu is not installed."""
  if missing("sacrebleu"):
    print("no bleu and chrf: pip install sacrebleu", file=sys.stderr)
    return {}
  import sacrebleu

  return {
    "bleu": sacrebleu.corpus_bleu(said, [wanted]).score,
    "chrf": sacrebleu.corpus_chrf(said, [wanted]).score,
  }


def word_error_rate(said: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
  """Wrong words by words wanted, both normalised; {} where jiwer or transformers is missing."""
  if lost := missing("jiwer", "transformers"):
    print(f"no wer: pip install {' '.join(lost)}", file=sys.stderr)
    return {}
  rates = word_errors(said, wanted)
  return {"wer": sum(wrong for wrong, _ in rates) / max(1, sum(words for _, words in rates))}


def word_errors(said: Sequence[str], wanted: Sequence[str]) -> list[tuple[int, int]]:
  """(wrong words, words wanted) of each text, both as Whisper's normaliser leaves them."""
  import jiwer
  from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

  plain = EnglishTextNormalizer({})  # British spelling stays as it is
  counts = []
  for ours, theirs in zip(said, wanted, strict=True):
    ours, theirs = plain(ours), plain(theirs)
    if not theirs:  # jiwer refuses it: all that was said is wrong
      counts.append((len(ours.split()), 0))
      continue
    out = jiwer.process_words(theirs, ours)
    counts.append((out.substitutions + out.deletions + out.insertions, len(theirs.split())))
  return counts
