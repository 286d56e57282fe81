"""The bytes of single tokens, which may be parts of characters."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from distill_jax.data.tokenizers import SPACE, Tokenizer


def reader(tokenizer: Tokenizer) -> Callable[[int], bytes]:
  """Returns a function from a token's id to its bytes.

  Special tokens are spelled out. An id without a token has no bytes.
  """
  special, letters = set(tokenizer.special_tokens), _byte_letters()
  parsed = json.loads(tokenizer.raw) if tokenizer.kind == "huggingface" else {}
  parts = json.dumps([parsed.get("decoder"), parsed.get("pre_tokenizer")])
  is_byte_level = '"ByteLevel"' in parts
  # Tokens that are not the model's are matched in the text itself: their letters are not bytes.
  added = {t["content"] for t in parsed.get("added_tokens", ())} if is_byte_level else set()
  added -= set(parsed["model"]["vocab"]) if added else set()
  has_fallback = not parsed or parsed["model"].get("byte_fallback", False)

  def token_bytes(i: int) -> bytes:
    piece = tokenizer.piece(i)
    if piece is None or piece in special or piece in added:
      return (piece or "").encode()
    if has_fallback and (match := re.fullmatch("<0x([0-9A-F]{2})>", piece)):
      return bytes.fromhex(match[1])
    if is_byte_level and all(c in letters for c in piece):
      return bytes(letters[c] for c in piece)
    return piece.replace(SPACE, " ").encode()

  return token_bytes


def _byte_letters() -> dict[str, int]:
  """Returns the bytes by the letters that spell them in byte-level vocabularies, as in GPT-2.

  Printable bytes of Latin-1 spell themselves; the others have the letters from U+0100 on.
  """
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [b for b in range(256) if b not in printable]
  return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
