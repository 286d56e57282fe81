"""Measures packing of a corpus: a pool of processes against one, and the cost of each part.

  python tools/bench/pack.py [--megabytes=64] [--seq_len=4096] [--workers=2] [--kind=jsonl]

The corpus is made of paragraphs of Python's language reference, in documents of about 5,000
characters, or in chats of as many ("chat"). The tokenizer is a byte-level BPE with 32,768 tokens
that is trained on the reference. Rates and times per token are CPU times: of tokenizing, which the
workers share, and of packing with writing, which one process does and which therefore bounds the
speed of any pool (most_useful_workers). pool_over_one is the wall time of one process over that of
`workers` processes; it needs as many idle cores. memory_growth is the largest resident size of this
process after packing all of the corpus, over that after a tenth of it. The last line is a JSON
object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import resource
import tempfile
import time
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from distill_jax.data import corpus, sources
from distill_jax.data.block_tokenizer import BlockTokenizer
from distill_jax.data.options import DataOptions
from distill_jax.data.python_reference import topics
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.records import packed_text, recording
from distill_jax.records.manifest import Manifest
from distill_jax.records.options import RecordsOptions

VOCAB, DOCUMENT = 32_768, 5_000
TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path, texts: list[str]) -> None:
  """Trains a tokenizer and writes its files."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  trainer = trainers.BpeTrainer(
    vocab_size=VOCAB,
    special_tokens=special,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.save(str(folder / "tokenizer.json"))
  config = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_corpus(path: Path, texts: list[str], nbytes: int, kind: str) -> int:
  """Writes a corpus; returns the number of documents."""
  paragraphs = [p for text in texts for p in text.split("\n\n") if p.strip()]
  rng, documents = random.Random(0), 0
  with path.open("w") as file:
    while file.tell() < nbytes:
      text, length = [], 0
      while length < DOCUMENT:
        text.append(rng.choice(paragraphs))
        length += len(text[-1])
      body = "\n\n".join(text)
      row = {"text": body} if kind == "jsonl" else {"prompt": text[0], "text": body}
      file.write(json.dumps(row) + "\n")
      documents += 1
  return documents


def planned(work: BlockTokenizer, data: DataOptions) -> Manifest:
  """Returns the manifest of the store."""
  made = recording.planned_manifest(
    RecordsOptions(kind="text"), work.tokenizer.vocab_size, 1, data.seq_len
  )
  return dataclasses.replace(made, tokenizer=work.tokenizer.digest)


def peak_bytes() -> int:
  """Returns the largest resident size of this process so far."""
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(args: argparse.Namespace, folder: Path) -> dict[str, float]:
  """Returns the figures of the last line."""
  os.environ["TOKENIZERS_PARALLELISM"] = "false"  # so that one process uses one core
  texts = list(topics(lambda name: True, whole=True))
  write_tokenizer(folder, texts)
  documents = write_corpus(folder / "corpus.jsonl", texts, args.megabytes * 10**6, args.kind)
  data = DataOptions(
    kind=args.kind,
    path=str(folder / "corpus.jsonl"),
    tokenizer=str(folder),
    heldout_fraction=0.0,
    seq_len=args.seq_len,
    on_bad="skip",
  )
  work = corpus.block_tokenizer(data, load_tokenizer(data.tokenizer))
  manifest = planned(work, data)
  start, began = time.process_time(), time.perf_counter()
  made, _ = packed_text.pack(data, work, [manifest], folder / "one", 1)
  done = made[data.seq_len]
  one, one_wall = time.process_time() - start, time.perf_counter() - began
  blocks = list(sources.blocks(work.source))
  start = time.process_time()
  for block in blocks:
    work(block)
  tokenizing = time.process_time() - start
  del blocks
  tenth = dataclasses.replace(data, sequences=max(1, done.total // 10))
  packed_text.pack(tenth, work, [manifest], folder / "tenth", args.workers)
  memory = peak_bytes()
  start = time.perf_counter()
  packed_text.pack(data, work, [manifest], folder / "pool", args.workers)
  pool = time.perf_counter() - start
  tokens = sum(shard.tokens for shard in done.shards)
  return {
    "documents_per_second_per_core": documents / tokenizing,
    "tokens_per_second_per_core": tokens / tokenizing,
    "tokenizing_ns_per_token": 1e9 * tokenizing / tokens,
    "packing_and_writing_ns_per_token": 1e9 * (one - tokenizing) / tokens,
    "most_useful_workers": tokenizing / (one - tokenizing),
    "pool_over_one": one_wall / pool,
    "workers": args.workers,
    "store_bytes_per_token": sum(shard.bytes for shard in done.shards) / tokens,
    "corpus_bytes_per_token": (folder / "corpus.jsonl").stat().st_size / tokens,
    "memory_growth": peak_bytes() / memory,
    "peak_bytes": peak_bytes(),
  }


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--megabytes", type=int, default=64)
  parser.add_argument("--seq_len", type=int, default=4096)
  parser.add_argument("--workers", type=int, default=2)
  parser.add_argument("--kind", choices=("jsonl", "chat"), default="jsonl")
  with tempfile.TemporaryDirectory() as folder:
    print(json.dumps(measure(parser.parse_args(), Path(folder))))


if __name__ == "__main__":
  main()
