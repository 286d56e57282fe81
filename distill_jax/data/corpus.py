"""The corpus of a config as packed sequences."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from distill_jax.data import packing, sources, tokenizers
from distill_jax.data.block_tokenizer import BlockTokenizer
from distill_jax.data.chat_dataset import ChatTokenizer
from distill_jax.data.chat_template import ChatTemplate
from distill_jax.data.corpus_stream import CorpusStream
from distill_jax.data.options import DataOptions
from distill_jax.errors import InputError, bad_value
from distill_jax.hub.pretrained import Pretrained
from distill_jax.hub.tokenizer import TokenizerFiles, check_vocabulary, read_tokenizer


def tokenizer_of(data: DataOptions, pretrained: Pretrained | None) -> tokenizers.Tokenizer:
  """Returns the tokenizer set in data.tokenizer, or the model's tokenizer.

  Raises:
    InputError: If neither exists.
  """
  if data.tokenizer:
    return tokenizers.load_tokenizer(data.tokenizer)
  if pretrained is None or pretrained.tokenizer is None:
    raise InputError("The model has no tokenizer. Set data.tokenizer.")
  return of_files(pretrained.tokenizer, pretrained.source)


def of_files(files: TokenizerFiles, source: str) -> tokenizers.Tokenizer:
  """Returns a model's tokenizer, given its files.

  Args:
    files: The model's tokenizer files.
    source: The model's name, for messages.
  """
  raw = files.json.encode() if files.json is not None else files.sentencepiece
  assert raw is not None
  return tokenizers.Tokenizer(raw, f"the tokenizer of {source}", named=files.config)


def source_of(data: DataOptions) -> sources.DocumentSource:
  """Returns the source of a config's documents."""
  names = (f.name for f in dataclasses.fields(sources.DocumentSource))
  try:
    return sources.DocumentSource(**{name: getattr(data, name) for name in names})
  except InputError as e:
    raise InputError(f"data.{e}") from e


def template_of(data: DataOptions, pretrained: Pretrained | None) -> ChatTemplate:
  """Returns the chat template that belongs to data.tokenizer or to the model.

  Raises:
    InputError: If there is no tokenizer or no chat template.
  """
  name = data.tokenizer or (pretrained.source if pretrained else "The model")
  files = files_of(data, pretrained)
  if files is None:
    raise InputError(f"{name} has no tokenizer, and thus no chat template. Set data.tokenizer.")
  return ChatTemplate.of(files, name)


def files_of(data: DataOptions, pretrained: Pretrained | None) -> TokenizerFiles | None:
  """Returns the files of the tokenizer set in data.tokenizer, or of the model's, or None."""
  if not data.tokenizer:
    return pretrained.tokenizer if pretrained else None
  return files_at(data.tokenizer)


def files_at(path: str) -> TokenizerFiles:
  """Returns the files of the tokenizer at the path or URL of a folder, or of a file of any name.

  Raises:
    InputError: It does not exist.
  """
  folder, name = tokenizers.locate(path)
  found = read_tokenizer(folder, name if path.rpartition("/")[2] == name else "")
  assert found is not None  # `locate` has found its file
  return found


def block_tokenizer(
  data: DataOptions, tokenizer: tokenizers.Tokenizer, pretrained: Pretrained | None = None
) -> BlockTokenizer:
  """Returns what turns the blocks of a config's corpus into tokens.

  Chats are rendered by the template that belongs to data.tokenizer or `pretrained`.

  Args:
    data: The config section `data`.
    tokenizer: The tokenizer.
    pretrained: The model whose chat template is used unless data.tokenizer is set.

  Raises:
    InputError: If data.trust is set for a corpus without chats, or there is no chat template.
  """
  if data.trust and data.kind != "chat":
    raise bad_value(
      "data.trust", data.trust, f"'' for data.kind={data.kind!r}", "Use it only for chats"
    )
  chats = None
  if data.kind == "chat":
    template = template_of(data, pretrained)
    chats = ChatTokenizer(tokenizer, template, data.seq_len, data.trust)
  return BlockTokenizer(source_of(data), tokenizer, chats, data.on_bad)


def packer(data: DataOptions) -> packing.Packer:
  """Returns what packs the tokens of a corpus into rows.

  Text is concatenated and cut by default: no space is lost, and also half of a document can be
  trained on. Chats are whole, because an answer means little without its question.
  """
  if data.buckets or data.whole or data.kind == "chat":
    return packing.BestFitPacker(data.buckets or (data.seq_len,))
  return packing.CutPacker(data.seq_len)


def record(row: packing.PackedRow, data: DataOptions) -> dict[str, np.ndarray]:
  """Returns a row as a record without targets.

  It has tokens_T int32 [T], segments_T int32 [T] and mask_T bool [T], where mask_T is True at
  positions whose label (the next token) is trained on. With data.trust, also smoothing_T
  float32 [T].
  """
  return row.record() | ({"smoothing_T": row.smoothing_T} if data.trust else {})


def sequences(
  data: DataOptions, tokenizer: tokenizers.Tokenizer, pretrained: Pretrained | None = None
) -> Iterator[dict[str, np.ndarray]]:
  """Yields at most `data.sequences` packed sequences of `data.seq_len` tokens, in this process.

  `records/packed_text.py` packs a large corpus with several processes into a store of these rows,
  or into one store for each of data.buckets.

  Args:
    data: The config section `data`.
    tokenizer: The tokenizer.
    pretrained: See `block_tokenizer`.

  Yields:
    See `record`.

  Raises:
    InputError: If the corpus cannot be read.
  """
  one_length = data.buckets[-1:]  # as whole documents, like those of several lengths
  packer_ = packer(dataclasses.replace(data, buckets=one_length))
  stream = CorpusStream(block_tokenizer(data, tokenizer, pretrained), packer_)
  for row in itertools.islice(stream.rows(), data.sequences or None):
    yield record(row, data)


def check(data: DataOptions, tokenizer: tokenizers.Tokenizer, rows: int, max_len: int) -> None:
  """Checks that the model supports the tokenizer and the sequence length.

  Args:
    data: The config section `data`.
    tokenizer: The tokenizer of the corpus.
    rows: The number of rows of the model's embedding.
    max_len: The model's maximum sequence length.

  Raises:
    InputError: If the vocabulary or the sequence length is too large.
  """
  check_vocabulary(tokenizer.vocab_size, rows, tokenizer.where)
  if data.seq_len > max_len:
    raise bad_value(
      "data.seq_len", data.seq_len, f"at most {max_len}, the model's limit", "Reduce it"
    )
