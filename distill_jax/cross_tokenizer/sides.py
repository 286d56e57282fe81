"""The tokens of a teacher and a student, as the keys of a config name them, and their tables.

Documents end with the vocabulary's end of a document, never with the end of a turn that a
tokenizer_config.json may name as its eos_token. But all tokens that the model's generation config
and tokenizer config name end a text, too.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping
from typing import NamedTuple

from distill_jax.cross_tokenizer.chat_markers import find_markers
from distill_jax.cross_tokenizer.chats import ChatAligner, chat_vocabulary
from distill_jax.cross_tokenizer.roles import match_roles, stop_set
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.cross_tokenizer.vocabulary import Vocabulary
from distill_jax.data import corpus, tokenizers
from distill_jax.data.chat_template import ChatTemplate
from distill_jax.data.options import DataOptions
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError, bad_value
from distill_jax.hub.locate import locate
from distill_jax.hub.pretrained import Pretrained
from distill_jax.hub.tokenizer import TokenizerFiles
from distill_jax.hub.weights import read_hf_json
from distill_jax.runtime import files
from distill_jax.types import JsonObject

GENERATION = "generation_config.json"
WITHOUT_BYTES = ("WordPiece", "WordLevel")  # kinds of vocabularies whose tokens drop white space


class Side(NamedTuple):
  """The teacher's or the student's tokens.

  Attributes:
    vocabulary: The bytes of its tokens.
    template: Its chat template, if the texts are chats; otherwise None.
  """

  vocabulary: Vocabulary
  template: ChatTemplate | None


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
    InputError: See `side` and `roles.stop_set`.
  """
  found = corpus.files_of(data, pretrained)
  configs = [found.config] if found else []
  if pretrained is not None and _is_own(tokenizer, pretrained):
    configs.append(pretrained.generation)
  return side(tokenizer, found, stop_set(tokenizer, *configs), is_chat)


def student_tokenizer(named: str, pretrained: Pretrained | None) -> Tokenizer | None:
  """Returns the tokenizer of the student, or None without one.

  Args:
    named: Its file or folder (retarget.tokenizer), a path, a URL or hub:ORG/NAME; "": that of the
      model.
    pretrained: The student's checkpoint; None for random weights.

  Raises:
    InputError: The file does not exist, or is not a tokenizer.
  """
  if named:
    return tokenizers.load_tokenizer(locate(named))
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
    InputError: The student has no tokenizer; or see `side` and `roles.stop_set`.
  """
  if (tokenizer := student_tokenizer(named, pretrained)) is None:
    expected = "the student's tokenizer, because student.source has none"
    raise bad_value(key, named, expected, "Name its file or folder")
  found: TokenizerFiles | None
  if named:
    path = locate(named)
    found, generation = corpus.files_at(path), _generation(tokenizers.locate(path)[0])
  else:
    assert pretrained is not None
    found, generation = pretrained.tokenizer, pretrained.generation
  configs = [generation, found.config if found else {}]
  return side(tokenizer, found, stop_set(tokenizer, *configs), is_chat)


def pair_tables(teacher: Side, student: Side, given: Mapping[str, str]) -> PairTables:
  """Returns the tables of a teacher and a student, which align chats by turns if the texts are.

  Args:
    teacher: The teacher's tokens.
    student: The student's tokens.
    given: Pairs of tokens with the same role (retarget.roles).

  Raises:
    InputError: See `roles.match_roles` and `chats.ChatAligner`.
  """
  a, b = teacher.vocabulary, student.vocabulary
  chats = None
  if teacher.template is not None and student.template is not None:
    chats = ChatAligner(a, b, teacher.template, student.template)
  return PairTables(a, b, match_roles(a, b, given), chats)


def side(
  tokenizer: Tokenizer, found: TokenizerFiles | None, stops: Collection[int], is_chat: bool
) -> Side:
  """Returns the tokens of a teacher or a student.

  Args:
    tokenizer: The tokenizer.
    found: Its files, with the chat template, if it has a folder.
    stops: Further ids that end a text.
    is_chat: True if the texts are chats in the form of the chat template.

  Raises:
    InputError: If the tokens have no bytes, or the texts are chats and the template is missing or
      cannot be used.
  """
  is_json = tokenizer.kind == "huggingface"
  model = json.loads(tokenizer.raw)["model"].get("type", "BPE") if is_json else "sentencepiece"
  out = _chat_side(tokenizer, found, stops) if is_chat else _text_side(tokenizer, found, stops)
  if model in WITHOUT_BYTES or not out.vocabulary.id_of:
    raise InputError(
      f"{tokenizer.where} has tokens without bytes (its model is {model}), so texts cannot be "
      "aligned. Use a student with a byte-level BPE or a sentencepiece vocabulary."
    )
  return out


def _chat_side(tokenizer: Tokenizer, found: TokenizerFiles | None, stops: Collection[int]) -> Side:
  if found is None:
    raise InputError(
      f"{tokenizer.where} has no chat template, but the texts are chats. Use the folder with its "
      "tokenizer_config.json."
    )
  template = ChatTemplate.of(found, tokenizer.where)
  return Side(chat_vocabulary(tokenizer, template, stops), template)


def _text_side(tokenizer: Tokenizer, found: TokenizerFiles | None, stops: Collection[int]) -> Side:
  """Returns the tokens of a model. Those around the messages of chats are control tokens."""
  markers: Collection[int] = ()
  with contextlib.suppress(InputError):  # a template that is not used may be unusable
    if found is not None and found.chat_template:
      markers = find_markers(ChatTemplate.of(found, tokenizer.where), tokenizer).ids
  return Side(Vocabulary(tokenizer, stops, markers=markers), None)


def _is_own(tokenizer: Tokenizer, pretrained: Pretrained) -> bool:
  """Returns whether a tokenizer is that of a checkpoint, or the checkpoint has none."""
  own = pretrained.tokenizer
  return own is None or corpus.of_files(own, pretrained.source).digest == tokenizer.digest


def _generation(folder: str) -> JsonObject:
  """Returns the generation_config.json next to a tokenizer; {} without one."""
  path = files.join(folder, GENERATION)
  return read_hf_json(path) if files.info(path) is not None else {}
