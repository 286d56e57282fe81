"""The vocabulary of sentencepiece's BPE for GGUF files: tokens with scores, merged best first.

The tokenizer is a sentencepiece model, or a tokenizer.json that was converted from one. The latter
has merges instead of scores. llama.cpp merges any two neighbours whose text is a token, the best
token first and the leftmost of equal ones, so scores replace merges if every division of a token
into two tokens is a merge, and the merges of a token are next to each other in the order.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from distill_jax.errors import InputError
from distill_jax.hub.gguf_tokenizer import BYTE, NORMAL, UNKNOWN, USER_DEFINED
from distill_jax.hub.gguf_words import (
  Words,
  added_tokens,
  begin,
  check_merges,
  merges,
  normalizers,
  unsupported,
)
from distill_jax.runtime import extras
from distill_jax.types import JsonObject

SPACE = "\u2581"  # sentencepiece's symbol for a space
BYTES = [f"<0x{i:02X}>" for i in range(256)]
PREPEND = {"type": "Prepend", "prepend": SPACE}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
BPE = 2  # sentencepiece's TrainerSpec.ModelType


def is_metaspace(parsed: JsonObject) -> bool:
  """Returns whether the tokens of a tokenizer.json have sentencepiece's symbol for spaces."""
  steps = normalizers(parsed.get("normalizer"))
  return REPLACE in steps or (parsed.get("pre_tokenizer") or {}).get("type") == "Metaspace"


def of_json(parsed: JsonObject) -> Words:
  """Returns the words of a tokenizer.json.

  Raises:
    InputError: llama.cpp cannot reproduce the tokenizer.
  """
  model = parsed["model"]
  check_merges(model)
  prefix, notes = _prefix(parsed)
  vocab = model["vocab"]
  _check_bytes(vocab if model.get("byte_fallback") else ())
  added = added_tokens(parsed, prepends=PREPEND in normalizers(parsed.get("normalizer")))
  # Gemma's added tokens of several spaces are also tokens that merges make, and the text that
  # they are found in has no such symbols: they are normal tokens.
  added = {i: t for i, t in added.items() if SPACE not in t[0] or t[0] not in vocab}
  special = {}
  tokens = {i: (text, NORMAL) for text, i in vocab.items()}
  tokens |= {vocab[text]: (text, BYTE) for text in BYTES} | added
  if (unknown := model.get("unk_token")) is not None:
    special["unk"] = vocab[unknown]
    tokens[vocab[unknown]] = (unknown, UNKNOWN)
  scores = [0.0] * (max(tokens) + 1)
  found_first = {text for text, _ in added.values()}
  for text, score in _scores(vocab, merges(model), found_first).items():
    scores[vocab[text]] = score
  rules = {"scores": scores, "add_space_prefix": prefix}
  return Words("llama", tokens, begin(parsed.get("post_processor")), rules, special, notes)


def of_sentencepiece(raw: bytes) -> Words:
  """Returns the words of a sentencepiece model.

  Raises:
    InputError: llama.cpp cannot reproduce the tokenizer, or the model is damaged.
  """
  with extras.needed("train"):
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

  try:
    loaded = sentencepiece.SentencePieceProcessor(model_proto=raw)
  except RuntimeError as e:
    raise InputError(f"tokenizer.model is damaged ({e}). Download the file again.") from e
  proto: Any = sentencepiece_model_pb2.ModelProto.FromString(raw)  # type: ignore[attr-defined]
  trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
  if trainer.model_type != BPE:
    raise unsupported("is a sentencepiece model other than BPE")
  changes = normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces
  if changes or not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix:
    raise unsupported(f"normalizes texts by the rule {normalizer.name!r}")
  defined = [p.piece for p in proto.pieces if p.type == USER_DEFINED]
  if defined and normalizer.add_dummy_prefix:  # llama.cpp puts a space after each of them, too
    raise unsupported(f"puts a space before a text and has the user-defined piece {defined[0]!r}")
  _check_bytes({p.piece for p in proto.pieces if p.type == BYTE})
  texts = [p.piece.replace(SPACE, " ") if p.type == USER_DEFINED else p.piece for p in proto.pieces]
  kinds = [p.type for p in proto.pieces]
  rules = {
    "scores": [p.score for p in proto.pieces],
    "add_space_prefix": normalizer.add_dummy_prefix,
  }
  tokens = dict(enumerate(zip(texts, kinds, strict=True)))
  roles = {
    "bos": loaded.bos_id(),
    "eos": loaded.eos_id(),
    "unk": loaded.unk_id(),
    "pad": loaded.pad_id(),
  }
  special = {role: i for role, i in roles.items() if i >= 0}
  bos = [special["bos"]] if "bos" in special else []
  return Words("llama", tokens, bos, rules, special, [])


def _check_bytes(tokens: Collection[str]) -> None:
  if not set(BYTES) <= set(tokens):
    raise unsupported("lacks a token for every byte")


def _prefix(parsed: JsonObject) -> tuple[bool, list[str]]:
  """Returns whether llama.cpp puts a space before a text, and where this is not the same."""
  steps, cut = normalizers(parsed.get("normalizer")), parsed.get("pre_tokenizer")
  if cut and cut["type"] == "Metaspace" and not steps:
    scheme = cut.get("prepend_scheme", "always")
    if cut.get("replacement", SPACE) != SPACE or cut.get("split", True):
      raise unsupported("divides texts by Metaspace with split")
    if scheme == "first":
      return False, ["it puts no space before a text. Begin a prompt that is no chat with a space."]
    if scheme == "always":
      return True, ["a text that begins with a space gets another one. Begin it with a word."]
    return False, []
  # The text has no space left at which this step could divide it.
  no_step = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
  if steps not in ([REPLACE], [PREPEND, REPLACE]) or cut not in (
    None,
    {**no_step, "invert": False},
  ):
    raise unsupported(f"changes texts by {str(steps + [cut]):.200}")
  return PREPEND in steps, []


def _scores(
  vocab: dict[str, int], pairs: list[tuple[str, str]], found_first: set[str]
) -> dict[str, float]:
  """Returns the scores of the tokens that merges make, in the order of the merges.

  Args:
    vocab: The tokens of the model.
    pairs: The merges.
    found_first: Tokens that are found before all others, whose merges do not matter.

  Raises:
    InputError: Scores cannot replace the merges.
  """
  divisions: dict[str, set[str]] = {}
  span: dict[str, list[int]] = {}
  for rank, (a, b) in enumerate(pairs):
    if a + b not in found_first:
      divisions.setdefault(a + b, set()).add(a)
      span.setdefault(a + b, [rank, rank])[1] = rank
  for token in vocab:
    if token not in found_first and divisions.get(token, set()) != _divisions(token, vocab):
      raise unsupported(f"has the token {token!r}, not all divisions of which are merges")
  scores: dict[str, float] = {}
  score, last, previous = 0.0, -1, ""
  for token, (start, end) in span.items():
    if start > last:
      score -= 1.0
    elif len({*token}) > 1 or len({*previous}) > 1:
      # Merges of runs of one letter, as in Gemma 3, all grow the leftmost run.
      raise unsupported(f"merges {previous!r} before and after {token!r}")
    scores[token], last, previous = score, max(last, end), token
  return scores


def _divisions(token: str, vocab: dict[str, int]) -> set[str]:
  """Returns the left parts of a token that is divided into two tokens or characters."""

  def is_symbol(part: str) -> bool:
    return len(part) == 1 or part in vocab

  cuts = range(1, len(token))
  return {token[:i] for i in cuts if is_symbol(token[:i]) and is_symbol(token[i:])}
