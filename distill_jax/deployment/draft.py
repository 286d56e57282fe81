"""Draft models: students that propose tokens, which their teacher checks, several in one pass.

`transformers` (assisted generation), vLLM and llama.cpp pass ids of tokens between the two models.
So both need the same tokens. `transformers` and vLLM compare the numbers of rows of the embedding
tables, and refuse the draft or take it for one with another tokenizer if they differ. Models with
one tokenizer can differ in them: Qwen2.5 has 151,936 rows in small models and 152,064 in large
ones. The rows after the last token are padding, so a draft can have as many as its teacher.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError, bad_value
from distill_jax.hub.tokenizer import TokenizerFiles
from distill_jax.models import DecoderConfig, DecoderModel
from distill_jax.models.loading import ModelSource, open_source


def rows(config: Config, student: ModelSource, tokenizer: TokenizerFiles | None) -> int:
  """Returns the number of rows of the teacher's embedding, for a student that can be its draft.

  No weights are read.

  Args:
    config: the config; its `teacher` is the model for which the student proposes tokens.
    student: the student.
    tokenizer: the files of the tokenizer that is exported.

  Raises:
    InputError: export.draft cannot be True with this config, the models are not decoders, or they
      have different tokens.
  """
  if config.export.lora == "peft":
    expected = "False with export.lora='peft', which writes no model"
    raise bad_value("export.draft", True, expected, "Set export.lora to 'merged'")
  teacher = open_source(config.teacher, config.seed)
  for role, source in (("student", student), ("teacher", teacher)):
    if not isinstance(source.config, DecoderConfig):
      expected = f"False, because the {role} is a {source.family} model and not a decoder"
      raise bad_value("export.draft", True, expected, "Remove the key")
  if tokenizer is None:
    raise InputError(
      "A draft needs the teacher's tokens, but the student has no tokenizer. Set data.tokenizer."
    )
  files = teacher.tokenizer
  if files is not None:
    theirs = corpus.of_files(files, teacher.name)
    _check_tokens(corpus.of_files(tokenizer, "the student"), theirs, teacher.name)
  return teacher.decoder_config.vocab_size


def with_rows_of(rows: int, write: Callable[..., None]) -> Callable[..., None]:
  """Returns a function that writes models with `rows` rows of the embedding and the head.

  Args:
    rows: the number of rows.
    write: called with a model whose config has this number, and with unchanged parameters;
      hub.tensors.tensors_of writes them with as many rows.
  """

  def write_draft(model: DecoderModel, **kwargs: Any) -> None:
    changed = copy.copy(model)
    changed.config = dataclasses.replace(model.config, vocab_size=rows)
    write(changed, **kwargs)

  return write_draft


def _check_tokens(ours: Tokenizer, theirs: Tokenizer, teacher: str) -> None:
  """Raises InputError if an id is another token for the student than for the teacher."""
  if ours.digest == theirs.digest:
    return
  ids = range(max(ours.vocab_size, theirs.vocab_size))
  different = [i for i in ids if _token(ours, i) != _token(theirs, i)]
  if different:
    i = different[0]
    raise InputError(
      f"The student cannot be a draft for {teacher}, because {len(different):,} of its tokens "
      f"differ: id {i} is {_token(ours, i)!r} for the student and {_token(theirs, i)!r} for the "
      "teacher. Train a student with the teacher's tokenizer, or remove export.draft."
    )


def _token(tokenizer: Tokenizer, i: int) -> str | None:
  return tokenizer.piece(i) if i < tokenizer.vocab_size else None
