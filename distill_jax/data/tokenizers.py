"""Tokenizers with one interface: Hugging Face tokenizer.json files and sentencepiece models.

`load_tokenizer` loads either kind.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_jax.errors import InputError
from distill_jax.hub.special_tokens import BOS, EOS, TURN_START, named_token
from distill_jax.runtime import extras, files, json_io

if TYPE_CHECKING:  # the workers of `pack` must not import jax
  from distill_jax.types import JsonObject

with extras.needed("train"):
  import sentencepiece
  import tokenizers

FILES = {"huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model"}
SPACE = "\u2581"  # sentencepiece's symbol for a space


class Tokenizer:
  """A tokenizer of either kind. It can be pickled.

  Args:
    raw: The bytes of a tokenizer.json or a sentencepiece model.
    where: The name of the tokenizer, for messages.
    eos: The token that ends a document, or its id. None: the first of EOS that is a special token.
      The same name can be an ordinary token: </s> is an HTML tag in Gemma's vocabulary.
    bos: The token that begins a text, or its id. None: the first of BOS that is a special token.
    named: The content of tokenizer_config.json, whose eos_token and bos_token are used if the
      vocabulary has no such special token. A token that begins each turn of a chat is not a BOS.

  Attributes:
    kind: "huggingface" or "sentencepiece".
    raw: See Args.
    where: See Args.
    filename: The file's name in a model's folder.
    vocab_size: The largest id + 1, which is the minimum number of rows of an embedding table.
    eos_id: The id of the token that ends a document, or None.
    bos_id: The id of the token that begins a text, or None.
    digest: The SHA-256 digest of the tokenizer; the white space of a JSON file does not matter.

  Raises:
    InputError: If the bytes are not a tokenizer, or a special token is not in its vocabulary.
  """

  def __init__(
    self,
    raw: bytes,
    where: str,
    eos: str | int | None = None,
    bos: str | int | None = None,
    named: Mapping[str, Any] | None = None,
  ):
    self.raw, self.where = raw, where
    self.kind = "huggingface" if raw.lstrip()[:1] == b"{" else "sentencepiece"
    self.filename = FILES[self.kind]
    if self.kind == "huggingface":
      ids = self._backend.get_vocab(with_added_tokens=True).values()
      self.vocab_size = max(ids, default=-1) + 1
      canonical = json.dumps(json.loads(raw), sort_keys=True).encode()
    else:
      self.vocab_size, canonical = self._backend.get_piece_size(), raw
    if not self.vocab_size:
      raise InputError(f"{where} has an empty vocabulary. Use another tokenizer.")
    self.digest = hashlib.sha256(canonical).hexdigest()
    end, begin = (named_token(named or {}, role) for role in ("eos_token", "bos_token"))
    self.eos_id = self._special(eos, EOS, end)
    self.bos_id = self._special(bos, BOS, None if begin == TURN_START else begin)

  def __repr__(self) -> str:
    return f"Tokenizer({self.where}, {self.kind}, vocab_size={self.vocab_size})"

  def __getstate__(self) -> JsonObject:
    return {k: v for k, v in self.__dict__.items() if k != "_backend"}

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without special tokens before or after it.

    With a Hugging Face tokenizer, the text of a special token is encoded as that token, as in
    transformers.
    """
    if self.kind == "sentencepiece":
      return self._backend.encode(text)
    return self._backend.encode(text, add_special_tokens=False).ids

  def encode_places(
    self, text: str, special: Iterable[str] = ()
  ) -> tuple[list[int], list[tuple[int, int]]]:
    """Returns the ids of a text as transformers encodes it, and the characters of each token.

    Unlike `encode`, the text of a sentencepiece model's control piece is encoded as that piece, as
    in transformers.

    Args:
      text: The text.
      special: Additional strings that are encoded as one token each.

    Returns:
      ids, and the (start, end) character offsets of each token. If several tokens share a
      character, the last or all of them include it. A token without text has start == end.

    Raises:
      InputError: If the text contains one of `special` that the tokenizer lacks, or if the
        tokenizer is a sentencepiece model that changes text or prepends a space.
    """
    hugging = self.kind == "huggingface"
    added = self._backend.get_added_tokens_decoder().values() if hugging else ()
    whole = {t.content for t in added} if hugging else {*self.special_tokens, *special}
    if lost := [s for s in special if s in text and (s not in whole or self.token_id(s) is None)]:
      raise InputError(
        f"{self.where} has no special token {lost[0]!r}, which the text contains. Use the "
        "tokenizer that belongs to the chat template."
      )
    if hugging:
      out = self._backend.encode(text, add_special_tokens=False)
      return out.ids, out.offsets
    ids: list[int] = []
    places: list[tuple[int, int]] = []
    at = 0
    for i, part in enumerate(special_pattern(whole).split(text)):
      known = self.token_id(part) if i % 2 else None
      part_ids, spans = self._pieces(part) if known is None else ([known], [(0, len(part))])
      ids += part_ids
      places += [(at + a, at + b) for a, b in spans]
      at += len(part)
    return ids, places

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each text, as `encode` does.

    All cores are used unless the environment has TOKENIZERS_PARALLELISM=false.
    """
    if self.kind == "sentencepiece":
      threads = 1 if os.environ.get("TOKENIZERS_PARALLELISM") == "false" else -1
      return self._backend.encode(list(texts), num_threads=threads)
    batch = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [e.ids for e in batch]

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of token ids.

    The text includes special tokens, except for a sentencepiece model's control pieces.

    Raises:
      InputError: If an id is not in the vocabulary.
    """
    ids = [int(i) for i in ids]
    if bad := [i for i in ids if not 0 <= i < self.vocab_size]:
      raise InputError(
        f"Token id {bad[0]} is outside the vocabulary of {self.where}, whose last id is "
        f"{self.vocab_size - 1}. Use the tokenizer that encoded the text."
      )
    if self.kind == "sentencepiece":
      return self._backend.decode(ids)
    return self._backend.decode(ids, skip_special_tokens=False)

  def piece(self, i: int) -> str | None:
    """Returns the vocabulary's entry of an id (see token_bytes.py), or None without one."""
    if self.kind == "huggingface":
      return self._backend.id_to_token(i)
    return None if self._backend.is_unused(i) else self._backend.id_to_piece(i)

  def token_id(self, token: str) -> int | None:
    """Returns the id of a token, or None if the vocabulary lacks it."""
    if self.kind == "sentencepiece":
      i = self._backend.piece_to_id(token)
      return i if self._backend.id_to_piece(i) == token else None
    return self._backend.token_to_id(token)

  @functools.cached_property
  def begin(self) -> list[int]:
    """The ids that the tokenizer puts before a text, e.g. a BOS or BERT's [CLS], or [].

    They are defined by the post-processor of a tokenizer.json. For a sentencepiece model, they are
    its BOS if it has one, as for Llama 2, Mistral and Gemma. `encode` does not add them.
    """
    if self.kind == "sentencepiece":
      bos = self._backend.bos_id()
      return [bos] if bos >= 0 else []
    return self._around[0]

  @property
  def end(self) -> list[int]:
    """The ids that the tokenizer puts after a text, e.g. BERT's [SEP], or []; see `begin`."""
    return [] if self.kind == "sentencepiece" else self._around[1]

  @functools.cached_property
  def _around(self) -> tuple[list[int], list[int]]:
    whole = tokenizers.Tokenizer.from_str(self.raw.decode()).encode("a").ids
    plain = self.encode("a")
    at = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:at], whole[at + len(plain) :]

  @functools.cached_property
  def special_tokens(self) -> tuple[str, ...]:
    """The special tokens; for sentencepiece, the control pieces and the unknown piece."""
    if self.kind == "huggingface":
      added = self._backend.get_added_tokens_decoder().values()
      return tuple(t.content for t in added if t.special)
    sp = self._backend
    ids = (i for i in range(self.vocab_size) if sp.is_control(i) or sp.is_unknown(i))
    return tuple(sp.id_to_piece(i) for i in ids)

  def _pieces(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Encodes a text without control pieces; see `encode_places`. For sentencepiece models only."""
    sp, spaced = self._backend, text.replace(SPACE, " ")
    if sp.normalize(text) != text.replace(" ", SPACE):
      raise InputError(
        f"{self.where} changes text or prepends a space before it encodes it. Its behaviour next "
        "to special tokens is defined only in a tokenizer.json: use that file."
      )
    ids, pieces = sp.encode(text), sp.encode(text, out_type=str)
    # The index of the character that each byte of the text belongs to.
    owner = [i for i, c in enumerate(spaced) for _ in c.encode()]
    places, at = [], 0
    for i, piece in zip(ids, pieces, strict=True):
      n = 1 if sp.is_byte(i) else len(piece.replace(SPACE, " ").encode())
      places.append((owner[at], owner[at + n - 1] + 1))
      at += n
    return ids, places

  @functools.cached_property
  def _backend(self) -> Any:
    return (_huggingface if self.kind == "huggingface" else _sentencepiece)(self.raw, self.where)

  def _special(
    self, given: str | int | None, names: Sequence[str], named: str | None
  ) -> int | None:
    if given is None:
      given = next((name for name in names if name in self.special_tokens), named)
    if given is None:
      return None
    if isinstance(given, int):
      if not 0 <= given < self.vocab_size:
        raise InputError(
          f"Token id {given} is outside the vocabulary of {self.where}, whose last id is "
          f"{self.vocab_size - 1}. Use another id."
        )
      return given
    if (i := self.token_id(given)) is None:
      raise InputError(f"{self.where} has no token {given!r}. Name a token of its vocabulary.")
    return i


def special_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
  """Returns a pattern that splits a text at these tokens and keeps them as every second part.

  If several tokens match at a place, the longest is used.
  """
  longest_first = sorted(filter(None, tokens), key=len, reverse=True)
  return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def load_tokenizer(
  source: str | Path, eos: str | int | None = None, bos: str | int | None = None
) -> Tokenizer:
  """Loads a tokenizer.json or a sentencepiece model.

  Args:
    source: The path or URL of the file, or of a folder that contains tokenizer.json or
      tokenizer.model (in this order); or the text of a tokenizer.json.
    eos: The token that ends a document, or its id. None: see `Tokenizer`; tokenizer_config.json is
      that next to the file.
    bos: The token that begins a text, or its id. None: chosen like `eos`.

  Raises:
    InputError: If the file is missing or not a tokenizer, or a token is not in the vocabulary.
  """
  if isinstance(source, str) and source.lstrip()[:1] == "{":
    return Tokenizer(source.encode(), "the JSON tokenizer", eos, bos)
  folder, name = locate(source)
  path, config = files.join(folder, name), files.join(folder, "tokenizer_config.json")
  data = files.read(config) if files.info(config) is not None else b"{}"
  named = json_io.parse_object(data, config, "Correct or remove it")
  return Tokenizer(files.read(path), path, eos, bos, named)


def locate(source: str | Path) -> tuple[str, str]:
  """Returns the folder of a tokenizer and the name of its file.

  Args:
    source: The path or URL of the file, or of a folder with tokenizer.json or tokenizer.model.

  Raises:
    InputError: If it does not exist.
  """
  path = str(source).rstrip("/")
  if files.info(path) is not None:
    folder, _, name = path.rpartition("/")
    return folder or ("/" if path.startswith("/") else "."), name
  there = files.listing(path)
  if found := [name for name in FILES.values() if name in there]:
    return path, found[0]
  if there or (not files.is_remote(path) and Path(path).is_dir()):
    raise InputError(f"{path} has no {' or '.join(FILES.values())}. Name a tokenizer's folder.")
  raise InputError(
    f"{path} does not exist. Name a tokenizer.json, a .model file, or a folder with one of them."
  )


def _huggingface(raw: bytes, where: str) -> tokenizers.Tokenizer:
  try:
    text = raw.decode()
    model = json.loads(text).get("model")
  except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
    raise InputError(f"{where} is not complete JSON ({e}). Use an intact tokenizer.json.") from e
  if not isinstance(model, dict):
    raise InputError(f"{where} is JSON without a 'model'. Use a Hugging Face tokenizer.json.")
  try:
    backend = tokenizers.Tokenizer.from_str(text)
  except BaseException as e:
    # The library raises `Exception` itself; subclasses are other errors.
    if type(e) is not Exception:
      raise
    raise InputError(
      f"{where} is not a tokenizer that `tokenizers` can read ({e}). Use an intact tokenizer.json."
    ) from e
  # Many files set truncation and padding, which must not change a corpus. The post-processor is
  # removed because it may change offsets; the special tokens that it adds are never requested.
  backend.no_truncation()
  backend.no_padding()
  backend.post_processor = None
  return backend


def _sentencepiece(raw: bytes, where: str) -> sentencepiece.SentencePieceProcessor:
  if not raw:  # sentencepiece accepts empty bytes as an uninitialised model
    raise InputError(f"{where} is empty. Use a tokenizer.json or a sentencepiece model.")
  try:
    return sentencepiece.SentencePieceProcessor(model_proto=raw)
  except RuntimeError as e:
    raise InputError(
      f"{where} is neither a Hugging Face tokenizer.json nor an intact sentencepiece model. Use "
      "one of the two."
    ) from e
