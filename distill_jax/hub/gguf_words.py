"""The parts of a tokenizer.json that both kinds of vocabularies in GGUF files have."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any, NamedTuple

from distill_jax.errors import InputError
from distill_jax.hub.gguf_tokenizer import CONTROL, USER_DEFINED
from distill_jax.types import JsonObject


class Words(NamedTuple):
  """The tokens and rules of a vocabulary.

  Attributes:
    model: "gpt2" or "llama", the algorithm.
    tokens: (text, type of the token) by id.
    begin: the ids that begin every text.
    rules: the other metadata, without "tokenizer.ggml." in its keys.
    special: the ids of special tokens by role (bos, eos, unk, pad) that the rules name.
    notes: what llama.cpp does differently, one sentence each.
  """

  model: str
  tokens: Mapping[int, tuple[str, int]]
  begin: list[int]
  rules: dict[str, Any]
  special: dict[str, int]
  notes: list[str]


def unsupported(fault: str) -> InputError:
  """Returns the error for a tokenizer that llama.cpp cannot reproduce."""
  return InputError(
    f"The tokenizer {fault}, which llama.cpp cannot reproduce. Set export.format to 'hf'."
  )


def added_tokens(parsed: JsonObject, prepends: bool = False) -> dict[int, tuple[str, int]]:
  """Returns (text, type) of the tokens that a tokenizer.json finds in a text before all others.

  Args:
    parsed: The content of tokenizer.json.
    prepends: Whether the normalizer prepends a space to each part of a text.
  """
  tokens = {}
  for token in parsed.get("added_tokens") or []:
    text = token["content"]
    for flag in ("lstrip", "rstrip", "single_word"):
      if token.get(flag):
        raise unsupported(f"has the token {text!r} with {flag}")
    if token.get("normalized") and (prepends or " " in text or not is_composed(text)):
      raise unsupported(f"has the token {text!r}, which is found after the text is normalized")
    tokens[token["id"]] = (text, CONTROL if token["special"] else USER_DEFINED)
  return tokens


def begin(processor: JsonObject | None) -> list[int]:
  """Returns the ids that the post-processor of a tokenizer.json puts before a text."""
  kind = (processor or {"type": "ByteLevel"})["type"]
  if processor is None or kind == "ByteLevel":
    return []
  if kind == "Sequence":
    return [i for part in processor["processors"] for i in begin(part)]
  if kind != "TemplateProcessing":
    raise unsupported(f"has the post-processor {kind}")
  ids: list[int] = []
  for item in processor["single"]:
    if "Sequence" in item:
      break
    ids += processor["special_tokens"][item["SpecialToken"]["id"]]["ids"]
  return ids


def check_merges(model: JsonObject) -> None:
  """Raises InputError unless the model merges tokens with its merges alone."""
  if model["type"] != "BPE":
    raise unsupported(f"has a {model['type']} model")
  for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
    if model.get(key):
      raise unsupported(f"has a model with {key}")


def merges(model: JsonObject) -> list[tuple[str, str]]:
  """Returns the pairs of tokens in the order in which they are merged."""
  pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
  return [(a, b) for a, b in pairs]


def normalizers(normalizer: JsonObject | None) -> list[JsonObject]:
  """Returns the steps of a normalizer."""
  if not normalizer:
    return []
  if normalizer["type"] != "Sequence":
    return [normalizer]
  return [step for part in normalizer["normalizers"] for step in normalizers(part)]


def is_composed(text: str) -> bool:
  return unicodedata.is_normalized("NFC", text)
