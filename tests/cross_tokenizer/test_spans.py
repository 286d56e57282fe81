"""Spans that both tokenizers begin and end with a token, against hand-made and enumerated ones."""

import itertools

import chats
import numpy as np
import pytest
import small_tokenizers
from toy_vocabularies import Toy

from distill_jax.cross_tokenizer.chats import ChatAligner, chat_vocabulary
from distill_jax.cross_tokenizer.roles import match_roles
from distill_jax.cross_tokenizer.rows import align_rows
from distill_jax.cross_tokenizer.spans import add_spans
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.data.chat_template import ChatTemplate

TEACHER = Toy(None, b"a", b"b", b"c", b" ", b"ab", b"bc", b"ca", b" a")
STUDENT = Toy(b"a", b"b", b"c", b" ", b"abc", b"b ", b"cab", b" ab", b"aaa", None)


def row(tokens, segments=None, masked=()):
  """A row of teacher tokens, and a log-probability of each label that tells which one it is."""
  tokens = np.array(tokens, np.int32)
  segments = np.ones(len(tokens), np.int32) if segments is None else np.array(segments, np.int32)
  mask = np.append((segments[1:] == segments[:-1]) & (segments[1:] > 0), False)
  mask[list(masked)] = False
  logp = np.where(mask, -(2.0 ** np.arange(len(tokens))), np.nan)  # sums tell their terms
  return {"tokens_T": tokens, "segments_T": segments, "mask_T": mask, "label_logp_T": logp}


def with_spans(rows, length=16, teacher=TEACHER, student=STUDENT):
  aligned = align_rows(PairTables(teacher, student, {}), rows, length)
  add_spans(aligned, [r["label_logp_T"] for r in rows])
  return aligned.records


def spans_of(record):
  """{(first position, last position): log-probability} of a record."""
  out, start = {}, None
  for t, left in enumerate(record["span_left_T"].tolist()):
    start = t if left and start is None else start
    if left == 1:
      logps = record["span_logp_T"][start : t + 1]
      assert len(set(logps.tolist())) == 1
      assert record["span_left_T"][start : t + 1].tolist() == list(range(t + 1 - start, 0, -1))
      out[start, t], start = float(logps[0]), None
  assert start is None
  return out


def test_spans_end_where_both_tokenizations_agree():
  """Teacher: a bc ab c " a" b; student: abc abc " ab". Nothing predicts the first span."""
  record, *_ = with_spans([row([1, 6, 5, 3, 8, 2])])
  assert record["tokens_T"][:4].tolist() == [4, 4, 7, 0]
  # The label of position 0 is the second abc: ab and c, the teacher's labels of positions 1 and 2.
  assert spans_of(record) == {(0, 0): -(2 + 4), (1, 1): -(8 + 16)}


def test_a_span_may_have_several_labels_and_a_segment_ends_it():
  """Teacher: b ca b, and " a" ca; student: b cab, and " " a c a."""
  record, *_ = with_spans([row([2, 7, 2, 8, 7], [1, 1, 1, 2, 2])])
  assert record["segments_T"][:6].tolist() == [1, 1, 2, 2, 2, 2]
  assert spans_of(record) == {(0, 0): -(1 + 2), (3, 4): -8}


def test_masked_and_cut_spans_are_left_out():
  tokens = [1, 2, 1, 3, 2, 2]
  whole = spans_of(with_spans([row(tokens)])[0])
  masked = spans_of(with_spans([row(tokens, masked=[2])])[0])
  assert len(masked) == len(whole) - 1 and masked.items() < whole.items()
  cut = spans_of(with_spans([row(tokens)], length=4)[0])
  assert cut == {place: p for place, p in whole.items() if place[1] < 3}


def test_equal_tokenizers_have_spans_of_one_label():
  record, *_ = with_spans([row([1, 6, 5, 3])], student=TEACHER)
  assert spans_of(record) == {(0, 0): -1, (1, 1): -2, (2, 2): -4}


@pytest.mark.parametrize("seed", range(20))
def test_random_rows_equal_an_enumeration(seed):
  """Spans by sets of byte places, for rows of several segments, some of them masked."""
  rng = np.random.default_rng(seed)
  rows = []
  for _ in range(3):
    tokens = rng.integers(1, TEACHER.size, 12)
    segments = np.sort(rng.integers(1, 4, 12))
    rows.append(row(tokens, segments, rng.choice(11, 2, replace=False)))
  for source, record in zip(rows, with_spans(rows, length=64), strict=True):
    want, position = {}, 0
    for segment in np.unique(source["segments_T"]):
      places = np.flatnonzero(source["segments_T"] == segment)
      theirs = source["tokens_T"][places]
      ours, starts = STUDENT.locate(TEACHER.spell(theirs).decode())
      ends = np.cumsum(TEACHER.length_V[theirs])
      common = sorted({*ends.tolist()} & {*starts[1:].tolist()})
      for low, high in itertools.pairwise(common):
        t = places[(ends > low) & (ends <= high)] - 1
        h = position + np.flatnonzero((starts[1:] > low) & (starts[1:] <= high)) - 1
        if source["mask_T"][t].all():
          want[h[0], h[-1]] = source["label_logp_T"][t].sum()
      position += len(ours)
    assert spans_of(record) == want


NAMED = (("bos_token", "<s>"), ("eos_token", "</s>"))
CHAT = [
  chats.user("Is 12 times 7\n84?"),
  chats.reply("Fine é漢😀! the other one"),
  chats.user("then"),
  chats.reply("def f(x):\n    return x"),
]
BLANKS = [{**m, "content": f"\n{m['content']}e\n"} for m in CHAT]  # some templates strip them


# A student's template with text at both sides of a content, of which tokens reach into it.
SPACED = """{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '\\n<|end|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""


@pytest.fixture(scope="module")
def tokenizers():
  """Returns the teacher's and the student's tokenizer, which have all special tokens."""
  special = [t for t in chats.SPECIAL if t != "<s>"]
  return (
    small_tokenizers.byte_level(450, special=["<s>", *special], literal=["e\n"]),
    small_tokenizers.byte_level(330, special=[*reversed(special), "<s>"], literal=["\n\n"]),
  )


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
  ("teacher", "student"), [("chatml", "llama"), ("llama", "phi"), ("r1", "chatml"), ("phi", SPACED)]
)
def test_spans_of_chats_have_the_same_bytes(teacher, student, masked, tokenizers):
  """Each sum of log-probabilities is that of the teacher's tokens with the span's bytes."""
  templates = [ChatTemplate(chats.TEMPLATES.get(t, t), NAMED) for t in (teacher, student)]
  a, b = (chat_vocabulary(t, s) for t, s in zip(tokenizers, templates, strict=True))
  tables = PairTables(a, b, match_roles(a, b, {}), ChatAligner(a, b, *templates))
  chat = BLANKS if student == SPACED else CHAT
  ids, taught = templates[0].tokens_and_mask(tokenizers[0], chat)
  source = row(ids * 2, np.repeat([1, 2], len(ids)))
  if masked:
    source["mask_T"] &= np.append(taught * 2, 0)[1:] > 0
  logp = -np.random.default_rng(0).random(2 * len(ids))
  aligned = align_rows(tables, [source], 512)
  add_spans(aligned, [logp])
  spell = lambda v, ids: b"".join(v.bytes_V[i] or b"\xff" for i in ids)
  texts = {}  # by the sum of log-probabilities
  for i in range(2 * len(ids)):
    for j in range(i + 1, min(i + 20, 2 * len(ids))):
      texts[round(logp[i:j].sum(), 5)] = spell(a, (ids * 2)[i + 1 : j + 1])
  found = spans_of(aligned.records[0])
  assert len(found) > 30
  for (start, last), total in found.items():
    ours = spell(b, aligned.records[0]["tokens_T"][start + 1 : last + 2])
    assert texts[round(total, 5)] == ours
