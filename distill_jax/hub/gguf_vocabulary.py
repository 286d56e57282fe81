"""Converts a tokenizer to the vocabulary in the metadata of a GGUF file, with the same ids.

llama.cpp has two algorithms for the tokenizers of decoders: merges by rank within words ("gpt2",
for byte-level BPE) and merges by score in the whole text ("llama", for sentencepiece's BPE; see
gguf_pieces.py). A tokenizer that neither reproduces is refused. All of it is in memory: about 100
bytes a token and a merge, 80 MB for the 262,144 tokens of Gemma 3.
"""

from __future__ import annotations

import functools
from typing import Any

from distill_jax.errors import InputError
from distill_jax.hub import gguf_pieces, gguf_pretokenizers
from distill_jax.hub.gguf_tokenizer import CONTROL, NORMAL, UNUSED
from distill_jax.hub.gguf_words import (
  Words,
  added_tokens,
  begin,
  check_merges,
  merges,
  normalizers,
  unsupported,
)
from distill_jax.hub.special_tokens import EOS, named_token
from distill_jax.hub.tokenizer import TokenizerFiles, check_vocabulary
from distill_jax.hub.weights import parse_hf_json
from distill_jax.types import JsonObject

Entry = tuple[
  str, Any
]  # a key of the metadata and its value: str, int, bool, or a list of one type
# Tokens at which llama.cpp ends a text because of their names.
ENDS = {
  "<|eot_id|>",
  "<|im_end|>",
  "<|end|>",
  "<end_of_turn>",
  "<|endoftext|>",
  "<|eom_id|>",
  "<|end_of_text|>",
}


def vocabulary(
  tokenizer: TokenizerFiles, config: JsonObject, generation: JsonObject
) -> list[Entry]:
  """Returns the metadata of a tokenizer.

  Rows of the embedding table without a token get the type "unused".

  Args:
    tokenizer: The files of the tokenizer.
    config: The content of config.json: `vocab_size`, and the ids of special tokens.
    generation: The content of generation_config.json: the tokens that end a text.

  Raises:
    InputError: llama.cpp cannot reproduce the tokenizer, it is damaged, it has more tokens than the
      embedding table has rows, or it lacks a token that ends a text.
  """
  words = _words_of(tokenizer.json, tokenizer.sentencepiece)
  rows = config["vocab_size"]
  check_vocabulary(max(words.tokens) + 1, rows)
  tokens = [words.tokens.get(i, (f"[PAD{i}]", UNUSED)) for i in range(rows)]
  special = _special(tokenizer, {**config, **generation}, words)
  values = {
    "model": words.model,
    "tokens": [text for text, _ in tokens],
    "token_type": [kind for _, kind in tokens],
    **words.rules,
    **special,
    "add_bos_token": bool(words.begin),
    "add_eos_token": False,
  }
  if "scores" in values:
    values["scores"] = values["scores"] + [0.0] * (rows - len(values["scores"]))
  entries = [(f"tokenizer.ggml.{key}", value) for key, value in values.items()]
  if template := tokenizer.chat_template:
    entries.append(("tokenizer.chat_template", template))
  return entries


def differences(tokenizer: TokenizerFiles) -> list[str]:
  """Returns what llama.cpp does differently with an accepted tokenizer, one sentence each."""
  words = _words_of(tokenizer.json, tokenizer.sentencepiece)
  return [
    f"llama.cpp does not reproduce the tokenizer in one respect: {note}" for note in words.notes
  ]


@functools.lru_cache(maxsize=1)  # of an export, which needs the vocabulary several times
def _words_of(text: str | None, sentencepiece: bytes | None) -> Words:
  """Returns the words of a tokenizer.json or else of a sentencepiece model."""
  if text is None:
    return gguf_pieces.of_sentencepiece(sentencepiece or b"")
  parsed = parse_hf_json(text.encode(), "tokenizer.json")
  try:
    return gguf_pieces.of_json(parsed) if gguf_pieces.is_metaspace(parsed) else _words(parsed)
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    if isinstance(e, InputError):
      raise
    raise InputError(f"tokenizer.json is damaged ({e!r}). Download the file again.") from e


def _words(parsed: JsonObject) -> Words:
  """Returns the words of a byte-level BPE."""
  model, cuts = parsed["model"], parsed.get("pre_tokenizer")
  check_merges(model)
  pre = gguf_pretokenizers.name_of(cuts, model.get("ignore_merges", False))
  if pre is None:
    raise unsupported(f"divides texts by the unknown pre_tokenizer {str(cuts):.200}")
  notes = [note] if (note := gguf_pretokenizers.PRE_TOKENIZERS[pre].note) else []
  steps = [step["type"] for step in normalizers(parsed.get("normalizer"))]
  if steps == ["NFC"]:
    notes.append("it does not compose characters (Unicode's NFC). Give it composed text.")
  elif steps:
    raise unsupported(f"has the normalizer {', '.join(steps)}")
  tokens = {i: (text, NORMAL) for text, i in model["vocab"].items()}
  rules = {"pre": pre, "merges": [f"{a} {b}" for a, b in merges(model)]}
  return Words(
    model="gpt2",
    tokens=tokens | added_tokens(parsed),
    begin=begin(parsed.get("post_processor")),
    rules=rules,
    special={},
    notes=notes,
  )


def _special(files: TokenizerFiles, config: JsonObject, words: Words) -> dict[str, int]:
  """Returns the ids of the special tokens.

  llama.cpp has default ids for the ends of a text and the unknown token, so these are always set.
  """
  if len(words.begin) > 1:
    raise unsupported(f"begins a text with {len(words.begin)} tokens")
  ids = {text: i for i, (text, _) in words.tokens.items()}
  special = {text for text, kind in words.tokens.values() if kind == CONTROL}

  def named(role: str) -> int | None:
    text = named_token(files.config, f"{role}_token")
    return ids[text] if text in ids else words.special.get(role)

  bos = words.begin[0] if words.begin else named("bos")
  eos, given = named("eos"), config.get("eos_token_id")
  if eos is None and given is None:  # as data/tokenizers.py chooses the end of documents
    eos = next((ids[name] for name in EOS if name in special), None)
  ends = _ends(eos, given, words)
  pairs = [("bos", bos), *ends.items(), ("unknown", named("unk")), ("padding", named("pad"))]
  return {f"{role}_token_id": i for role, i in pairs if i is not None}


def _ends(named: int | None, given: Any, words: Words) -> dict[str, int]:
  """Returns the tokens that end a text by the names that llama.cpp has for up to three of them."""
  ends = given if isinstance(given, list) else [] if given is None else [given]
  if bad := [i for i in ends if i not in words.tokens]:
    raise InputError(
      f"eos_token_id is {bad[0]!r}, which the tokenizer lacks. Use the tokenizer of this model."
    )
  if named is not None and (not ends or named in ends):
    ends = [named, *ends]
  if not ends:
    raise InputError(
      "The tokenizer has no token that ends a text, and llama.cpp would end texts at another one. "
      "Set eos_token in its tokenizer_config.json."
    )
  others = [i for i in dict.fromkeys(ends) if i != ends[0]]
  others.sort(key=lambda i: words.tokens[i][0] in ENDS)  # these are known without a key
  if lost := [i for i in others[2:] if words.tokens[i][0] not in ENDS]:
    raise unsupported(f"has more than three tokens that end a text, such as id {lost[0]}")
  return dict(zip(("eos", "eot", "eom"), [ends[0], *others], strict=False))
