"""A config's corpus as packed sequences: source, tokenizer and packing put together."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from distill_jax.data import chat_dataset, packing, sources, tokenizers
from distill_jax.data.chat_template import ChatTemplate
from distill_jax.data.options import DataOptions
from distill_jax.errors import InputError
from distill_jax.hub.pretrained import Pretrained
from distill_jax.hub.tokenizer import TokenizerFiles, check_vocabulary, read_tokenizer

BATCH = 256  # documents tokenized at once


def tokenizer_of(data: DataOptions, pretrained: Pretrained | None) -> tokenizers.Tokenizer:
  """Loads the tokenizer that a config names, or the model's own."""
  if data.tokenizer:
    return tokenizers.load_tokenizer(data.tokenizer)
  if pretrained is None or pretrained.tokenizer is None:
    raise InputError("the model brings no tokenizer; name one in data.tokenizer")
  return of_files(pretrained.tokenizer, pretrained.source)


def of_files(files: TokenizerFiles, source: str) -> tokenizers.Tokenizer:
  """Returns the tokenizer of the model `source`."""
  raw = files.json.encode() if files.json is not None else files.sentencepiece
  assert raw is not None
  # Documents end with the vocabulary's own document end, not with what ends a chat's turn.
  return tokenizers.Tokenizer(raw, f"the tokenizer of {source}", None, None)


def source_of(data: DataOptions) -> sources.DocumentSource:
  """Returns where a config's documents come from."""
  names = (f.name for f in dataclasses.fields(sources.DocumentSource))
  return sources.DocumentSource(**{name: getattr(data, name) for name in names})


def template_of(data: DataOptions, pretrained: Pretrained | None) -> ChatTemplate:
  """Returns the chat template of the tokenizer that a config names, or of the model's own."""
  name = data.tokenizer or (pretrained.source if pretrained else "the model")
  files = files_of(data, pretrained)
  if files is None:
    raise InputError(f"{name} brings no tokenizer, and so no chat template; set data.tokenizer")
  return ChatTemplate.of(files, name)


def files_of(data: DataOptions, pretrained: Pretrained | None) -> TokenizerFiles | None:
  """Returns the files of the tokenizer that a config names, or of the model's own, or None."""
  if not data.tokenizer:
    return pretrained.tokenizer if pretrained else None
  path = Path(data.tokenizer)
  return read_tokenizer(path if path.is_dir() else path.parent)


def sequences(
  data: DataOptions, tokenizer: tokenizers.Tokenizer, pretrained: Pretrained | None = None
) -> Iterator[dict[str, np.ndarray]]:
  """Yields packed sequences in corpus order, at most `data.sequences`, as records without targets.

  Chats are rendered by the template of `pretrained`, or of data.tokenizer. They are packed whole,
  and only the assistant's tokens are trained on.

  Other documents begin with what the tokenizer begins a text with, as prompts do
  (generation/prompts.py), and end with a document's end.

  Yields:
    {tokens_T int32, segments_T int32, mask_T bool}. Unlike packing's mask of tokens, `mask_T` is
    True at positions whose label is trained on. With data.trust, smoothing_T float32 too.
  """
  if data.trust and data.kind != "chat":
    raise InputError(f"data.trust is {data.trust!r} and data.kind {data.kind!r}; it is for chats")
  if data.kind == "chat":
    template = template_of(data, pretrained)
    chats = chat_dataset.tokenized_chats(
      source_of(data), tokenizer, template, data.seq_len, data.on_bad, data.trust
    )
    packed = packing.pack(chats, data.seq_len, None, whole=True)
  else:
    packed = packing.pack(_tokens(data, tokenizer), data.seq_len, tokenizer.eos_id)
  for row in itertools.islice(packed, data.sequences or None):
    yield row.record() | ({"smoothing_T": row.smoothing_T} if data.trust else {})


def check(data: DataOptions, tokenizer: tokenizers.Tokenizer, rows: int, max_len: int) -> None:
  """Refuses a tokenizer or a sequence length that the model cannot read.

  Args:
    data: the corpus.
    tokenizer: its tokenizer.
    rows: of the model's embedding.
    max_len: the longest sequence that the model reads.
  """
  check_vocabulary(tokenizer.vocab_size, rows, tokenizer.where)
  if data.seq_len > max_len:
    raise InputError(
      f"data.seq_len is {data.seq_len} and the model reads at most {max_len} tokens; lower it"
    )


def _tokens(data: DataOptions, tokenizer: tokenizers.Tokenizer) -> Iterator[list[int]]:
  documents = sources.documents(source_of(data))
  while batch := list(itertools.islice(documents, BATCH)):
    yield from ([*tokenizer.begin, *ids] for ids in tokenizer.encode_batch(batch))
