"""The beginning of a corpus, from which the size of the whole corpus is estimated."""

from __future__ import annotations

from typing import NamedTuple

from distill_jax.data import jsonl, sources
from distill_jax.data.sources import DocumentSource

ENOUGH = 16_000_000  # bytes


class Beginning(NamedTuple):
  """The documents at the beginning of a corpus.

  Attributes:
    documents: The documents of the source's split.
    scale: The number of all documents per document that was read; 1 if all of them were.
  """

  documents: list[str]
  scale: float


def read(source: DocumentSource) -> Beginning:
  """Reads the first ENOUGH bytes of a source.

  Raises:
    InputError: A document cannot be read, or all of the source was read and has no document.
  """
  total = 0  # bytes, where they are known
  if source.kind in sources.SUFFIXES:
    found = sources.find(source)
    if not any(name.endswith(jsonl.GZIP) for name in found):  # sizes are those of the contents
      total = sum(file.size for file in found.values())
  documents, seen, done = [], 0, 0
  for block in sources.blocks(source):
    content = list(block.read(source.kind))
    for document in sources.parse(block, content, source):
      seen += 1
      if document.in_split:
        documents.append(document.text)
    done += sum(map(len, content))
    if documents and done >= ENOUGH and total:
      return Beginning(documents, max(1.0, total / done))
  sources.check_counts(source, seen, len(documents))
  return Beginning(documents, 1.0)
