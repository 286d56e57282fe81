"""Converts the byte-level BPE tokenizer in a GGUF file's metadata to a tokenizer.json."""

from __future__ import annotations

import json
import pathlib
from typing import Any, TypeGuard

from distill_jax.errors import InputError
from distill_jax.hub.gguf_pretokenizers import BYTES, PRE_TOKENIZERS
from distill_jax.hub.tokenizer import TokenizerFiles
from distill_jax.types import JsonObject

# Values of tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def tokenizer_files(meta: JsonObject, path: pathlib.Path) -> TokenizerFiles:
  """Returns the tokenizer of a GGUF file with metadata `meta`.

  Raises:
    InputError: The tokenizer is not a byte-level BPE, its pre-tokenizer is unknown, or its lists
      are damaged.
  """

  def key(name: str, default: Any = None) -> Any:
    return meta.get(f"tokenizer.ggml.{name}", default)

  model, pre = key("model"), key("pre")
  if model != "gpt2" or pre not in PRE_TOKENIZERS:
    raise InputError(
      f"{path} has a tokenizer with model {model!r} and pre {pre!r}, but only model "
      f"'gpt2' with pre {', '.join(PRE_TOKENIZERS)} is supported in a GGUF file. Use the "
      "safetensors folder of this model."
    )
  tokens, merges, types = key("tokens"), key("merges"), key("token_type")
  _check_lists(tokens, merges, types, path)
  special = {}
  for role, name in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
    if (i := key(f"{name}_token_id")) is not None:
      if type(i) is not int or not 0 <= i < len(tokens):
        raise InputError(
          f"{path}: {name}_token_id is {i!r}; expected a number below {len(tokens)}. Download the "
          "file again."
        )
      special[f"{role}_token"] = tokens[i]
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    "model_max_length": meta.get(f"{meta['general.architecture']}.context_length"),
    **special,
  }
  if template := meta.get("tokenizer.chat_template"):
    config["chat_template"] = template
  bos = special.get("bos_token") if key("add_bos_token", pre == "llama-bpe") else None
  text = json.dumps(_tokenizer_json(tokens, merges, types, pre, bos), ensure_ascii=False)
  return TokenizerFiles(text, None, config)


def _check_lists(tokens: object, merges: object, types: object, path: pathlib.Path) -> None:
  if not _is_strings(tokens) or not _is_strings(merges) or not isinstance(types, list):
    raise InputError(
      f"{path} lacks the tokens, merges or token_type of its tokenizer. Download the file again."
    )
  if len(set(tokens)) != len(tokens) or len(types) != len(tokens):
    raise InputError(
      f"{path} has {len(tokens)} tokens ({len(set(tokens))} distinct) and {len(types)} token "
      "types. Download the file again."
    )
  known = set(tokens)
  for merge in merges:
    a, _, b = merge.partition(" ")
    if not {a, b, a + b} <= known:
      raise InputError(
        f"{path} has the merge {merge!r}, which is not in its vocabulary. Download the file again."
      )


def _is_strings(x: object) -> TypeGuard[list[str]]:
  return isinstance(x, list) and all(isinstance(item, str) for item in x)


def _tokenizer_json(tokens, merges, types, pre: str, bos: str | None) -> JsonObject:
  added = [
    {
      "id": i,
      "content": token,
      "single_word": False,
      "lstrip": False,
      "rstrip": False,
      "normalized": False,
      "special": kind == CONTROL,
    }
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
    if kind in (CONTROL, USER_DEFINED)
  ]
  pairs = enumerate(zip(tokens, types, strict=True))
  vocab = {token: i for i, (token, kind) in pairs if kind != UNUSED}  # UNUSED: rows without a token
  return {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": added,
    "normalizer": None,
    "pre_tokenizer": PRE_TOKENIZERS[pre].json(),
    "post_processor": _begins_with(bos, vocab[bos]) if bos is not None else None,
    "decoder": {**BYTES, "add_prefix_space": True},
    "model": {
      "type": "BPE",
      "dropout": None,
      "unk_token": None,
      "continuing_subword_prefix": None,
      "end_of_word_suffix": None,
      "fuse_unk": False,
      "byte_fallback": False,
      "ignore_merges": PRE_TOKENIZERS[pre].ignore_merges,
      "vocab": vocab,
      "merges": merges,
    },
  }


def _begins_with(bos: str, i: int) -> JsonObject:
  """Returns a post-processor that inserts `bos` at the start of a text."""
  token, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
  return {
    "type": "TemplateProcessing",
    "single": [token, text],
    "pair": [token, text, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {bos: {"id": bos, "ids": [i], "tokens": [bos]}},
  }
