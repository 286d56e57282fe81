"""The tokens of a teacher and a student, as the keys of a config name them.

The student's texts end with its vocabulary's end of a document, never with the end of a turn that a
tokenizer_config.json may name as its eos_token. Both sides end texts with all tokens that the
model's generation config and tokenizer config name, too.
"""

from __future__ import annotations

from distill_jax.cross_tokenizer.pair import Side, side
from distill_jax.cross_tokenizer.roles import stop_set
from distill_jax.data import corpus, tokenizers
from distill_jax.data.options import DataOptions
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import bad_value
from distill_jax.hub.locate import locate
from distill_jax.hub.pretrained import Pretrained
from distill_jax.hub.tokenizer import read_tokenizer
from distill_jax.hub.weights import read_hf_json
from distill_jax.runtime import files
from distill_jax.types import JsonObject

GENERATION = "generation_config.json"


def teacher_side(
  data: DataOptions, pretrained: Pretrained | None, tokenizer: Tokenizer, is_chat: bool
) -> Side:
  """Returns the tokens of the teacher.

  Args:
    data: The config section `data`.
    pretrained: The teacher's checkpoint; None for random weights.
    tokenizer: The tokenizer of its texts: corpus.tokenizer_of(data, pretrained).
    is_chat: True if the texts are chats.

  Raises:
    InputError: See `pair.side` and `roles.stop_set`.
  """
  found = corpus.files_of(data, pretrained)
  configs = [found.config] if found else []
  if pretrained is not None and _is_own(tokenizer, pretrained):
    configs.append(pretrained.generation)
  return side(tokenizer, found, stop_set(tokenizer, *configs), is_chat)


def student_tokenizer(named: str, pretrained: Pretrained | None) -> Tokenizer | None:
  """Returns the tokenizer of the student, or None without one.

  Args:
    named: Its file or folder: a path, URL or Hub id (retarget.tokenizer); "": that of the model.
    pretrained: The student's checkpoint; None for random weights.

  Raises:
    InputError: The file does not exist, or is not a tokenizer.
  """
  if named:
    folder, name = tokenizers.locate(locate(named))
    where = files.join(folder, name)
    return Tokenizer(files.read(where), where, None, None)
  if pretrained is None or pretrained.tokenizer is None:
    return None
  return corpus.of_files(pretrained.tokenizer, pretrained.source)


def student_side(key: str, named: str, pretrained: Pretrained | None, is_chat: bool) -> Side:
  """Returns the tokens of the student.

  Args:
    key: The config key of `named`, for messages.
    named: See `student_tokenizer`.
    pretrained: See `student_tokenizer`.
    is_chat: True if the texts are chats.

  Raises:
    InputError: The student has no tokenizer; or see `pair.side` and `roles.stop_set`.
  """
  if (tokenizer := student_tokenizer(named, pretrained)) is None:
    expected = "the student's tokenizer, because student.source has none"
    raise bad_value(key, named, expected, "Name its file or folder")
  if named:
    folder = tokenizers.locate(locate(named))[0]
    found, generation = read_tokenizer(folder), _generation(folder)
  else:
    assert pretrained is not None
    found, generation = pretrained.tokenizer, pretrained.generation
  configs = [generation, found.config if found else {}]
  return side(tokenizer, found, stop_set(tokenizer, *configs), is_chat)


def _is_own(tokenizer: Tokenizer, pretrained: Pretrained) -> bool:
  """Returns whether a tokenizer is that of a checkpoint, or the checkpoint has none."""
  own = pretrained.tokenizer
  return own is None or corpus.of_files(own, pretrained.source).digest == tokenizer.digest


def _generation(folder: str) -> JsonObject:
  """Returns the generation_config.json next to a tokenizer; {} without one."""
  path = files.join(folder, GENERATION)
  return read_hf_json(path) if files.info(path) is not None else {}
