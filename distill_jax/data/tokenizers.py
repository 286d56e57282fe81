"""Text to token ids and back: Hugging Face tokenizer.json and sentencepiece models.

`load_tokenizer` is the one way in; the two kinds cannot be told apart afterwards.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from distill_jax.errors import InputError
from distill_jax.runtime import extras, json_io
from distill_jax.types import JsonObject

with extras.needed("train"):
  import sentencepiece
  import tokenizers

FILES = {"huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model"}
# Looked for in this order where nothing names them. A document's end comes before a
# turn's end: packing separates documents.
EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "<|im_end|>")
BOS = ("<|begin_of_text|>", "<s>", "<bos>", "<｜begin▁of▁sentence｜>", "<|im_start|>")

SPACE = "\u2581"  # how sentencepiece spells a space


class Tokenizer:
  """A tokenizer of either kind. Picklable: it is its file, and the backend is made anew.

  Attributes:
    kind: "huggingface" or "sentencepiece".
    raw: the file, byte for byte.
    filename: what the file is called in a model's folder.
    vocab_size: the largest id + 1: the rows that an embedding table must have.
    eos_id, bos_id: ids, or None where there is none.
    digest: sha256 of what the file says (a JSON file's spacing does not count).
  """

  def __init__(self, raw: bytes, where: str, eos: str | int | None, bos: str | int | None):
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
      raise InputError(f"{where}: a tokenizer without a vocabulary; give a whole one")
    self.digest = hashlib.sha256(canonical).hexdigest()
    self.eos_id, self.bos_id = self._special(eos, EOS), self._special(bos, BOS)

  def __repr__(self) -> str:
    return f"Tokenizer({self.where}, {self.kind}, vocab_size={self.vocab_size})"

  def __getstate__(self) -> JsonObject:
    return {k: v for k, v in self.__dict__.items() if k != "_backend"}

  def encode(self, text: str) -> list[int]:
    """Ids of a text, with nothing added before or after it.

    Special tokens spelt out in the text of a Hugging Face tokenizer become those tokens,
    as they do in transformers.
    """
    if self.kind == "sentencepiece":
      return self._backend.encode(text)
    return self._backend.encode(text, add_special_tokens=False).ids

  def encode_places(
    self, text: str, special: Iterable[str] = ()
  ) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a text as transformers gives them, and the characters that each stands for.

    Unlike `encode`, it takes a sentencepiece model's control pieces for what they are
    wherever the text spells them out, as transformers does.

    Args:
      special: more tokens that are a token each wherever the text has them.

    Returns:
      ids, and for each the (start, end) of its characters. Where several share one, the
      last or all of them have it; what stands for nothing in the text has start == end.

    Raises:
      InputError: the text has one of `special` and the tokenizer does not; a sentencepiece
        model that changes text, or puts a space before it, as it encodes.
    """
    hugging = self.kind == "huggingface"
    added = self._backend.get_added_tokens_decoder().values() if hugging else ()
    whole = {t.content for t in added} if hugging else {*self.special_tokens, *special}
    if lost := [s for s in special if s in text and (s not in whole or self.token_id(s) is None)]:
      raise InputError(
        f"{self.where} has no special token {lost[0]!r}, which this text is written with; take "
        "the tokenizer that belongs to it"
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
    """`encode` of each text, on all cores."""
    if self.kind == "sentencepiece":
      return self._backend.encode(list(texts))
    batch = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [e.ids for e in batch]

  def decode(self, ids: Sequence[int]) -> str:
    """Text of ids. Special tokens are spelt out (sentencepiece leaves control pieces out)."""
    ids = [int(i) for i in ids]
    if bad := [i for i in ids if not 0 <= i < self.vocab_size]:
      raise InputError(
        f"token id {bad[0]} is outside {self.where}, which ends at {self.vocab_size - 1}; decode "
        "with the tokenizer that made it"
      )
    if self.kind == "sentencepiece":
      return self._backend.decode(ids)
    return self._backend.decode(ids, skip_special_tokens=False)

  def token_id(self, token: str) -> int | None:
    """The id of one token by its name; None where there is no such token."""
    if self.kind == "sentencepiece":
      i = self._backend.piece_to_id(token)
      return i if self._backend.id_to_piece(i) == token else None
    return self._backend.token_to_id(token)

  @functools.cached_property
  def begin(self) -> list[int]:
    """What a text begins with by the tokenizer's own rule: a BOS, BERT's [CLS], or nothing.

    A tokenizer.json says so in its post-processor; a sentencepiece model that has a BOS is
    given it, as Llama 2, Mistral and Gemma are. `encode` adds nothing.
    """
    if self.kind == "sentencepiece":
      bos = self._backend.bos_id()
      return [bos] if bos >= 0 else []
    return self._around[0]

  @property
  def end(self) -> list[int]:
    """What a tokenizer.json's post-processor puts behind a text: BERT's [SEP], or nothing."""
    return [] if self.kind == "sentencepiece" else self._around[1]

  @functools.cached_property
  def _around(self) -> tuple[list[int], list[int]]:
    whole = tokenizers.Tokenizer.from_str(self.raw.decode()).encode("a").ids
    plain = self.encode("a")
    at = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:at], whole[at + len(plain) :]

  @functools.cached_property
  def special_tokens(self) -> tuple[str, ...]:
    """The tokens that are no text: marked special, or control pieces and the unknown one."""
    if self.kind == "huggingface":
      added = self._backend.get_added_tokens_decoder().values()
      return tuple(t.content for t in added if t.special)
    sp = self._backend
    ids = (i for i in range(self.vocab_size) if sp.is_control(i) or sp.is_unknown(i))
    return tuple(sp.id_to_piece(i) for i in ids)

  def _pieces(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """`encode_places` of a text between control pieces of a sentencepiece model."""
    sp, spaced = self._backend, text.replace(SPACE, " ")
    if sp.normalize(text) != text.replace(" ", SPACE):
      raise InputError(
        f"{self.where} changes text before it encodes it, or puts a space first; what becomes of "
        "that beside special tokens is for each model's tokenizer.json to say: give that"
      )
    ids, pieces = sp.encode(text), sp.encode(text, out_type=str)
    # A byte of the text after another, and the character that it belongs to.
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

  def _special(self, given: str | int | None, names: Sequence[str]) -> int | None:
    if isinstance(given, int):
      if not 0 <= given < self.vocab_size:
        raise InputError(f"{given} is no token of {self.where}; ids end at {self.vocab_size - 1}")
      return given
    if given is None:
      ids = [i for name in names if (i := self.token_id(name)) is not None]
      return ids[0] if ids else None
    if (i := self.token_id(given)) is None:
      raise InputError(f"{self.where} has no token {given!r}; name one that is in its vocabulary")
    return i


def special_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
  """Returns what splits a text at these tokens and keeps them, as every second part.

  Where several match, the longest does.
  """
  longest_first = sorted(filter(None, tokens), key=len, reverse=True)
  return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def load_tokenizer(
  source: str | Path, eos: str | int | None = None, bos: str | int | None = None
) -> Tokenizer:
  """Loads a tokenizer.json or a sentencepiece model.

  Args:
    source: the file, a folder that holds tokenizer.json or tokenizer.model (the first is
      taken where both are), or the JSON text itself.
    eos, bos: a token or its id. Without: what tokenizer_config.json beside the file says,
      or else the first of `EOS` and `BOS` that the vocabulary has, or None.

  Raises:
    InputError: a file that is missing or of neither kind, or a token it does not have.
  """
  if isinstance(source, str) and source.lstrip()[:1] == "{":
    return Tokenizer(source.encode(), "the tokenizer given as JSON", eos, bos)
  path = Path(source)
  if path.is_dir():
    if not (files := [path / name for name in FILES.values() if (path / name).is_file()]):
      raise InputError(f"{path} holds no {' or '.join(FILES.values())}; name a tokenizer's folder")
    path = files[0]
  if not path.is_file():
    raise InputError(f"{path} is not there; name a tokenizer.json, a .model file or their folder")
  named = _named_tokens(path.parent / "tokenizer_config.json")
  return Tokenizer(
    path.read_bytes(),
    str(path),
    named.get("eos_token") if eos is None else eos,
    named.get("bos_token") if bos is None else bos,
  )


def _huggingface(raw: bytes, where: str) -> tokenizers.Tokenizer:
  try:
    text = raw.decode()
    model = json.loads(text).get("model")
  except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
    raise InputError(f"{where} is not whole JSON ({e}); give a tokenizer.json as saved") from e
  if not isinstance(model, dict):
    raise InputError(f"{where} is JSON without a 'model'; give a Hugging Face tokenizer.json")
  try:
    backend = tokenizers.Tokenizer.from_str(text)
  except BaseException as e:
    # The library raises bare `Exception`; its subclasses are somebody else's.
    if type(e) is not Exception:
      raise
    raise InputError(
      f"{where} is no tokenizer that `tokenizers` can read ({e}); give a tokenizer.json as saved"
    ) from e
  # Many files carry a length limit and padding; neither may touch a corpus,
  # and what a post-processor adds is never asked for, but it may narrow offsets.
  backend.no_truncation()
  backend.no_padding()
  backend.post_processor = None
  return backend


def _sentencepiece(raw: bytes, where: str) -> sentencepiece.SentencePieceProcessor:
  wrong = f"{where} is neither a Hugging Face tokenizer.json nor a whole sentencepiece model"
  if not raw:  # which sentencepiece takes for an uninitialised model
    raise InputError(f"{wrong}: it is empty; give one of the two")
  try:
    return sentencepiece.SentencePieceProcessor(model_proto=raw)
  except RuntimeError as e:
    raise InputError(f"{wrong}; give one of the two") from e


def _named_tokens(config: Path) -> dict[str, str]:
  """Returns the eos_token and bos_token that a tokenizer_config.json names."""
  if not config.is_file():
    return {}
  fields = json_io.parse_object(config.read_bytes(), str(config), "Correct or remove it")
  tokens = {k: fields.get(k) for k in ("eos_token", "bos_token")}
  # An added token is spelt as a string, or as an object that holds it.
  return {k: v["content"] if isinstance(v, dict) else v for k, v in tokens.items() if v}
