"""A student's own tokens, whatever it sampled, aligned with the teacher's tokens of the text."""

import pickle

import chats
import numpy as np
import pytest
import small_tokenizers
import tiny_pair

from distill_jax.cross_tokenizer.align import CONTROL, FORM
from distill_jax.cross_tokenizer.chat_markers import dated
from distill_jax.cross_tokenizer.chats import chat_vocabulary
from distill_jax.cross_tokenizer.roles import match_roles
from distill_jax.cross_tokenizer.sides import Side
from distill_jax.cross_tokenizer.student_texts import StudentTexts
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.data.chat_template import ChatTemplate

pytestmark = pytest.mark.smoke

T, LENGTH = 24, 32
ACCENTS = "ab Ã©"  # of a byte-level vocabulary: the last two are the bytes of é


def texts_of(tables, length=LENGTH):
  return StudentTexts(tables, Side(tables.teacher, None), Side(tables.student, None), length)


def accents():
  """A pair whose student has a token for each byte of é, and the teacher one for both."""
  teacher = tiny_pair.vocabulary((*tiny_pair.TEACHER, "Ã ©"), ACCENTS)
  student = tiny_pair.vocabulary((*tiny_pair.STUDENT, "b Ã", "© ©"), ACCENTS)
  return PairTables(teacher, student, match_roles(teacher, student, {}))


def row(ids, prompt=1):
  """A row whose tokens after the prompt were generated."""
  t, n = np.arange(T), len(ids)
  tokens = np.zeros(T, np.int32)
  tokens[:n] = ids
  mask = (t >= prompt - 1) & (t < n - 1)
  reward = np.ones(T, np.float32)
  return {"tokens_T": tokens, "segments_T": np.int32(t < n), "mask_T": mask, "reward_T": reward}


def sampled(tables, seed, size):
  """Random tokens of the student that spell text: mostly not as its tokenizer would."""
  with_bytes = np.flatnonzero(tables.student.length_V)
  return np.random.default_rng(seed).choice(with_bytes, size)


@pytest.mark.parametrize("seed", range(5))
def test_sampled_tokens_are_kept_and_the_teachers_spell_the_same_text(seed):
  tables = tiny_pair.tables()
  ids = sampled(tables, seed, 15)
  one = row(ids, prompt=4)
  aligned, theirs = texts_of(tables).align(one)
  (ours,) = aligned.records
  for name, x in one.items():
    np.testing.assert_array_equal(ours[name], x)  # every generated token has a target
  used = theirs["tokens_T"][theirs["segments_T"] > 0]
  text = tables.student.spell(ids)
  np.testing.assert_array_equal(used, tables.teacher.locate(text.decode())[0])
  assert aligned.token_X.tolist() == list(range(4, 15))
  # The places of both are those of the same bytes.
  for h in aligned.token_X:
    a, b = aligned.aligned.start_H[h], aligned.aligned.end_H[h]
    assert text[a:b] == tables.student.bytes_V[ids[h]]
  assert not np.array_equal(ids, tables.student.locate(text.decode())[0])


def test_the_token_that_ends_a_text_has_a_target_and_what_follows_none():
  tables = tiny_pair.tables()
  end = tables.student.end
  ids = [*sampled(tables, 0, 8), end]
  aligned, theirs = texts_of(tables).align(row(ids))
  assert aligned.token_X[-1] == 8
  assert theirs["tokens_T"][theirs["segments_T"] > 0][-1] == tables.teacher.end
  aligned, _ = texts_of(tables).align(row([*ids, 0, 1, 0]))
  assert aligned.token_X.max() == 8 and aligned.cut_targets == 3


B, C3, A9 = (ACCENTS.index(c) for c in ("b", "Ã", "©"))  # the teacher merges no b b
B_C3, A9_A9 = (accents().student.id_of[b] for b in (b"b\xc3", b"\xa9\xa9"))


@pytest.mark.parametrize(
  ("ids", "taught", "text"),
  [
    ([B, B, C3, A9, B], [1, 2, 3, 4], "bbéb"),  # a whole character in two tokens
    ([B, B, C3], [1], "bb"),  # cut inside of a character
    ([B, B, C3, B, B], [1], "bb"),  # bytes that are no text
    ([B, A9, B], [], "b"),
    ([B, B, B_C3, A9_A9], [1], "bbb"),  # half of the character is in a token that is no text
  ],
)
def test_bytes_that_are_no_text_and_what_follows_them_have_no_targets(ids, taught, text):
  tables = accents()
  aligned, theirs = texts_of(tables).align(row(ids))
  assert aligned.token_X.tolist() == taught
  assert aligned.cut_targets == len(ids) - 1 - len(taught)
  np.testing.assert_array_equal(aligned.records[0]["tokens_T"][: len(ids)], ids)
  used = theirs["tokens_T"][theirs["segments_T"] > 0]
  np.testing.assert_array_equal(used, tables.teacher.locate(text)[0])


def test_a_teacher_begins_a_text_with_its_own_tokens():
  teacher = tiny_pair.vocabulary(tiny_pair.TEACHER)
  student = tiny_pair.vocabulary(tiny_pair.STUDENT)
  teacher.tokenizer.__dict__["begin"] = [teacher.end, teacher.end]
  student.tokenizer.__dict__["begin"] = [student.end]
  tables = PairTables(teacher, student, match_roles(teacher, student, {}))
  ids = sampled(tables, 1, 6)
  plain, begun = [], []
  for begin, found in ((), plain), ((student.end,), begun):
    aligned, theirs = texts_of(tables).align(row([*begin, *ids], prompt=len(begin) + 1))
    found += [theirs["tokens_T"], (aligned.token_X - len(begin)).tolist()]
    g_X = aligned.aligned.g_H[aligned.token_X]
    found += [g_X.tolist(), aligned.offset_X.tolist()]
    assert theirs["tokens_T"][:2].tolist() == [teacher.end] * 2 and g_X.min() >= 2
  np.testing.assert_array_equal(plain[0], begun[0])
  assert plain[1:] == begun[1:] and plain[1] == [1, 2, 3, 4, 5]


def test_what_the_teachers_row_does_not_hold_has_no_target():
  tables = tiny_pair.tables()
  one = row(sampled(tables, 2, 12))
  whole, theirs = texts_of(tables).align(one)
  places, spanning = whole.aligned, 0
  for length in range(2, int(theirs["segments_T"].sum())):
    short, cut = texts_of(tables, length).align(one)
    np.testing.assert_array_equal(cut["tokens_T"], theirs["tokens_T"][:length])
    end = places.end_G[length - 1]
    fits = [h for h in whole.token_X if places.end_H[h] <= end]
    assert short.token_X.tolist() == fits and len(fits) < len(whole.token_X)
    spanning += sum(places.start_H[h] < end < places.end_H[h] for h in whole.token_X)
  assert spanning  # tokens that begin in the row and end after it


def test_a_prompt_that_the_teacher_cannot_read_is_skipped():
  tables = tiny_pair.tables()
  tables = PairTables(tables.teacher, tables.student, {})
  aligned, theirs = texts_of(tables).align(row([0, tables.student.end, 1, 0, 1], prompt=4))
  # The end of a text always has a role, the student's other control tokens here none.
  assert aligned.skipped == {} and len(aligned.token_X)
  texts = texts_of(tables)
  texts._roles.clear()
  aligned, theirs = texts.align(row([0, tables.student.end, 1, 0, 1], prompt=4))
  assert aligned.skipped == {CONTROL: 1} and not aligned.records[0]["mask_T"].any()
  assert not theirs["segments_T"].any()


@pytest.fixture(scope="module")
def chat_sides():
  """Returns the teacher's and the student's tokens of chats."""
  return sides_of("llama", "chatml")


def sides_of(*names):
  special = [t for t in chats.SPECIAL if t != "<s>"]
  tokenizers = (
    small_tokenizers.byte_level(450, special=["<s>", *special]),
    small_tokenizers.byte_level(330, special=[*reversed(special), "<s>"]),
  )
  named = (("bos_token", "<s>"), ("eos_token", "</s>"))
  templates = [ChatTemplate(chats.TEMPLATES[name], named) for name in names]
  return [Side(chat_vocabulary(t, c), c) for t, c in zip(tokenizers, templates, strict=True)]


@pytest.mark.parametrize("ends", [True, False])
def test_a_chat_is_read_in_the_teachers_template(ends, chat_sides):
  """The student wrote its answer byte by byte; the teacher's is one of its own chats."""
  teacher, student = chat_sides
  a, b = teacher.vocabulary, student.vocabulary
  tables = PairTables(a, b, match_roles(a, b, {}))
  asked, answer = [chats.user("Is 12 times 7\n84?")], "Fine é漢! the other one"
  prompt = student.template.render(asked, add_generation_prompt=True)
  begin = b.tokenizer.encode_places(prompt, [])[0]
  ids = begin + [b.id_of[bytes([x])] for x in answer.encode()] + [b.end] * ends
  length = np.zeros(len(ids) + 8, np.int32)
  one = {"tokens_T": length.copy(), "segments_T": length.copy(), "mask_T": length > 0}
  one["tokens_T"][: len(ids)], one["segments_T"][: len(ids)] = ids, 1
  one["mask_T"][len(begin) - 1 : len(ids) - 1] = True
  aligned, theirs = StudentTexts(tables, *chat_sides, 200).align(one)
  np.testing.assert_array_equal(aligned.records[0]["mask_T"], one["mask_T"])
  messages = [*asked, chats.reply(answer)]
  whole, mask = dated(teacher.template).tokens_and_mask(a.tokenizer, messages)
  used = theirs["tokens_T"][theirs["segments_T"] > 0].tolist()
  generated = int(np.flatnonzero(mask)[0])
  assert used[:generated] == whole[:generated] and a.spell(used[generated:]).decode() == answer
  # Each byte lies in the teacher's token that spells it, and ends go together.
  places = aligned.aligned
  for h, g, r in zip(aligned.token_X, places.g_H[aligned.token_X], aligned.offset_X, strict=True):
    spelt = b.bytes_V[ids[h]]
    assert spelt == (a.bytes_V[used[g]][r : r + 1] if spelt else None)
  assert (used[places.g_H[aligned.token_X[-1]]] == a.end) == ends
  # Another token that ends a text inside of the answer, or a text that is no chat.
  stop = b.tokenizer.token_id("</s>")
  assert stop in b.stops and stop != b.end
  one["tokens_T"][len(begin) + 4] = stop
  aligned, _ = StudentTexts(tables, *chat_sides, 200).align(one)
  assert aligned.token_X.tolist() == list(range(len(begin), len(begin) + 4))
  one["tokens_T"][:2] = ids[5]
  assert StudentTexts(tables, *chat_sides, 200).align(one)[0].skipped == {FORM: 1}


def test_a_token_that_also_spells_the_template_has_no_target():
  """The teacher reads the newline of its template and the first of the answer as one token."""
  teacher, student = sides = sides_of("chatml", "phi")
  a, b = teacher.vocabulary, student.vocabulary
  prompt = student.template.render([chats.user("then")], add_generation_prompt=True)
  begin, n = b.tokenizer.encode_places(prompt, [])[0], b.id_of[b"\n\n"]
  ids = [*begin, n, *(b.id_of[bytes([x])] for x in b"Fine"), b.end]
  length = np.zeros(len(ids), np.int32)
  one = {"tokens_T": np.array(ids, np.int32), "segments_T": length + 1, "mask_T": length > 0}
  one["mask_T"][len(begin) - 1 : -1] = True
  tables = PairTables(a, b, match_roles(a, b, {}))
  aligned, theirs = StudentTexts(tables, *sides, 200).align(one)
  text = b"".join(a.bytes_V[i] or b"|" for i in theirs["tokens_T"][theirs["segments_T"] > 0])
  assert text.endswith(b"assistant\n\n\nFine|\n") and a.id_of[b"\n\n"] in theirs["tokens_T"]
  assert aligned.token_X.tolist() == list(range(len(begin) + 1, len(ids)))


def test_the_aligner_can_be_pickled():
  texts = pickle.loads(pickle.dumps(texts_of(tiny_pair.tables())))
  one = row(sampled(tiny_pair.tables(), 3, 9))
  want, got = (t.align(one)[0].token_X for t in (texts_of(tiny_pair.tables()), texts))
  np.testing.assert_array_equal(got, want)
