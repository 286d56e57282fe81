"""The bytes of tokens, which may be parts of characters."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from distill_jax.data.tokenizers import SPACE, Tokenizer

if TYPE_CHECKING:  # worker processes must not import jax
  from distill_jax.types import JsonObject

# Decoders of a tokenizer.json that join the bytes of tokens, except at the beginning of a text.
JOINING = {"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Sequence", "Strip"}


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


def joiner(tokenizer: Tokenizer) -> Callable[[Sequence[int]], bytes]:
  """Returns a function from the tokens of a part of a text to the bytes of that part.

  `Tokenizer.decode` decodes whole texts: with the tokenizers of Llama 2 and Mistral, it drops a
  space at the beginning, and replaces complete characters next to an incomplete one.
  """
  decoder = json.loads(tokenizer.raw)["decoder"] if tokenizer.kind == "huggingface" else {}
  if decoder is None or not JOINING.issuperset(_types(decoder)):  # e.g. one that adds spaces
    return lambda ids: tokenizer.decode(ids).encode()
  special = tokenizer.special_tokens if tokenizer.kind == "sentencepiece" else ()
  hidden, read = {tokenizer.token_id(token) for token in special}, reader(tokenizer)
  return lambda ids: b"".join(read(i) for i in ids if i not in hidden)


def _types(decoder: JsonObject) -> Iterator[str]:
  """Yields the types of a decoder and of its parts."""
  if decoder:
    yield decoder["type"]
  for part in decoder.get("decoders", ()):
    yield from _types(part)


def _byte_letters() -> dict[str, int]:
  """Returns the bytes by the letters that spell them in byte-level vocabularies, as in GPT-2.

  Printable bytes of Latin-1 spell themselves; the others have the letters from U+0100 on.
  """
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [b for b in range(256) if b not in printable]
  return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
