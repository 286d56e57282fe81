"""The bytes of every id of a tokenizer.

An id has bytes if the tokenizer's own decoder writes it as text and no role claims it. So these ids
have no bytes; they are the control tokens:

  - the tokens that end or begin a text, and the unknown token;
  - the stop tokens that the caller names (a model's generation config), and the tokens that a chat
    template writes around messages, such as DeepSeek's <｜User｜>;
  - special tokens, which decoders omit from the text that users see;
  - ids without an entry in the vocabulary, such as the unused rows of an embedding.

All other added tokens are literal text, e.g. <think>, <tool_call> and the runs of spaces of Gemma:
a student that lacks such a token spells its text. A role takes precedence over bytes: name pairs of
tokens in `retarget.roles` where two models write the same thing differently.

Most tokenizers also make a control token from its text spelt out in a document, e.g. a page about
"<|im_end|>". Neither model reads such a text as its characters, so it cannot be aligned: `locate`
returns None if a tokenizer makes a control token, as for any text that it does not spell.
"""

from __future__ import annotations

import collections
import functools
import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distill_jax.data import token_bytes
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.hub.special_tokens import EOS
from distill_jax.runtime import extras

if TYPE_CHECKING:  # worker processes must not import jax
  from distill_jax.types import JsonObject

# Tokens that end a turn. The names count only if the tokenizer has them as special tokens.
TURN_ENDS = (
  *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|return|>"),
  *("<|end_of_turn|>", "<|eot|>", "<|END_OF_TURN_TOKEN|>"),
)


class Vocabulary:
  """The bytes of a tokenizer's ids. It can be pickled.

  Building it takes about a second for 150,000 ids, and 30 MB.

  Args:
    tokenizer: The tokenizer.
    stops: Further ids that end a text, e.g. from `roles.stop_set`.
    end: The id that ends what the model writes in the texts at hand: in chats the token that ends
      a turn. None: the tokenizer's EOS.
    markers: The ids that the chat template writes around messages; see `chat_markers`.

  Attributes:
    tokenizer: See Args.
    digest: The tokenizer's digest.
    size: The number of ids, V. Ids from `size` on (unused rows of an embedding) have no bytes.
    bytes_V: The bytes of each id; None for a control token.
    length_V: int32, the number of bytes of each id; 0 for a control token.
    id_of: The id that the tokenizer makes for some bytes. A byte-fallback token never takes the
      place of a piece with the same byte.
    longest: The largest number of bytes of an id.
    control: The ids without bytes.
    end: The id that ends a text, or None.
    stops: All ids that end a text, including `end`.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    stops: Iterable[int] = (),
    end: int | None = None,
    markers: Iterable[int] = (),
  ):
    self.tokenizer, self.digest = tokenizer, tokenizer.digest
    self.size = tokenizer.vocab_size
    self.end = tokenizer.eos_id if end is None else end
    own = {i for i in (self.end, tokenizer.eos_id) if i is not None}
    self.stops = frozenset(_stops(tokenizer) | own | {*stops})
    special = {tokenizer.token_id(token) for token in tokenizer.special_tokens}
    roles = self.stops | special | {*markers} | {tokenizer.bos_id, _unknown(tokenizer)}
    of = token_bytes.reader(tokenizer)
    self.bytes_V = [None if i in roles else of(i) or None for i in range(self.size)]
    self.length_V = np.array([len(b or b"") for b in self.bytes_V], np.int32)
    self.control = frozenset(np.flatnonzero(self.length_V == 0).tolist())
    self.longest = int(self.length_V.max())
    self.id_of = self._ids()

  def __getstate__(self) -> JsonObject:
    return {k: v for k, v in self.__dict__.items() if k != "_inner"}

  def spell(self, ids: Sequence[int] | np.ndarray) -> bytes:
    """Returns the bytes of ids. Control tokens, and ids from `size` on, spell nothing."""
    ids = ids.tolist() if isinstance(ids, np.ndarray) else ids
    bytes_V = self.bytes_V
    try:
      return b"".join([bytes_V[i] for i in ids])  # type: ignore[misc]
    except (IndexError, TypeError):
      return b"".join([bytes_V[i] or b"" if i < self.size else b"" for i in ids])

  def places(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the places at which ids begin and end, int64, on an axis of their bytes.

    A control token has one place on the axis.
    """
    length = np.maximum(self.length_V[ids], 1).astype(np.int64)
    ends = np.cumsum(length)
    return ends - length, ends

  @functools.cached_property
  def has_dummy_space(self) -> bool:
    """True if the tokenizer puts a space before a text, as that of Llama 2 does."""
    letter = self.locate("a")
    return letter is not None and bool(letter[1][0] < 0)

  def locate(self, text: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the tokens of a text and their places among its bytes.

    Args:
      text: A text, from its beginning.

    Returns:
      The ids, int64 [n], and the place where each begins and the last one ends, int64 [n + 1]. A
      dummy prefix (the space that e.g. Llama 2 puts before a text) begins at -1. None if the tokens
      do not spell the text: the tokenizer changes it, or makes a control token from it.
    """
    ids = np.array(self.tokenizer.encode(text), np.int64)
    raw, spelt = text.encode(), self.spell(ids)
    if spelt not in (raw, b" " + raw):
      return None
    ends = np.zeros(len(ids) + 1, np.int64)
    np.cumsum(self.length_V[ids], out=ends[1:])
    return ids, ends - (len(spelt) - len(raw))

  def encode_inner(self, text: str) -> list[int]:
    """Returns the ids of a text from the middle of a document, without a dummy prefix."""
    return self._inner.encode(text)

  @functools.cached_property
  def _inner(self) -> Tokenizer:
    """The tokenizer without its dummy prefix."""
    whole = self.tokenizer
    if whole.kind == "sentencepiece":
      with extras.needed("train"):
        from sentencepiece import sentencepiece_model_pb2

      proto: Any = sentencepiece_model_pb2
      model = proto.ModelProto.FromString(whole.raw)
      changed, model.normalizer_spec.add_dummy_prefix = (
        model.normalizer_spec.add_dummy_prefix,
        False,
      )
      raw = model.SerializeToString()
    else:
      parsed = json.loads(whole.raw)
      parts = {key: _without_prefix(parsed.get(key)) for key in ("normalizer", "pre_tokenizer")}
      changed = any(parts[key] != parsed.get(key) for key in parts)
      raw = json.dumps(parsed | parts).encode()
    return Tokenizer(raw, whole.where, whole.eos_id, whole.bos_id) if changed else whole

  def _ids(self) -> dict[bytes, int]:
    """Returns `id_of`."""
    groups: dict[bytes, list[int]] = collections.defaultdict(list)
    for i, b in enumerate(self.bytes_V):
      if b is not None:
        groups[b].append(i)
    return {b: ids[0] if len(ids) == 1 else self._made(b, ids) for b, ids in groups.items()}

  def _made(self, b: bytes, ids: Sequence[int]) -> int:
    """Returns the one of several ids with the same bytes that the tokenizer makes."""
    try:
      made = self.encode_inner(b.decode())
    except UnicodeDecodeError:
      made = []
    if len(made) == 1 and made[0] in ids:
      return made[0]
    return min(ids, key=lambda i: (is_fallback(self.tokenizer.piece(i)), i))


def is_fallback(piece: str | None) -> bool:
  """Returns True for the name of a byte-fallback token, e.g. <0x0A>."""
  return re.fullmatch("<0x[0-9A-F]{2}>", piece or "") is not None


def _stops(tokenizer: Tokenizer) -> set[int]:
  """Returns the ids of the special tokens whose names end texts or turns."""
  named = {*EOS, *TURN_ENDS} & {*tokenizer.special_tokens}
  return {i for name in named if (i := tokenizer.token_id(name)) is not None}


def _unknown(tokenizer: Tokenizer) -> int | None:
  """Returns the id of a tokenizer.json's unknown token, or None."""
  if tokenizer.kind == "sentencepiece":  # it is one of the special tokens
    return None
  model = json.loads(tokenizer.raw)["model"]
  token = model.get("unk_token")
  return model.get("unk_id") if token is None else tokenizer.token_id(token)


def _without_prefix(part: Any) -> Any:
  """Returns a normalizer or pre-tokenizer of a tokenizer.json that adds no space before a text."""
  if not isinstance(part, dict):
    return part
  if part.get("type") == "Prepend":
    return None
  part = dict(part)
  for key in ("normalizers", "pretokenizers"):
    if key in part:
      part[key] = [p for p in map(_without_prefix, part[key]) if p is not None]
  if "add_prefix_space" in part:
    part["add_prefix_space"] = False
  if "prepend_scheme" in part:
    part["prepend_scheme"] = "never"
  return part
