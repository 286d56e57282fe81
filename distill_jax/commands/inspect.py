"""`inspect`: what a store of records is, what a token costs, and single sequences."""

from __future__ import annotations

import sys
from pathlib import Path

from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.errors import InputError
from distill_jax.models import loading
from distill_jax.records import describe
from distill_jax.records.store import open_store
from distill_jax.runtime.progress import Progress
from distill_jax.types import JsonObject


def run(config: Config, workdir: Path) -> JsonObject:
  """Describes the store in `workdir`; --config.inspect.sequence shows one, .verify reads all."""
  store = open_store(workdir)
  if config.inspect.verify:
    with Progress("verify", len(store), "sequences") as progress:
      store.verify(lambda done, total: progress.add(done - progress.done))
  if config.inspect.sequence >= 0:
    if config.inspect.sequence >= len(store):
      raise InputError(
        f"inspect.sequence is {config.inspect.sequence} and {workdir} holds {len(store)} sequences"
      )
    if store.manifest.labels:
      raise InputError(
        f"inspect.sequence is {config.inspect.sequence} and {workdir} holds labels of a task; "
        "expected -1. Only sequences of text are shown token by token"
      )
    tokenizer = corpus.tokenizer_of(config.data, loading.open_source(config.teacher).pretrained)
    if tokenizer.digest != store.manifest.tokenizer:
      raise InputError(
        f"{workdir} was recorded with tokenizer {store.manifest.tokenizer[:12]} and "
        f"{tokenizer.where} is {tokenizer.digest[:12]}; name the store's own in data.tokenizer"
      )
    print(describe.show(store, config.inspect.sequence, tokenizer.decode), file=sys.stderr)
  return describe.describe(store)
