"""Bits per byte of held-out texts, which compares models with different tokenizers.

A model's loss per token depends on its tokenizer. The probability of the bytes of a text does not:
all models are scored on the same bytes. So texts are cut only where the tokens of all tokenizers
end. A text begins with the tokens that its tokenizer puts first, e.g. a BOS, as in training. The
bytes up to the first place where all tokens end are not scored, because many models have no token
before them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from distill_jax.config import Config
from distill_jax.cross_tokenizer.vocabulary import Vocabulary
from distill_jax.data import corpus, sources
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError, bad_value
from distill_jax.evals.likelihood import Pair, Scorer
from distill_jax.evals.model_slot import ModelSlot
from distill_jax.models.loading import ModelSource
from distill_jax.types import JsonObject

Located = tuple[np.ndarray, np.ndarray]  # ids, and places of tokens among bytes; Vocabulary.locate


@dataclasses.dataclass
class SharedTexts:
  """Texts in the tokens of several tokenizers, cut at the same bytes.

  Attributes:
    pairs: by the digest of the tokenizer, the parts of all texts in the same order.
    texts: the number of texts.
    bytes: the number of scored bytes.
    skipped: the number of texts that a tokenizer does not spell, or that cannot be cut.
  """

  pairs: dict[str, list[Pair]]
  texts: int = 0
  bytes: int = 0
  skipped: int = 0


def measure(config: Config, models: Mapping[str, ModelSlot]) -> JsonObject:
  """Scores the first held-out texts of `data` with every model, one after the other.

  The tokens of all texts are in memory, about 8 bytes per byte of text and tokenizer.

  Args:
    config: The config; evaluate.texts is the number of texts.
    models: The models by name.

  Returns:
    models: by name, {bits_per_byte, bytes_per_token}; texts, bytes and skipped, see SharedTexts;
    corpus: the name of the corpus.

  Raises:
    InputError: `data` has chats, no text can be scored, or a model is too short for data.seq_len.
  """
  data = dataclasses.replace(config.data, split="heldout")
  if data.kind == "chat" or config.tasks:
    expected = "0, because the data are not plain texts"
    raise bad_value("evaluate.texts", config.evaluate.texts, expected, "Set it to 0")
  tokenizers = {name: own_tokenizer(config, slot.source) for name, slot in models.items()}
  for name, slot in models.items():
    shape = slot.source.text_config
    corpus.check(data, tokenizers[name], shape.vocab_size, shape.max_position_embeddings)
  vocabularies = {t.digest: Vocabulary(t) for t in tokenizers.values()}
  documents = sources.documents(corpus.source_of(data))
  shared = share(documents, vocabularies, data.seq_len, config.evaluate.texts)
  if not shared.bytes:
    raise InputError(
      f"No held-out text of {data.kind} {data.path} can be scored in the tokens of all models. "
      "Choose another corpus, or set evaluate.texts=0."
    )
  rows = {}
  for name, slot in models.items():
    tokenizer, c = tokenizers[name], config.evaluate
    pairs = shared.pairs[tokenizer.digest]
    scorer = Scorer(slot.stacked(), slot.mesh, tokenizer, c.batch_size, c.chunk)
    nats = -math.fsum(s.logp for s in scorer(pairs))
    tokens = sum(len(pair.scored) for pair in pairs)
    rows[name] = {
      "bits_per_byte": nats / math.log(2) / shared.bytes,
      "bytes_per_token": shared.bytes / tokens,
    }
    del scorer  # it holds the weights
    slot.release()
  return {
    "models": rows,
    "texts": shared.texts,
    "bytes": shared.bytes,
    "skipped": shared.skipped,
    "corpus": f"{data.kind} {data.path} heldout",
  }


def own_tokenizer(config: Config, model: ModelSource) -> Tokenizer:
  """Returns a model's own tokenizer; that of data.tokenizer for a model without one."""
  if model.tokenizer is not None:
    return corpus.of_files(model.tokenizer, model.name)
  return corpus.tokenizer_of(config.data, None)


def share(
  documents: Iterable[str], vocabularies: Mapping[str, Vocabulary], seq_len: int, limit: int
) -> SharedTexts:
  """Returns texts in the tokens of all tokenizers.

  Args:
    documents: The texts.
    vocabularies: The vocabularies by the digest of their tokenizers.
    seq_len: The maximum number of tokens that a model reads at once.
    limit: The maximum number of texts.
  """
  shared = SharedTexts({digest: [] for digest in vocabularies})
  for text in documents:
    if shared.texts == limit:
      break
    located = [_locate(v, text) for v in vocabularies.values()]
    known = [x for x in located if x is not None]
    parts = cut(known, seq_len) if len(known) == len(located) else None
    if parts is None:
      shared.skipped += 1
      continue
    shared.texts += 1
    for pairs, places, (ids, _) in zip(shared.pairs.values(), parts, known, strict=True):
      pairs += [Pair(ids[a:b].tolist(), ids[b:c].tolist()) for a, b, c in places]
    first = known[0][1][parts[0][0][1]] if parts[0] else len(text.encode())
    shared.bytes += len(text.encode()) - int(first)
  return shared


def _locate(vocabulary: Vocabulary, text: str) -> Located | None:
  """Returns `Vocabulary.locate` with the tokens that begin a text, which have no bytes."""
  found = vocabulary.locate(text)
  if found is None:
    return None
  ids, places = found
  begin = np.array(vocabulary.tokenizer.begin, ids.dtype)
  return np.append(begin, ids), np.append(np.full(len(begin), places[0]), places)


def cut(located: Sequence[Located], seq_len: int) -> list[list[tuple[int, int, int]]] | None:
  """Cuts a text where all tokenizers have the end of a token, into the longest parts that fit.

  A part after the first one has one token of the part before it as its context.

  Args:
    located: The text in the tokens of each tokenizer.
    seq_len: The maximum number of tokens that a model reads at once, the last one not counted.

  Returns:
    For each tokenizer, (first token of the context, first scored token, end) of each part; no parts
    if the text has one token only. None if there is a part that cannot be made short enough.
  """
  ends = [ends for _, ends in located]
  common = functools.reduce(np.intersect1d, ends)
  common = common[common > 0]
  # [tokenizers, places]: the number of tokens before each place.
  before = np.stack([np.searchsorted(e, common) for e in ends])
  parts: list[list[tuple[int, int, int]]] = [[] for _ in located]
  at, last = 0, before.shape[1] - 1
  while at < last:
    begins = before[:, at] - 1 if at else np.zeros(len(ends), np.int64)
    starts = zip(begins, before, strict=True)
    fitting = min(int(np.searchsorted(b, a + seq_len + 1, "right")) for a, b in starts)
    end = min(fitting - 1, last)
    if end <= at:
      return None
    for part, a, b, c in zip(parts, begins, before[:, at], before[:, end], strict=True):
      part.append((int(a), int(b), int(c)))
    at = end
  return parts
