"""Continuations of held-out texts by teacher and student, side by side."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from distill_jax.config import Config
from distill_jax.data import chat_dataset, corpus, jsonl, sources
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.generation import dispatch, outputs
from distill_jax.generation.job import GenerationJob
from distill_jax.generation.options import DecodingOptions
from distill_jax.generation.sampling import Sampling
from distill_jax.models import loading
from distill_jax.models.options import ModelOptions
from distill_jax.nn import sharding
from distill_jax.runtime import distributed
from distill_jax.types import JsonObject

PROMPTS = 3
PROMPT_TOKENS, NEW_TOKENS = 32, 48  # of a text
CHAT_TOKENS = 512  # of a chat's prompt, at most
CHATS = 50  # held-out chats among which the shortest prompts are taken
FILE = "prompts.jsonl"


def write_samples(config: Config, folder: Path, student: str) -> JsonObject:
  """Generates continuations with both models, greedily; finished ones are kept.

  Args:
    config: The config of the run.
    folder: Where prompts and samples go.
    student: The source of the trained student.

  Returns:
    `samples`: a list of {"prompt", "teacher", "student"}.
  """
  trained = dataclasses.replace(config.student.as_trained(student), train="whole")
  teacher, pupil = (loading.open_source(m, config.seed) for m in (config.teacher, trained))
  tokenizer = corpus.tokenizer_of(config.data, teacher.pretrained)
  positions = (m.decoder_config.max_position_embeddings for m in (teacher, pupil))
  room = min(*positions, CHAT_TOKENS + NEW_TOKENS)
  prompts = _prompts(config, tokenizer, room - NEW_TOKENS)
  folder.mkdir(parents=True, exist_ok=True)
  distributed.run_on_process_0(
    lambda: jsonl.write(folder / FILE, [{"prompt": prompt} for prompt in prompts])
  )
  texts = {
    name: _generate(config, options, folder, name, room)
    for name, options in (("teacher", config.teacher), ("student", trained))
  }
  rows = zip(prompts, texts["teacher"], texts["student"], strict=False)
  return {"samples": [{"prompt": p, "teacher": t, "student": s} for p, t, s in rows]}


def _generate(
  config: Config, model: ModelOptions, folder: Path, name: str, cache_len: int
) -> list[str]:
  """Returns a continuation of each prompt; on other processes than the first, none."""
  mesh = sharding.make_mesh(**vars(config.mesh.whole_rows()))
  rows = sharding.row_shards(mesh)
  size = rows * -(-PROMPTS // rows)
  job = GenerationJob(
    model=model,
    data=config.data,
    mesh=config.mesh,
    decoding=DecodingOptions(cache_len=cache_len, batch_size=size, prefill_rows=rows),
    seed=config.seed,
    prompts=str(folder / FILE),
    sampling=Sampling(temperature=0.0),
    max_new_tokens=NEW_TOKENS,
  )
  (folder / name).mkdir(exist_ok=True)
  dispatch.generate(job, folder / name)
  if not distributed.is_process_0():
    return []
  return [sample["text"] for sample in outputs.read(folder / name)]


def _prompts(config: Config, tokenizer: Tokenizer, room: int) -> list[Any]:
  """Returns the beginnings of held-out texts, or held-out chats without their last answer."""
  data = dataclasses.replace(config.data, split="heldout")
  documents = sources.documents(corpus.source_of(data))
  if data.kind != "chat":
    tokens = min(PROMPT_TOKENS, room)
    texts = itertools.islice(documents, PROMPTS)
    return [tokenizer.decode(tokenizer.encode(text.strip())[:tokens]).strip() for text in texts]
  found = []
  for line in itertools.islice(documents, CHATS):
    try:
      messages, _ = chat_dataset.parse(line)
    except InputError:
      continue
    if messages[-1]["role"] == "assistant" and len(messages) > 1:
      found.append(messages[:-1])
  return sorted(found, key=lambda messages: len(str(messages)))[:PROMPTS]
