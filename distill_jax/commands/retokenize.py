"""Gives the student another tokenizer: an embedding and a head with a row for each of its tokens.

A row of the new embedding is the old row of the token with the same bytes or, for special tokens,
with the same role. Without such a token it is the mean of the old rows of the tokens that spell
the new one. All other weights are unchanged. The model can be the student of a teacher with the new
tokenizer, or of records that the command retarget has converted to it.

Reads: the student (`student`), also with student.keep_layers or student.changes; its tokenizer,
from data.tokenizer if the model has none; the new tokenizer.

Writes: the model as a Hugging Face folder with the new tokenizer, retokenize.dir or "model" in the
workdir; retokenize.json with the numbers of rows by what they are made from.

Config: seed, mesh, student, data, retokenize.

Example:
  distill-jax retokenize --config=configs/demo.py --workdir=runs/start \\
    --config.retokenize.tokenizer=models/mistral/tokenizer.model
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import jax

from distill_jax.config import Config
from distill_jax.cross_tokenizer.vocabulary import Vocabulary
from distill_jax.data import corpus, tokenizers
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import bad_value
from distill_jax.hub.export import export_model
from distill_jax.hub.export_folder import check_new, result_of
from distill_jax.hub.locate import locate
from distill_jax.hub.pretrained import IDS
from distill_jax.hub.weights import float_dtype
from distill_jax.models import DecoderConfig, loading
from distill_jax.nn import params, sharding
from distill_jax.retokenize import model as new_model
from distill_jax.retokenize.rows import KINDS, special_tokens, spell
from distill_jax.runtime import json_io, storage
from distill_jax.types import JsonObject, Model

RESULT = "retokenize.json"
MEANINGS = {
  "equal": "copies of the token with the same bytes",
  "role": "copies of the special token with the same role",
  "tokens": "means of the tokens into which the old tokenizer cuts them",
  "bytes": "means of the longest tokens that spell parts of characters",
  "rest": "means of all old rows",
  "padding": "padding",
}


def run(config: Config, workdir: Path) -> JsonObject:
  """Writes config.student with another tokenizer, and retokenize.json into `workdir`.

  Returns:
    The content of retokenize.json: `dir`; `source`; `tokenizer` and `old_tokenizer` (name, digest
    and tokens); `rows`, the number of rows of the new embedding by KINDS, and "padding";
    `vocab_size`, their sum; `parameters`; and `chat_template`, whether the new tokenizer has one.
    The old template is not kept.

  Raises:
    InputError: The model, the tokenizers or the options do not fit. It is raised before weights
      are read.
  """
  options = config.retokenize
  if (earlier := result_of(workdir / RESULT, "retokenize")) is not None:
    return earlier
  float_dtype(options.dtype)
  source, old = _open(config)
  path = _path(options.tokenizer)
  tokenizer = tokenizers.load_tokenizer(path)
  if options.multiple_of < 1:
    raise bad_value("retokenize.multiple_of", options.multiple_of, "a positive number", "Change it")
  if tokenizer.digest == old.digest:
    expected = "another tokenizer than the model's own"
    raise bad_value("retokenize.tokenizer", options.tokenizer, expected, "Use the model unchanged")
  target = options.dir or storage.location(workdir / "model")
  check_new(target)
  mesh = config.mesh.make()
  rows = -(-tokenizer.vocab_size // options.multiple_of) * options.multiple_of
  sharding.shardings(new_model.abstract(source, rows), mesh, source.compute.rules)
  new, before = Vocabulary(tokenizer), Vocabulary(old)
  spelling = spell(new, before, special_tokens(new, before, options.roles))
  files = new_model.tokenizer_files(tokenizer, path)
  with jax.set_mesh(mesh):
    made = new_model.with_rows(source, config.seed, mesh, spelling, rows)
    result = {
      "dir": str(target),
      "source": source.name,
      "tokenizer": _described(tokenizer),
      "old_tokenizer": _described(old),
      "rows": spelling.counts() | {"padding": rows - tokenizer.vocab_size},
      "vocab_size": rows,
      "parameters": params.count(made),
      "chat_template": files.chat_template is not None,
    }
    json_io.write_json_once(workdir / RESULT, result)  # first; see `result_of`
    export_model(
      cast(Model, made),
      target,
      tokenizer=files,
      generation=new_model.generation(source.generation, tokenizer, files.config, path),
      card=_card(result),
      dtype=options.dtype,
      shard_bytes=options.shard_bytes,
      # Without them, transformers assumes the ids of another tokenizer.
      extra={"config.json": dict.fromkeys(IDS)},
    )
  return result


def _open(config: Config) -> tuple[loading.ModelSource, Tokenizer]:
  """Returns the opened student and its tokenizer."""
  if not config.student.source:
    expected = "a model whose weights are kept"
    raise bad_value("student.source", "", expected, "Name a model")
  source = loading.open_source(config.student, config.seed)
  if not isinstance(source.config, DecoderConfig):
    raise bad_value(
      "student.source",
      f"{source.name}, a {source.family} model",
      "a decoder-only language model such as Llama, Qwen or Gemma",
      "Name such a model",
    )
  if source.tokenizer is not None:
    old = corpus.of_files(source.tokenizer, source.name)
  else:
    old = corpus.tokenizer_of(config.data, None)
  corpus.check_vocabulary(old.vocab_size, source.decoder_config.vocab_size, old.where)
  return source, old


def _path(tokenizer: str) -> str:
  """Returns the path or URL of the new tokenizer."""
  if not tokenizer:
    expected = "a tokenizer.json, a sentencepiece model, or a folder with one of them"
    raise bad_value("retokenize.tokenizer", "", expected, "Set it")
  return locate(tokenizer)


def _described(tokenizer: Tokenizer) -> JsonObject:
  return {
    "name": tokenizer.where,
    "digest": tokenizer.digest,
    "tokens": tokenizer.vocab_size,
  }


def text(result: JsonObject) -> str:
  """Returns the contents of retokenize.json as a table."""
  new, old = result["tokenizer"], result["old_tokenizer"]
  lines = [
    f"{result['source']}: {old['tokens']:,} tokens of {old['name']}",
    f"{result['dir']}: {new['tokens']:,} tokens of {new['name']}",
    f"{result['parameters']:,} parameters",
    *_row_lines(result),
  ]
  if not result["chat_template"]:
    lines.append("The new tokenizer has no chat template, so the model has none.")
  return "\n".join(lines)


def _row_lines(result: JsonObject) -> list[str]:
  counts = {name: result["rows"][name] for name in (*KINDS, "padding")}
  return [f"{n:>9,} rows: {MEANINGS[name]}" for name, n in counts.items() if n]


def _card(result: JsonObject) -> str:
  """Returns the model card of the folder (README.md), in Markdown."""
  lines = [
    "---",
    "library_name: transformers",
    "tags: [knowledge-distillation, distill_jax]",
    "---",
    "# A student before training, with another tokenizer",
    "",
    f"Made by `distill-jax retokenize` from `{result['source']}`: the embedding and the head have "
    f"rows for the {result['tokenizer']['tokens']:,} tokens of another tokenizer. It is the start "
    "of a student's training and has not been trained since.",
    "",
    *(f"- {line.strip()}" for line in _row_lines(result)),
  ]
  return "\n".join(lines) + "\n"
