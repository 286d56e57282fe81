"""Blocks of a corpus as tokens, in this process or in a pool of processes that do not import jax.

A block holds about a megabyte of text, so the memory in use is a few megabytes for each worker,
whatever the size of the corpus.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

from distill_jax.data import sources
from distill_jax.data.bad_input import BadInputPolicy
from distill_jax.data.chat_dataset import ChatTokenizer
from distill_jax.data.packing import TokenBlock
from distill_jax.data.sources import Block, DocumentSource
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.runtime import pool_worker

ALONE = 4  # a corpus of at most this many blocks is tokenized before workers would have started


class TokenizedBlock(NamedTuple):
  """A block as tokens.

  Attributes:
    tokens: The tokens of the documents that are used.
    counts: What the block held.
    digest: The digest of its bytes; see sources.digest.
  """

  tokens: TokenBlock
  counts: Counts
  digest: str


class Counts:
  """The numbers of documents in a part of a corpus.

  Attributes:
    seen: All documents.
    kept: Those of the source's split.
    used: Those that have tokens and can be used.
    unmarked: The assistant turns in them that are not trained on.
    bad: The chats that could not be used.
  """

  def __init__(self, on_bad: str):
    self.seen = self.kept = self.used = self.unmarked = 0
    self.bad = BadInputPolicy("data.on_bad", on_bad)

  def add(self, other: Counts) -> None:
    """Adds the counts of the next part."""
    self.seen += other.seen
    self.kept += other.kept
    self.used += other.used
    self.unmarked += other.unmarked
    self.bad.merge(other.bad)

  def report(self, source: DocumentSource) -> None:
    """Prints the number of chats that were skipped and of turns that are not trained on."""
    self.bad.report(source.path, self.used, "chats")
    if self.unmarked:
      print(
        f"{source.path}: {self.unmarked} assistant turns are not trained on, since the template "
        "renders them differently when messages follow. To train on such a turn, add a chat that "
        "ends with it.",
        file=sys.stderr,
      )

  def check(self, source: DocumentSource) -> None:
    """Raises InputError if nothing of the whole source can be used."""
    sources.check_counts(source, self.seen, self.kept)
    if not self.used and source.kind == "chat":
      raise InputError(
        f"{source.path} has no chat that can be used. The lines above give the reasons."
      )
    if not self.used:
      raise InputError(f"{source.path} contains no tokens. Use a corpus that contains text.")


@dataclasses.dataclass(frozen=True)
class BlockTokenizer:
  """Turns blocks into tokens. It can be pickled.

  Documents begin with the tokens that the tokenizer puts before a text, as prompts do
  (generation/prompts.py), and end with the end-of-document token. Chats are as their template
  renders them.

  Attributes:
    source: The source of the blocks.
    tokenizer: The tokenizer.
    chats: What tokenizes chats; None for other documents.
    on_bad: The value of data.on_bad.
  """

  source: DocumentSource
  tokenizer: Tokenizer
  chats: ChatTokenizer | None
  on_bad: str

  def __call__(self, block: Block) -> TokenizedBlock:
    """Returns a block as tokens.

    Raises:
      InputError: If a document cannot be used.
    """
    counts, content = Counts(self.on_bad), list(block.read(self.source.kind))
    documents = self._kept(sources.parse(block, content, self.source), counts)
    tokens = self._texts(documents) if self.chats is None else self._chats(documents, counts)
    counts.used = int(np.count_nonzero(tokens.lengths_n))
    return TokenizedBlock(tokens, counts, sources.digest(content))

  def _kept(
    self, documents: Iterable[sources.Document], counts: Counts
  ) -> Iterator[sources.Document]:
    for document in documents:
      counts.seen += 1
      if document.in_split:
        counts.kept += 1
        yield document

  def _texts(self, documents: Iterator[sources.Document]) -> TokenBlock:
    begin, end = self.tokenizer.begin, self.tokenizer.eos_id
    parts, lengths = [], []
    texts = [document.text for document in documents]
    for ids in self.tokenizer.encode_batch(texts) if texts else []:
      if ids or begin:
        whole = [*begin, *ids] if end is None else [*begin, *ids, end]
        parts.append(np.array(whole, np.int32))
      lengths.append(len(parts[-1]) if ids or begin else 0)
    return TokenBlock(_joined(parts, np.int32), np.array(lengths, np.int64))

  def _chats(self, documents: Iterator[sources.Document], counts: Counts) -> TokenBlock:
    assert self.chats is not None
    ids, masks, lengths, smoothing = [], [], [], []
    for chat in self.chats.chats(documents, counts.bad):
      ids.append(np.array(chat.ids, np.int32))
      masks.append(np.array(chat.mask, bool))
      lengths.append(len(chat.ids))
      smoothing.append(chat.smoothing)
      counts.unmarked += chat.unmarked
    return TokenBlock(
      _joined(ids, np.int32),
      np.array(lengths, np.int64),
      _joined(masks, bool),
      np.array(smoothing, np.float32),
    )


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
  return np.concatenate(parts) if parts else np.zeros(0, dtype)


def tokenized(
  blocks: Iterable[Block], work: BlockTokenizer, workers: int
) -> Iterator[tuple[Block, TokenizedBlock]]:
  """Yields (block, tokens) for each block, in order. The result does not depend on `workers`.

  At most two blocks per worker are in memory.

  Args:
    blocks: The blocks.
    work: What tokenizes them.
    workers: The number of processes; 0 for one per core. This process tokenizes a small corpus.

  Raises:
    InputError: If a document cannot be used, or a worker was killed.
  """
  workers = workers or len(os.sched_getaffinity(0))
  stream = iter(blocks)
  head = list(itertools.islice(stream, ALONE))
  if workers == 1 or len(head) < ALONE:
    yield from ((block, work(block)) for block in itertools.chain(head, stream))
    return
  context = multiprocessing.get_context("spawn")
  pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(work,))
  try:
    pending: deque[tuple[Block, Future[TokenizedBlock]]] = deque()
    for block in itertools.chain(head, stream):
      pending.append((block._replace(content=b""), pool.submit(_work, block)))
      if len(pending) == 2 * workers:
        place, result = pending.popleft()
        yield place, result.result()
    while pending:
      place, result = pending.popleft()
      yield place, result.result()
  except BrokenProcessPool as e:
    raise InputError(
      "A process that tokenizes was killed; the machine may be out of memory. Lower pack.workers "
      "and run again."
    ) from e
  finally:
    pool.shutdown(cancel_futures=True)


_work_here: BlockTokenizer | None = None  # set in workers only


def _start_worker(work: BlockTokenizer) -> None:
  """Prepares a worker."""
  global _work_here
  _work_here = work
  os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is one core's share
  pool_worker.start()


def _work(block: Block) -> TokenizedBlock:
  assert _work_here is not None
  return _work_here(block)
