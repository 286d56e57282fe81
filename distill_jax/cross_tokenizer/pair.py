"""The tables of a teacher and a student, from their tokenizers and chat templates."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

from distill_jax.cross_tokenizer.chat_markers import find_markers
from distill_jax.cross_tokenizer.chats import ChatAligner, chat_vocabulary
from distill_jax.cross_tokenizer.roles import match_roles
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.cross_tokenizer.vocabulary import Vocabulary
from distill_jax.data.chat_template import ChatTemplate
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError

if TYPE_CHECKING:  # worker processes must not import jax
  from distill_jax.hub.tokenizer import TokenizerFiles

WITHOUT_BYTES = ("WordPiece", "WordLevel")  # kinds of vocabularies whose tokens drop white space


class Side(NamedTuple):
  """The teacher's or the student's tokens.

  Attributes:
    vocabulary: The bytes of its tokens.
    template: Its chat template, if the texts are chats; otherwise None.
  """

  vocabulary: Vocabulary
  template: ChatTemplate | None


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
