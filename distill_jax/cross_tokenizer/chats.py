"""Chats in the form of the teacher's chat template, aligned with the student's form of them.

A segment of a store is parsed into turns, each with a role and a content. The student's form has
the same contents between the texts of the student's template. Tokens inside of contents are aligned
by bytes, the token that ends an assistant's turn by its role. All other tokens of the student's
template are prompt: they have no distribution.

What precedes an assistant's turn has to be what the student's template gives as the prompt for it.
So a chat is skipped if that template changes a content, e.g. strips white space or removes earlier
thoughts. Skipped chats are counted by reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from distill_jax.cross_tokenizer.align import CHANGED, CUT, FORM, REFUSED, SPELLING, Segment
from distill_jax.cross_tokenizer.chat_markers import AFTER, dated, find_markers
from distill_jax.cross_tokenizer.vocabulary import Vocabulary
from distill_jax.data.chat_template import ChatTemplate
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError


class Turn(NamedTuple):
  """A message of a chat in the teacher's tokens.

  Attributes:
    role: The role.
    content: The content.
    start: The place of its first byte on the axis of `align.Segment`.
    end: The index of the teacher's token that ends the turn; -1 without one.
  """

  role: str
  content: str
  start: int
  end: int


def chat_vocabulary(
  tokenizer: Tokenizer, template: ChatTemplate, stops: Iterable[int] = ()
) -> Vocabulary:
  """Returns the vocabulary of a tokenizer for chats, which end with the token that ends a turn.

  Args:
    tokenizer: The tokenizer.
    template: The chat template.
    stops: Further ids that end a text.

  Raises:
    InputError: If the template cannot be used; see `chat_markers.find_markers`.
  """
  markers = find_markers(template, tokenizer)
  return Vocabulary(tokenizer, stops, markers.end_id, markers.ids)


class Rendered(NamedTuple):
  """A chat in the student's form.

  Attributes:
    text: The text.
    contents: The places of the contents among its bytes: (start, end) of each turn.
  """

  text: str
  contents: list[tuple[int, int]]


class ChatAligner:
  """Aligns chats. It can be pickled.

  Args:
    teacher: The teacher's tokens, from `chat_vocabulary`.
    student: The student's.
    teacher_template: The teacher's chat template.
    student_template: The student's.

  Raises:
    InputError: If a template cannot be used.
  """

  def __init__(
    self,
    teacher: Vocabulary,
    student: Vocabulary,
    teacher_template: ChatTemplate,
    student_template: ChatTemplate,
  ):
    self._theirs, self._ours, self._template = teacher, student, dated(student_template)
    self._teacher = find_markers(teacher_template, teacher.tokenizer)
    self._student = find_markers(student_template, student.tokenizer)
    same_form = teacher_template.source == student_template.source
    self._is_same = same_form and teacher.digest == student.digest
    self._special = [*dict(student_template.tokens).values(), *student_template.added]
    # Where a system message is a part of the user's, it is parsed as that: of equals, the user's.
    begins = sorted(self._teacher.begin_pattern.items(), key=lambda x: -len(x[1]))
    self._begins = [(role, re.compile(pattern.encode())) for role, pattern in begins]
    student.tokenizer.encode_places("a", self._special)  # raises if it cannot

  def __call__(self, token_G: np.ndarray) -> Segment | str:
    """Aligns the student's tokens of a chat with the teacher's.

    Args:
      token_G: int64, the teacher's tokens of one segment.

    Returns:
      The tokens, or the reason for which the chat is skipped.
    """
    if self._is_same:
      start_G, end_G = self._theirs.places(token_G)
      return Segment(token_G, start_G, end_G, token_G, start_G, end_G)
    turns = self.parse(token_G)
    if isinstance(turns, str):
      return turns
    rendered = self._render(turns)
    return rendered if isinstance(rendered, str) else self._place(token_G, turns, rendered)

  def parse(self, token_G: np.ndarray) -> list[Turn] | str:
    """Returns the turns of a chat in the teacher's tokens, or the reason to skip it."""
    of = self._theirs
    pieces = [of.bytes_V[i] or (of.tokenizer.piece(i) or "").encode() for i in token_G.tolist()]
    text = b"".join(pieces)
    place_G = np.cumsum([0, *map(len, pieces)])  # in `text`, where control tokens have their names
    spans = self._spans(text)
    if spans is None:
      return FORM
    axis_G, _ = self._theirs.places(token_G)
    end_text = (self._teacher.before_end + self._teacher.end).encode()
    turns = []
    for n, (role, start, stop) in enumerate(spans):
      first = int(np.searchsorted(place_G, start, "right")) - 1
      last = int(np.searchsorted(place_G, stop))
      if first < last and not of.length_V[token_G[first:last]].all():
        return FORM
      try:
        content = text[start:stop].decode()
      except UnicodeDecodeError as e:
        if n < len(spans) - 1 or stop < len(text) or e.reason != "unexpected end of data":
          return CUT
        content = text[start : start + e.start].decode()
      end = -1
      if role == "assistant" and text.startswith(end_text, stop):
        end_at = stop + len(self._teacher.before_end.encode())
        end = int(np.searchsorted(place_G, end_at))
        if token_G[end] != self._teacher.end_id:
          return FORM
      axis = int(axis_G[first] + start - place_G[first]) if first < len(token_G) else 0
      turns.append(Turn(role, content, axis, end))
    return turns

  def _spans(self, text: bytes) -> list[tuple[str, int, int]] | None:
    """Returns (role, start, end) of each content in the text of a chat; None for another form."""
    found = ((role, m.end()) for role, begin in self._begins if (m := begin.match(text)))
    role, at = next(found, ("", 0))
    out = []
    while role:
      between = self._teacher.between[role].encode()
      stop = text.find(between, at)
      if stop < 0:
        break
      out.append((role, at, stop))
      role, at = AFTER[role], stop + len(between)
    if role == "assistant":
      stop = text.find((self._teacher.before_end + self._teacher.end).encode(), at)
      stop = len(text) if stop < 0 else stop
      rest = text[stop:].decode(errors="replace")  # a chat may stop anywhere after its last turn
      ends = (self._teacher.last[role], self._teacher.before_end + self._teacher.end)
      is_whole = any(end.startswith(rest) for end in ends)
    elif role == "user":
      last = self._teacher.last[role].encode()
      stop, is_whole = len(text) - len(last), text.endswith(last)
    return [*out, (role, at, stop)] if role in ("assistant", "user") and is_whole else None

  def _render(self, turns: list[Turn]) -> Rendered | str:
    """Returns a chat in the student's form, or the reason why it has none."""
    markers = self._student
    if turns[0].role not in markers.begin:
      return REFUSED
    text, contents, at = markers.begin[turns[0].role], [], 0
    for n, turn in enumerate(turns):
      at = len(text.encode()) if n == 0 else at
      if turn.role == "assistant":
        messages = [{"role": t.role, "content": t.content} for t in turns[:n]]
        try:
          prompt = self._template.render(messages, add_generation_prompt=True)
        except InputError:
          return REFUSED
        if not (text + turn.content).startswith(prompt):
          return CHANGED
      after = markers.between[turn.role]
      if n == len(turns) - 1:
        after = self._last(turn)
      size = len(turn.content.encode())
      contents.append((at, at + size))
      text += turn.content + after
      at += size + len(after.encode())
    return Rendered(text, contents)

  def _last(self, turn: Turn) -> str:
    """Returns the text after the content of the last turn."""
    if turn.role != "assistant":
      return self._student.last[turn.role]
    if turn.end < 0:  # the teacher's text was cut
      return ""
    end, last = self._student.before_end + self._student.end, self._student.last[turn.role]
    return last if last.startswith(end) else end

  def _place(self, token_G: np.ndarray, turns: list[Turn], rendered: Rendered) -> Segment | str:
    """Returns the student's tokens of a chat on the axis of the teacher's."""
    ids = self._tokenize(rendered.text)
    if ids is None:
      return SPELLING
    id_H, start_H, end_H = ids
    start_G, end_G = self._theirs.places(token_G)
    before_H, after_H = np.zeros_like(start_H), np.zeros_like(end_H)  # prompt: the first place
    marker = len(self._student.before_end.encode())
    for turn, (start, end) in zip(turns, rendered.contents, strict=True):
      inside = slice(*np.searchsorted(start_H, [start, end]))
      fits = end_H[inside] <= end
      before_H[inside] = np.where(fits, start_H[inside] - start + turn.start, 0)
      after_H[inside] = np.where(fits, end_H[inside] - start + turn.start, 0)
      h = int(np.searchsorted(start_H, end + marker))
      if turn.end >= 0 and h < len(id_H) and id_H[h] == self._student.end_id:
        before_H[h], after_H[h] = start_G[turn.end], end_G[turn.end]
    return Segment(token_G, start_G, end_G, id_H, before_H, after_H)

  def _tokenize(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Returns the student's tokens of a chat and their places among its bytes; None if unknown.

    The tokens are those of transformers' `apply_chat_template`. Places begin and end with the
    bytes of a token, and in control tokens with its name.
    """
    vocabulary, raw = self._ours, text.encode()
    ids, spans = vocabulary.tokenizer.encode_places(text, self._special)
    byte_of = np.cumsum([0, *(len(c.encode()) for c in text)]).tolist()
    starts, at, after_control = [], 0, True
    for i, (_, stop) in zip(ids, spans, strict=True):
      b = vocabulary.bytes_V[i]
      if b is None:  # it may have removed white space at its sides
        name = (vocabulary.tokenizer.piece(i) or "").encode()
        start = raw.find(name, at, byte_of[stop])
        if start < 0 or raw[at:start].strip():
          return None
        starts.append(start)
        at = byte_of[stop]
      elif raw.startswith(b, at):
        starts.append(at)
        at += len(b)
      elif after_control and b[:1] == b" " and raw.startswith(b[1:], at):  # a dummy space
        starts.append(at - 1)
        at += len(b) - 1
      else:
        return None
      after_control = b is None
    if at != len(raw):
      return None
    start_H = np.array(starts, np.int64)
    return np.array(ids, np.int64), start_H, np.append(start_H[1:], at)
