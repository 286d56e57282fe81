"""A model with the vocabulary of another tokenizer, and the files of that tokenizer."""

from __future__ import annotations

import dataclasses
from typing import cast

import jax

from distill_jax import registry
from distill_jax.data import corpus, tokenizers
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.hub.pretrained import IDS
from distill_jax.hub.special_tokens import named_token
from distill_jax.hub.tokenizer import TokenizerFiles
from distill_jax.hub.weights import read_hf_json
from distill_jax.models import DecoderModel, loading, runs
from distill_jax.nn import params, sharding
from distill_jax.retokenize.rows import Spelling, new_rows
from distill_jax.runtime import distributed, files
from distill_jax.types import JsonObject

GENERATION = "generation_config.json"
# Entries of a generation_config.json that hold ids of the old vocabulary, as *_token_id do.
OLD_IDS = (
  "bad_words_ids",
  "begin_suppress_tokens",
  "force_words_ids",
  "sequence_bias",
  "suppress_tokens",
)


def with_rows(
  source: loading.ModelSource, seed: int, mesh: jax.sharding.Mesh, spelling: Spelling, rows: int
) -> DecoderModel:
  """Returns a model with an embedding and a head of `rows` rows; the rest is unchanged.

  The host holds the old and the new values of one table of V rows and D columns at a time, e.g.
  2 · 128,256 · 16,384 · 4 bytes = 17 GB for the largest Llama in float32. All else stays on the
  devices.

  Args:
    source: the opened model.
    seed: the seed of the config.
    mesh: the devices.
    spelling: the old tokens of each new token.
    rows: the number of rows.

  Raises:
    InputError: the weights do not fit their config, or the rows the mesh.
  """
  shape = abstract(source, rows)
  places = sharding.shardings(shape, mesh, source.compute.rules)
  model = source.load(mesh, runs.keys(seed)["student"]).decoder
  values = {path: v[...] for path, v in params.named_params(model)}
  named = zip(params.named_params(shape), jax.tree.leaves(places), strict=True)
  for (path, v), place in named:
    if v.get_metadata()["axes"][0] == "vocab":
      old_VD = distributed.to_host(values[path])
      values[path] = distributed.from_host(new_rows(old_VD, spelling, rows), place)
  return params.replace(shape, values)


def abstract(source: loading.ModelSource, rows: int) -> DecoderModel:
  """Returns the shapes of the source's model with an embedding of `rows` rows."""
  config = dataclasses.replace(source.decoder_config, vocab_size=rows)
  make = registry.load("models", source.family).Model
  return cast(DecoderModel, jax.eval_shape(lambda key: make(config, key), jax.random.key(0)))


def tokenizer_files(tokenizer: Tokenizer, path: str) -> TokenizerFiles:
  """Returns the files of a tokenizer for a model's folder.

  Args:
    tokenizer: the tokenizer.
    path: the path or URL from which it was loaded. Other files of its folder are used too.
  """
  found = corpus.files_at(path)
  return dataclasses.replace(found, config=_config(tokenizer) | found.config)


def _config(tokenizer: Tokenizer) -> JsonObject:
  """Returns the least tokenizer_config.json, for a tokenizer that has none."""
  ids = {"eos_token": tokenizer.eos_id, "bos_token": next(iter(tokenizer.begin), None)}
  config: JsonObject = {r: tokenizer.piece(i) for r, i in ids.items() if i is not None}
  if tokenizer.kind == "huggingface":
    return config | {"tokenizer_class": "PreTrainedTokenizerFast"}
  first = tokenizer.piece(tokenizer.encode("a")[0]) or ""
  return config | {
    "tokenizer_class": "LlamaTokenizer",
    "add_prefix_space": first.startswith(tokenizers.SPACE),
  }


def generation(old: JsonObject, tokenizer: Tokenizer, config: JsonObject, path: str) -> JsonObject:
  """Returns a generation_config.json with the ids of another tokenizer.

  Args:
    old: the model's generation_config.json; its settings of sampling are kept.
    tokenizer: the new tokenizer.
    config: the content of its tokenizer_config.json.
    path: the path or URL from which it was loaded. If it is in the folder of a model, the ids in
      the generation_config.json of that model are used.
  """
  kept = {k: v for k, v in old.items() if k not in OLD_IDS and not k.endswith("_token_id")}
  folder = tokenizers.locate(path)[0]
  there = GENERATION in files.listing(folder)
  theirs = read_hf_json(files.join(folder, GENERATION)) if there else {}
  ids = _special_ids(tokenizer, config) | {k: theirs[k] for k in IDS if k in theirs}
  return kept | {k: v for k, v in ids.items() if v is not None}


def _special_ids(tokenizer: Tokenizer, config: JsonObject) -> JsonObject:
  """Returns the ids that begin, end and pad a text, or None.

  A text ends with the token that is named in tokenizer_config.json, often the end of a chat turn,
  and with the vocabulary's end of text.
  """
  texts = {role: named_token(config, f"{role}_token") for role in ("eos", "bos", "pad")}
  ids = {role: tokenizer.token_id(text) for role, text in texts.items() if text}
  ends = list(dict.fromkeys(i for i in (ids.pop("eos", None), tokenizer.eos_id) if i is not None))
  eos = ends if len(ends) > 1 else next(iter(ends), None)
  return {"eos_token_id": eos, **{f"{role}_token_id": i for role, i in ids.items()}}
