"""The tokens without bytes, matched by role: what ends or begins a text, and padding.

A role is never read from a flag alone or guessed from similar texts: <|endoftext|> ends documents
in one vocabulary and pads rows in another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from distill_jax.cross_tokenizer.vocabulary import Vocabulary
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError, bad_value

if TYPE_CHECKING:  # worker processes must not import jax
  from distill_jax.types import JsonObject

PADS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<｜▁pad▁｜>", "<|PAD_TOKEN|>")


def match_roles(
  teacher: Vocabulary, student: Vocabulary, given: Mapping[str, str]
) -> dict[int, int]:
  """Returns the student's id of each of the teacher's tokens that has a role in both.

  Every token that ends a text for the teacher is the token that ends the student's texts
  (`Vocabulary.end`): a chat model may end a document with its end of turn, where the student's text
  ends with an EOS. BOS and padding are matched as well, and the pairs of `given` come first. With
  equal tokenizers every control token is itself.

  Args:
    teacher: The teacher's vocabulary.
    student: The student's vocabulary.
    given: Pairs of a teacher's token and the student's, as texts (`retarget.roles`).

  Raises:
    InputError: If a given token is not in its vocabulary, or the student has no token for the end
      of a text.
  """
  out: dict[int, int] = {}
  if teacher.digest == student.digest:
    out |= {i: i for i in teacher.control}
  else:
    pairs = [(_pad(teacher), _pad(student)), (teacher.tokenizer.bos_id, student.tokenizer.bos_id)]
    pairs += [(i, student.end) for i in teacher.stops]
    out |= {t: s for t, s in pairs if t is not None and s is not None}
  out |= {
    _id(teacher, t, "the teacher's", t, s): _id(student, s, "the student's", t, s)
    for t, s in given.items()
  }
  if lost := sorted(teacher.stops - out.keys()):
    token = teacher.tokenizer.piece(lost[0])
    raise InputError(
      f"{student.tokenizer.where} has no token that ends a text, but the teacher ends texts with "
      f"{token!r}. Name a pair of tokens in retarget.roles."
    )
  return out


def stop_set(tokenizer: Tokenizer, *configs: JsonObject) -> set[int]:
  """Returns the ids that end a text according to a model's configs.

  Args:
    tokenizer: The model's tokenizer.
    configs: The contents of generation_config.json, config.json or tokenizer_config.json: the ids
      in `eos_token_id` and the token `eos_token`.

  Raises:
    InputError: If one is not an id or a token of the vocabulary.
  """
  found: set[int] = set()
  for config in configs:
    ids = config.get("eos_token_id")
    for i in ids if isinstance(ids, list) else [ids]:
      if i is not None:
        found.add(_checked(tokenizer, i))
    token = config.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None:
      found.add(_checked(tokenizer, tokenizer.token_id(token), token))
  return found


def _checked(tokenizer: Tokenizer, i: int | None, token: str = "") -> int:
  if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < tokenizer.vocab_size:
    raise InputError(
      f"A model's config names {token or i!r} as the end of a text, which {tokenizer.where} lacks. "
      "Use the tokenizer that belongs to the model."
    )
  return i


def _pad(vocabulary: Vocabulary) -> int | None:
  """Returns the id of the padding token, if it has no other role."""
  tokenizer = vocabulary.tokenizer
  ids = (tokenizer.token_id(name) for name in PADS if name in tokenizer.special_tokens)
  return next((i for i in ids if i is not None and i not in vocabulary.stops), None)


def _id(vocabulary: Vocabulary, token: str, whose: str, t: str, s: str) -> int:
  if (i := vocabulary.tokenizer.token_id(token)) is None:
    raise bad_value(
      "retarget.roles",
      {t: s},
      f"tokens of both vocabularies, but {whose} ({vocabulary.tokenizer.where}) lacks {token!r}",
      "Correct it",
    )
  return i
