"""The files of a tokenizer in a model folder, and its number of tokens."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection
from typing import Self

from distill_jax.errors import InputError
from distill_jax.hub.weights import parse_hf_json, read_hf_json, read_text
from distill_jax.runtime import extras, files
from distill_jax.types import JsonObject

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
  """The files of a Hugging Face tokenizer. At least one of `json` and `sentencepiece` is set.

  Attributes:
    json: the text of tokenizer.json.
    sentencepiece: the bytes of tokenizer.model.
    config: the content of tokenizer_config.json: special tokens and `chat_template`.
  """

  json: str | None
  sentencepiece: bytes | None
  config: JsonObject

  @property
  def chat_template(self) -> str | None:
    """The Jinja source of the default chat template; None without one."""
    template = self.config.get("chat_template")
    try:
      if isinstance(template, list):  # several templates with names
        template = {t["name"]: t["template"] for t in template}.get("default")
    except (KeyError, TypeError) as e:
      raise InputError(
        f"The chat_template in tokenizer_config.json lacks {e}. Download the file again."
      ) from e
    return template

  def without(self, tokens: Collection[str]) -> Self:
    """Returns the files without some of the added tokens, whose text is then ordinary text."""
    if self.json is None or not any(token in self.json for token in tokens):
      return self
    parsed = parse_hf_json(self.json.encode(), "tokenizer.json")
    try:
      parsed["added_tokens"] = [t for t in parsed["added_tokens"] if t["content"] not in tokens]
    except (KeyError, TypeError) as e:
      raise InputError(
        f"tokenizer.json has no list of added tokens ({e!r}). Download it again."
      ) from e
    return dataclasses.replace(self, json=json.dumps(parsed, ensure_ascii=False, indent=2))

  def size(self) -> int:
    """Returns the number of ids of the tokenizer: the largest id plus 1."""
    if self.json is None:
      with extras.needed("train"):
        import sentencepiece

      return sentencepiece.SentencePieceProcessor(model_proto=self.sentencepiece).get_piece_size()
    parsed = parse_hf_json(self.json.encode(), "tokenizer.json")
    try:
      vocab = parsed["model"]["vocab"]
      ids = [t["id"] for t in parsed.get("added_tokens") or []]
      return max([*ids, *(vocab.values() if isinstance(vocab, dict) else [len(vocab) - 1])]) + 1
    except (KeyError, TypeError, ValueError) as e:
      raise InputError(f"tokenizer.json has no vocabulary ({e!r}). Download the file again.") from e


def read_tokenizer(folder: str | os.PathLike[str], only: str = "") -> TokenizerFiles | None:
  """Returns the tokenizer in a Hugging Face folder; None if the folder lacks one.

  Args:
    folder: A path or URL.
    only: The name of the only tokenizer to read. "": tokenizer.json and tokenizer.model.
  """
  there = files.listing(folder)

  def read_optional(name: str) -> JsonObject:
    return read_hf_json(files.join(folder, name)) if name in there else {}

  text, pieces = "tokenizer.json", "tokenizer.model"
  if only:
    is_json = files.read(files.join(folder, only)).lstrip()[:1] == b"{"
    text, pieces = (only, "") if is_json else ("", only)
  if text not in there and pieces not in there:
    return None
  config = read_optional("tokenizer_config.json")
  named = read_optional("special_tokens_map.json")  # of older versions of transformers
  for role in ROLES:
    if role in named and config.get(role) is None:
      token = named[role]
      config[role] = token["content"] if isinstance(token, dict) and "content" in token else token
  if (template := "chat_template.jinja") in there:
    config["chat_template"] = read_text(files.join(folder, template))
  return TokenizerFiles(
    json=read_text(files.join(folder, text)) if text in there else None,
    sentencepiece=files.read(files.join(folder, pieces)) if pieces in there else None,
    config=config,
  )


def check_vocabulary(tokens: int, rows: int, name: str = "The tokenizer") -> None:
  """Raises InputError for a tokenizer with more tokens than the embedding has rows.

  Additional rows are padding.
  """
  if tokens > rows:
    raise InputError(
      f"{name} has {tokens} tokens, but the model's embedding has {rows} rows. "
      "Use the tokenizer that belongs to these weights."
    )
