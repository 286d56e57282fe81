"""Generations of several models for the same prompts, side by side."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from distill_jax.config import Config
from distill_jax.data import chat_dataset, corpus, jsonl, sources
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.evals.model_slot import ModelSlot
from distill_jax.generation import dispatch, outputs
from distill_jax.generation.job import GenerationJob
from distill_jax.generation.options import DecodingOptions
from distill_jax.generation.prompts import Message, Prompts
from distill_jax.generation.sampling import Sampling
from distill_jax.nn import sharding
from distill_jax.report.examples import Generation
from distill_jax.runtime import distributed

PROMPT_TOKENS, NEW_TOKENS = 32, 48  # of a text
TEXT_ROOM = 80  # slots for a text's prompt; with NEW_TOKENS they fill one block of the KV cache
CHAT_TOKENS = 512  # of a chat's prompt, at most
CHATS = 50  # held-out chats among which the shortest prompts are taken
FILE = "prompts.jsonl"


def generate(
  config: Config, models: Mapping[str, ModelSlot], mesh: jax.sharding.Mesh
) -> list[Generation]:
  """Generates a continuation of each prompt with every model, greedily.

  Only one model is in memory at a time. The texts are so short that they are not kept for a second
  call: every process has a temporary folder, which it deletes.

  Args:
    config: The config. evaluate.examples is the number of prompts.
    models: The models by name, with one tokenizer.
    mesh: The devices.

  Returns:
    The generations; [] on other processes than the first.

  Raises:
    InputError: No prompt can be made from the data, or one cannot be used.
    Preempted: SIGTERM was received.
  """
  tokenizer = next(iter(models.values())).tokenizer(config.data)
  shapes = [m.source.decoder_config for m in models.values()]
  longest = CHAT_TOKENS if config.evaluate.prompts or config.data.kind == "chat" else TEXT_ROOM
  room = min(longest + NEW_TOKENS, *(shape.max_position_embeddings for shape in shapes))
  prompts = _prompts(config, tokenizer, room - NEW_TOKENS)
  shards = sharding.row_shards(mesh)
  rows = shards * -(-len(prompts) // shards)
  decoding = DecodingOptions(cache_len=room, batch_size=rows, prefill_rows=shards)
  texts = {}
  for name, model in models.items():
    with tempfile.TemporaryDirectory(prefix="distill_jax-") as folder:
      texts[name] = _texts(config, model, decoding, prompts, Path(folder))
    model.release()
  if not distributed.is_process_0():
    return []
  return [
    Generation(_shown(prompt), {name: found[i] for name, found in texts.items()})
    for i, prompt in enumerate(prompts)
  ]


def _texts(
  config: Config,
  model: ModelSlot,
  decoding: DecodingOptions,
  prompts: Sequence[str | list[Message]],
  folder: Path,
) -> list[str]:
  """Returns a model's continuation of each prompt; on other processes than the first, none."""
  jsonl.write(folder / FILE, [{"prompt": prompt} for prompt in prompts])
  job = GenerationJob(
    model=model.options,
    open_model=lambda: model.source,
    data=config.data,
    mesh=config.mesh,
    decoding=decoding,
    seed=config.seed,
    prompts=str(folder / FILE),
    chat=bool(config.evaluate.prompts) and config.generate.chat,
    sampling=Sampling(temperature=0.0),
    max_new_tokens=NEW_TOKENS,
    section="evaluate",
  )
  dispatch.generate(job, folder, lambda: model.unrolled(job.decoding))
  if not distributed.is_process_0():
    return []
  return [sample["text"] for sample in outputs.read(folder)]


def _shown(prompt: str | Sequence[Message]) -> str:
  """Returns a prompt, or the last message of a chat."""
  return prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))


def _prompts(config: Config, tokenizer: Tokenizer, room: int) -> list[Any]:
  """Returns the prompts: those of a file, or some made from held-out text."""
  count, path = config.evaluate.examples, config.evaluate.prompts
  if path:
    job = GenerationJob(model=config.teacher, data=config.data, prompts=path, section="evaluate")
    read = list(itertools.islice(Prompts(job).read(), count))
    if bad := [prompt.rejected for prompt in read if prompt.rejected]:
      raise InputError(f"{path}, {bad[0]} Correct the prompt.")
    prompts = [prompt.content for prompt in read]
  else:
    prompts = _held_out(config, tokenizer, count, room)
  if not prompts:
    raise InputError(
      "There is no prompt for the examples: "
      + (f"{path} is empty" if path else "the held-out part of data has no text to continue")
      + ". Name a file in evaluate.prompts, or set evaluate.examples=0."
    )
  return prompts


def _held_out(config: Config, tokenizer: Tokenizer, count: int, room: int) -> list[Any]:
  """Returns the beginnings of held-out texts, or held-out chats without their last answer."""
  data = dataclasses.replace(config.data, split="heldout")
  documents = sources.documents(corpus.source_of(data))
  if data.kind != "chat":
    tokens = min(PROMPT_TOKENS, room)
    texts = (tokenizer.decode(tokenizer.encode(text.strip())[:tokens]) for text in documents)
    return list(itertools.islice(filter(None, map(str.strip, texts)), count))
  found = []
  for line in itertools.islice(documents, CHATS):
    try:
      messages, _ = chat_dataset.parse(line)
    except InputError:
      continue
    if messages[-1]["role"] == "assistant" and len(messages) > 1:
      found.append(messages[:-1])
  return sorted(found, key=lambda messages: len(str(messages)))[:count]
