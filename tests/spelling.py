"""Texts of many scripts, and the check that the tokens of a text spell it."""

from __future__ import annotations

import unicodedata

import numpy as np

from distill_jax.cross_tokenizer.vocabulary import Vocabulary, is_fallback

TEXTS = (
  "",
  "a",
  " leading and trailing  ",
  "def f(x):\n    if x:\n\treturn x[0] + 12345678.90  # done\r\n\r\n\n\n",
  "日本語のテキスト、한국어 문장, русский текст, ελληνικά",
  "नमस्ते दुनिया; مرحبا بالعالم; שלום עולם; ไทย",
  "😀👩‍👩‍👧‍👦🇩🇪👍🏽 \U0001f9ff",
  "e\u0301\u0323 n\u0303 \u200b\u200f\ufeff \u00a0\u2003 ﬁ Å",
  "runs:  2   3    4     5" + " " * 60 + "60\t\t\t\n \n  \n",
  "0 12 345 6789 01234567890 1e-9 ½ ² ٣",
  "<b>x</b> <0x0A> {{x}} \\n \x00\x01\x7f",
)
DECOMPOSED = tuple(t for t in TEXTS if unicodedata.normalize("NFC", t) != t)


def check_places(vocabulary: Vocabulary, text: str) -> int:
  """Checks the tokens of a text byte by byte, and returns the place of the first (0 or -1)."""
  ids, ends = vocabulary.locate(text)
  raw, lead = text.encode(), -int(ends[0])
  assert ids.dtype == ends.dtype == np.int64 and len(ends) == len(ids) + 1
  assert ids.tolist() == vocabulary.tokenizer.encode(text)
  spelt = b" " * lead + raw
  for i, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):  # each, even inside letters
    assert vocabulary.bytes_V[ids[i]] == spelt[start + lead : end + lead]
    assert vocabulary.spell(ids[: i + 1]) == spelt[: end + lead]
  assert ends[-1] == len(raw)
  assert vocabulary.tokenizer.decode(ids.tolist()) == text  # the tokenizer's own word
  return -lead


def check_ids(vocabulary: Vocabulary) -> int:
  """Checks the bytes of each id that is text alone, and returns their number.

  The truth is the tokenizer's own decoder, which sees two of the same token, since some decoders
  remove a space from the first.
  """
  tokenizer, checked = vocabulary.tokenizer, 0
  for i, b in enumerate(vocabulary.bytes_V):
    if b is None:
      continue
    try:
      text = b.decode()
    except UnicodeDecodeError:
      continue
    twice = tokenizer.decode([i, i])
    assert twice in (text * 2, (text * 2).removeprefix(" ")), (i, b)
    checked += 1
  return checked


def check_id_of(vocabulary: Vocabulary) -> None:
  """Checks that bytes have the id that the tokenizer makes for them, wherever it makes one."""
  assert all(vocabulary.bytes_V[i] == b for b, i in vocabulary.id_of.items())
  assert {b for b in vocabulary.bytes_V if b} == vocabulary.id_of.keys()
  pieces = {}
  for i, b in enumerate(vocabulary.bytes_V):
    if b and not is_fallback(vocabulary.tokenizer.piece(i)):
      pieces[b] = i
  for b, i in vocabulary.id_of.items():
    assert b not in pieces or not is_fallback(vocabulary.tokenizer.piece(i)), b
    try:
      made = vocabulary.encode_inner(b.decode())
    except UnicodeDecodeError:
      continue
    assert made == [i] or len(made) != 1 or vocabulary.bytes_V[made[0]] != b, b
