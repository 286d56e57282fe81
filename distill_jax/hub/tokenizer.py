"""The tokenizer that travels with a model: its files, and how many tokens it has."""

from __future__ import annotations

import dataclasses
import pathlib

from distill_jax.errors import InputError
from distill_jax.hub.weights import parse_hf_json, read_hf_json, read_text
from distill_jax.runtime import extras
from distill_jax.types import JsonObject

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
  """A Hugging Face tokenizer as its files hold it; one of `json` and `sentencepiece` is set.

  Attributes:
    json: the text of tokenizer.json.
    sentencepiece: the bytes of tokenizer.model.
    config: tokenizer_config.json: the special tokens' names, and `chat_template`.
  """

  json: str | None
  sentencepiece: bytes | None
  config: JsonObject

  @property
  def chat_template(self) -> str | None:
    """The Jinja source of the default chat template; None without one."""
    template = self.config.get("chat_template")
    try:
      if isinstance(template, list):  # several, by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    except (KeyError, TypeError) as e:
      raise InputError(f"tokenizer_config.json has a chat_template without {e}") from e
    return template

  def size(self) -> int:
    """Ids that the tokenizer can give: the largest one plus 1."""
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
      raise InputError(f"tokenizer.json has no vocabulary ({e!r}); fetch the file again") from e


def _read_optional(path: pathlib.Path) -> JsonObject:
  return read_hf_json(path) if path.exists() else {}


def read_tokenizer(folder: pathlib.Path) -> TokenizerFiles | None:
  """The tokenizer in a Hugging Face folder; None where there is none."""
  text, pieces = folder / "tokenizer.json", folder / "tokenizer.model"
  if not text.exists() and not pieces.exists():
    return None
  config = _read_optional(folder / "tokenizer_config.json")
  named = _read_optional(folder / "special_tokens_map.json")  # where older folders name them
  for role in ROLES:
    if role in named and config.get(role) is None:
      token = named[role]
      config[role] = token["content"] if isinstance(token, dict) and "content" in token else token
  if (template := folder / "chat_template.jinja").exists():
    config["chat_template"] = read_text(template)
  return TokenizerFiles(
    json=read_text(text) if text.exists() else None,
    sentencepiece=pieces.read_bytes() if pieces.exists() else None,
    config=config,
  )


def check_vocabulary(tokens: int, rows: int, name: str = "the tokenizer") -> None:
  """Refuses a tokenizer with more tokens than the embedding has rows; spare rows are padding."""
  if tokens > rows:
    raise InputError(
      f"{name} has {tokens} tokens and the model's embedding {rows} rows; take the tokenizer that "
      "belongs to these weights"
    )
