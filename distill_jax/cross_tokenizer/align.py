"""Alignment of the tokens of two tokenizers on one axis of bytes.

In this module, G are the teacher's tokens of all segments, one after another, and H the student's.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.cross_tokenizer.vocabulary import Vocabulary

KINDS = ("exact", "within", "spanning", "mid", "crossing")
# The reasons for which a segment is skipped. The last three are for chats; see chats.py.
CONTROL = "control token without a role"
CUT = "not text"
SPELLING = "not spelt back"
FORM = "not in the form of the teacher's chat template"
CHANGED = "changed by the student's chat template"
REFUSED = "refused by the student's chat template"
REASONS = (CONTROL, CUT, SPELLING, FORM, CHANGED, REFUSED)
_CONTINUATION = 3  # bytes of a character after its first, at most


class Segment(NamedTuple):
  """The tokens of one segment, on an axis of bytes that begins with the segment.

  Attributes:
    token_G: int64, the teacher's tokens.
    start_G: int64, the place of the first byte of each.
    end_G: int64, the place after its last byte.
    id_H: int64, the student's tokens.
    start_H: int64, the place of the first byte of each; -1 if it begins with a dummy space.
    end_H: int64, the place after its last byte.
  """

  token_G: np.ndarray
  start_G: np.ndarray
  end_G: np.ndarray
  id_H: np.ndarray
  start_H: np.ndarray
  end_H: np.ndarray


@dataclasses.dataclass(frozen=True)
class Aligned:
  """The tokens of all segments on one axis of bytes.

  Attributes:
    token_G: int64, the teacher's tokens.
    start_G: int64, the place of the first byte of each.
    end_G: int64, the place after its last byte.
    segment_G: int64, the index of its segment.
    id_H: int64, the student's tokens.
    start_H: int64, the place of the first byte of each.
    end_H: int64, the place after its last byte.
    segment_H: int64, the index of its segment.
    g_H: int64, the index of the teacher token that holds its first byte.
    offset_H: int64, the number of bytes of that token that are before it.
  """

  token_G: np.ndarray
  start_G: np.ndarray
  end_G: np.ndarray
  segment_G: np.ndarray
  id_H: np.ndarray
  start_H: np.ndarray
  end_H: np.ndarray
  segment_H: np.ndarray
  g_H: np.ndarray
  offset_H: np.ndarray

  def kind_of(self, h: np.ndarray) -> np.ndarray:
    """Returns the kind of student tokens as indices of KINDS, int8.

    "exact", "within" and "spanning" tokens begin with a teacher token, and end with it, before and
    after its end. "mid" and "crossing" tokens begin inside of one; the latter end after it.
    """
    end, teacher_end = self.end_H[h], self.end_G[self.g_H[h]]
    aligned = np.where(end == teacher_end, 0, np.where(end < teacher_end, 1, 2))
    inside = np.where(end <= teacher_end, 3, 4)
    return np.where(self.offset_H[h] == 0, aligned, inside).astype(np.int8)


def join(segments: Sequence[Segment | None]) -> Aligned:
  """Returns segments on one axis, with a free place between them.

  None stands for a segment without tokens.
  """
  used = [(i, s) for i, s in enumerate(segments) if s is not None]
  sizes = [int(max(s.end_G[-1], s.end_H[-1] if len(s.end_H) else 0)) + 2 for _, s in used]
  bases = np.cumsum(sizes) - sizes
  empty = np.zeros(0, np.int64)

  def flat(name: str) -> np.ndarray:
    return np.concatenate([empty, *(getattr(s, name) for _, s in used)])

  def owner(name: str, values: Sequence[int] | np.ndarray) -> np.ndarray:
    counts = [len(getattr(s, name)) for _, s in used]
    return np.repeat(np.asarray(values, np.int64), counts)

  base_G, base_H = owner("token_G", bases), owner("id_H", bases)
  indices = [i for i, _ in used]
  start_G, start_H = flat("start_G") + base_G, flat("start_H") + base_H
  g_H = np.maximum(np.searchsorted(start_G, start_H, "right") - 1, 0)
  return Aligned(
    token_G=flat("token_G"),
    start_G=start_G,
    end_G=flat("end_G") + base_G,
    segment_G=owner("token_G", indices),
    id_H=flat("id_H"),
    start_H=start_H,
    end_H=flat("end_H") + base_H,
    segment_H=owner("id_H", indices),
    g_H=g_H,
    offset_H=start_H - start_G[g_H] if len(start_G) else empty,
  )


def align(
  tables: PairTables, segments: Sequence[np.ndarray], begins: Sequence[bool] = ()
) -> tuple[Aligned, collections.Counter[str]]:
  """Aligns the student's tokens of the texts of some segments with the teacher's.

  If the student's tokenizer begins a text with tokens, e.g. a BOS, and the teacher's does not, the
  student's begin each document.

  Args:
    tables: The tables of both tokenizers.
    segments: The teacher's tokens of each segment, integers. Chats are aligned by tables.chats.
    begins: True for each segment that begins a document. (): for none.

  Returns:
    The tokens on one axis, and the number of skipped segments by reason. A skipped segment has no
    tokens.
  """
  one = tables.chats or functools.partial(
    align_segment, tables.teacher, tables.student, tables.roles
  )
  results = [one(np.asarray(s, np.int64)) for s in segments]
  skipped = collections.Counter(r for r in results if isinstance(r, str))
  used = [r if isinstance(r, Segment) else None for r in results]
  if any(begins) and not (tables.chats or tables.teacher.tokenizer.begin):
    begin = np.array(tables.student.tokenizer.begin, np.int64)
    pairs = zip(used, begins, strict=True)
    used = [_with_beginning(s, begin) if s is not None and is_start else s for s, is_start in pairs]
  return join(used), skipped


def _with_beginning(segment: Segment, begin: np.ndarray) -> Segment:
  """Returns a segment in which the student has the tokens `begin` first, without bytes."""
  place = np.full(len(begin), segment.start_H[0] if len(segment.start_H) else 0)
  return segment._replace(
    id_H=np.append(begin, segment.id_H),
    start_H=np.append(place, segment.start_H),
    end_H=np.append(place, segment.end_H),
  )


def align_segment(
  teacher: Vocabulary, student: Vocabulary, roles: Mapping[int, int], token_G: np.ndarray
) -> Segment | str:
  """Aligns the student's tokens of one segment's text with the teacher's.

  Text is tokenized by the student. A control token becomes the student's token of the same role.
  One without a role, e.g. a BOS, is omitted at the beginning of a segment.

  Args:
    teacher: The teacher's vocabulary.
    student: The student's vocabulary.
    roles: The student's token of each of the teacher's control tokens that has one.
    token_G: int64, the teacher's tokens of the segment.

  Returns:
    The tokens, or one of REASONS.
  """
  start_G, end_G = teacher.places(token_G)
  if teacher.digest == student.digest:
    return Segment(token_G, start_G, end_G, token_G, start_G, end_G)
  controls = np.flatnonzero(teacher.length_V[token_G] == 0).tolist()
  ids: list[np.ndarray] = []
  starts: list[np.ndarray] = []
  ends: list[np.ndarray] = []
  first = 0
  for g in [*controls, len(token_G)]:
    is_last = g == len(token_G)
    if g > first:
      text = _align_text(teacher, student, token_G[first:g], is_first=first == 0, is_last=is_last)
      if isinstance(text, str):
        return text
      id_h, cut_h = text
      ids.append(id_h)
      starts.append(cut_h[:-1] + start_G[first])
      ends.append(cut_h[1:] + start_G[first])
    if not is_last:
      role = roles.get(int(token_G[g]))
      if role is not None:
        ids.append(np.array([role]))
        starts.append(start_G[g : g + 1])
        ends.append(end_G[g : g + 1])
      elif g > 0:
        return CONTROL
    first = g + 1
  if not len(token_G):
    return CUT
  empty = np.zeros(0, np.int64)
  id_H, start_H, end_H = (np.concatenate([empty, *x]) for x in (ids, starts, ends))
  return Segment(token_G, start_G, end_G, id_H, start_H, end_H)


def _align_text(
  teacher: Vocabulary, student: Vocabulary, tokens: np.ndarray, is_first: bool, is_last: bool
) -> tuple[np.ndarray, np.ndarray] | str:
  """Returns the student's tokens of a text, int64 [n], and their places in its bytes, int64 [n+1].

  Segments are cut at the ends of rows, so the first and the last text of a segment may begin and
  end inside of a character, which has no student tokens. Neither has the dummy space of a teacher
  such as Llama 2; the student's tokens may begin with their own.

  Args:
    teacher: The teacher's vocabulary.
    student: The student's vocabulary.
    tokens: The teacher's tokens of the text.
    is_first: True for the first text of a segment.
    is_last: True for the last one.

  Returns:
    Both arrays, or one of REASONS.
  """
  data = teacher.spell(tokens.tolist())
  head = 0
  if is_first:
    cut = min(_CONTINUATION, len(data))
    head = next((i for i in range(cut) if data[i] & 0xC0 != 0x80), cut)
  if teacher.has_dummy_space and data[:1] == b" ":
    head = 1
  try:
    text = data[head:].decode()
  except UnicodeDecodeError as e:
    if not is_last or e.reason != "unexpected end of data":
      return CUT
    text = data[head : head + e.start].decode()
  if not text:
    return np.zeros(0, np.int64), np.array([head])
  places = student.locate(text)
  if places is None:
    return SPELLING
  ids, cuts = places
  return ids, cuts + head
