"""Chats of a store are aligned by turns, between the texts of both chat templates."""

import pickle

import chats
import numpy as np
import pytest
import small_tokenizers

from distill_jax.cross_tokenizer.align import CHANGED, FORM, REFUSED
from distill_jax.cross_tokenizer.chats import ChatAligner, chat_vocabulary
from distill_jax.cross_tokenizer.roles import match_roles
from distill_jax.cross_tokenizer.sides import side
from distill_jax.data.chat_template import ChatTemplate
from distill_jax.errors import InputError
from distill_jax.hub.tokenizer import TokenizerFiles

pytestmark = pytest.mark.smoke

NAMED = (("bos_token", "<s>"), ("eos_token", "</s>"))
system = lambda content: {"role": "system", "content": content}
SEVERAL = [
  system("the theme"),
  chats.user("Is 12 times 7\n84?"),
  chats.reply("Fine é漢😀! the other one"),
  chats.user("\n  then  "),
  chats.reply("def f(x):\n    return x"),
]
NO_SYSTEM = SEVERAL[1:]
STRIPS = chats.CHATML.replace("message['content']", "(message['content'] | trim)")


@pytest.fixture(scope="module")
def tokenizers():
  """Returns the teacher's and the student's tokenizer, which have all special tokens."""
  special = [t for t in chats.SPECIAL if t != "<s>"]
  return (
    small_tokenizers.byte_level(450, special=["<s>", *special], literal=["<think>", "</think>"]),
    small_tokenizers.byte_level(330, special=[*reversed(special), "<s>"]),
  )


def template(source):
  return ChatTemplate(chats.TEMPLATES.get(source, source), NAMED)


@pytest.fixture(scope="module")
def aligner(tokenizers):
  """Returns a function that makes the aligner of two templates."""

  def make(teacher, student):
    sides = [template(teacher), template(student)]
    a, b = (chat_vocabulary(t, s) for t, s in zip(tokenizers, sides, strict=True))
    return ChatAligner(a, b, *sides)

  return make


def packed(tokenizers, name, messages):
  """Returns the teacher's tokens of a chat, and whether each is trained on."""
  ids, mask = template(name).tokens_and_mask(tokenizers[0], messages)
  return np.array(ids, np.int64), np.array(mask)


def check(aligner, token_G, mask_G, text):
  """Checks a chat against its student's text; returns the bytes of the student's taught tokens.

  The truth is the bytes of the teacher's tokens at the place of each student token.
  """
  segment = aligner(token_G)
  teacher, student = aligner._theirs, aligner._ours
  roles = match_roles(teacher, student, {})
  spelt = lambda v, ids: "".join(
    (v.bytes_V[i] or v.tokenizer.piece(i).encode()).decode("latin-1") for i in ids.tolist()
  )
  assert spelt(student, segment.id_H).encode("latin-1").decode() == text
  assert segment.id_H.tolist() == student.tokenizer.encode_places(text, [])[0]
  np.testing.assert_array_equal(segment.token_G, token_G)
  axis = b"".join(teacher.bytes_V[i] or b"\xff" for i in token_G.tolist())
  taught = b""
  for i, start, end in zip(segment.id_H, segment.start_H, segment.end_H, strict=True):
    g = int(np.searchsorted(segment.start_G, start, "right")) - 1
    if end > start and mask_G[g]:
      if student.bytes_V[i] is None:
        assert i == roles[token_G[g]] and (start, end) == (
          segment.start_G[g],
          segment.end_G[g],
        )
        taught += b"\xff"
      else:
        assert student.bytes_V[i] == axis[start:end]
        taught += student.bytes_V[i]
  return taught


PAIRS = [("chatml", "llama"), ("llama", "chatml"), ("mistral", "chatml"), ("chatml", "mistral")]
PAIRS += [("r1", "chatml"), ("chatml", "r1"), ("phi", "llama"), ("chatml", "qwen"), ("qwen", "phi")]
PAIRS += [("generation", "llama"), ("chatml", STRIPS)]


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_contents_and_ends_of_turns_are_aligned(teacher, student, aligner, tokenizers):
  chat = NO_SYSTEM[:2] + [chats.user("then"), *NO_SYSTEM[3:]]
  token_G, mask_G = packed(tokenizers, teacher, chat)
  if teacher == "qwen":  # only its last turn is trained on, with the empty thought
    chat[-1] = chats.reply("<think>\n\n</think>\n\n" + chat[-1]["content"])
  made = aligner(teacher, student)
  text = made._template.render(chat)
  if student == "qwen":  # the teacher did not think
    text = text.replace("<think>\n\n</think>\n\n", "")
  taught = check(made, token_G, mask_G, text)
  contents = [chat[i]["content"] for i in (1, 3)][teacher == "qwen" :]
  assert taught == b"".join(c.encode() + b"\xff" for c in contents)


def test_a_system_prompt_and_masks_of_several_turns(aligner, tokenizers):
  chat = [*SEVERAL[:3], chats.user("then"), SEVERAL[4]]
  token_G, mask_G = packed(tokenizers, "chatml", chat)
  made = aligner("chatml", "llama")
  turns = made.parse(token_G)
  assert [(t.role, t.content) for t in turns[:3]] == [
    (m["role"], m["content"]) for m in SEVERAL[:3]
  ]
  text = made._template.render(chat)
  both = "Fine é漢😀! the other one".encode() + b"\xffdef f(x):\n    return x\xff"
  assert check(made, token_G, mask_G, text) == both
  only_last = mask_G & (np.arange(len(mask_G)) > turns[2].end)
  assert check(made, token_G, only_last, text) == b"def f(x):\n    return x\xff"


def test_a_system_prompt_in_the_users_message(aligner, tokenizers):
  merges = """{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\\n' %}
{%- set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}
{%- for m in messages %}{{ '<|' + m.role + '|>' }}{% if loop.first %}{{ s }}{% endif %}
{{- m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
  chat = [*SEVERAL[:2], chats.reply("b")]
  merged = [chats.user("the theme\nIs 12 times 7\n84?"), chats.reply("b")]
  for teacher, student, want in (("chatml", merges, chat), (merges, "chatml", merged)):
    token_G, mask_G = packed(tokenizers, teacher, chat)
    made = aligner(teacher, student)
    assert check(made, token_G, mask_G, made._template.render(want)) == b"b\xff"


def test_the_date_of_the_record_is_not_that_of_the_student(aligner, tokenizers):
  token_G, mask_G = packed(tokenizers, "llama", SEVERAL[:3])  # it writes today's date
  made = aligner("llama", "llama")
  text = made._template.render(SEVERAL[:3])
  assert "Today: 01 Jan 2025" in text
  assert check(made, token_G, mask_G, text).startswith(b"Fine ")


def test_contents_that_a_template_changes_are_skipped(aligner, tokenizers):
  spaces = [chats.user("then"), chats.reply(" Fine "), chats.user("a"), chats.reply("b")]
  token_G, mask_G = packed(tokenizers, "chatml", spaces)
  assert aligner("chatml", STRIPS)(token_G) == CHANGED
  text = aligner("chatml", "phi")._template.render(spaces)
  assert check(aligner("chatml", "phi"), token_G, mask_G, text) == b" Fine \xffb\xff"
  user = [chats.user(" a "), chats.reply("b")]
  assert aligner("chatml", STRIPS)(packed(tokenizers, "chatml", user)[0]) == CHANGED
  # Spaces of the last answer are no prompt.
  last = [chats.user("a"), chats.reply("b ")]
  assert not isinstance(aligner("chatml", STRIPS)(packed(tokenizers, "chatml", last)[0]), str)
  thoughts = packed(tokenizers, "chatml", chats.THOUGHTS)[0]
  assert aligner("chatml", "r1")(thoughts) == CHANGED  # it removes the first turn's thought
  answer = aligner("chatml", "r1 thinks")(packed(tokenizers, "chatml", chats.THOUGHTS[:2])[0])
  assert not isinstance(answer, str)  # the thought of the last turn is not history


def test_thoughts_that_the_prompt_begins_are_kept(aligner, tokenizers):
  """A generated text begins inside of the prompt, `<think>`, and the template would drop it."""
  tokenizer = tokenizers[0]
  prompt = template("r1 thinks").render([chats.user("then")], add_generation_prompt=True)
  answer = "a\n</think>\n\nthe other one</s>"
  ids = [*tokenizer.encode(prompt), *tokenizer.encode(answer)]
  mask_G = np.arange(len(ids)) >= len(tokenizer.encode(prompt))
  made = aligner("r1 thinks", "qwen")
  text = "<|im_start|>user\nthen<|im_end|>\n<|im_start|>assistant\n<think>\n"
  taught = check(made, np.array(ids), mask_G, f"{text}{answer[:-4]}<|im_end|>\n")
  assert taught == answer[:-4].encode() + b"\xff"
  cut = np.array(ids[:-4])  # a text that reached its maximum length
  assert check(made, cut, mask_G[:-4], text + tokenizer.decode(ids[:-4])[len(prompt) :])


def test_a_token_that_also_spells_the_template_is_not_aligned(aligner, tokenizers):
  ends_in_text = chats.CHATML.replace("+ '<|im_end|>'", "+ 'e<|im_end|>'")
  chat = [chats.user("a"), chats.reply("is th")]
  token_G, mask_G = packed(tokenizers, "chatml", chat)
  made = aligner("chatml", ends_in_text)
  text = made._template.render(chat)
  the = tokenizers[1].token_id("Ġthe")
  assert the in tokenizers[1].encode(text)
  assert check(made, token_G, mask_G, text) == b"is\xff"


def test_a_student_with_a_dummy_prefix(tokenizers):
  """Its tokenizer puts a space after each control token, which has no place in a content."""
  gemma = small_tokenizers.metaspace(prefix=True)
  source = chats.CHATML.replace("|im_start|", "start_of_turn").replace("|im_end|", "end_of_turn")
  source = source.replace("+ '\\n' + message", "+ '\\n<start_of_turn>' + message")
  source = source.replace("assistant\\n'", "assistant\\n<start_of_turn>'")
  sides = [template("chatml"), template(source)]
  a, b = (chat_vocabulary(t, s) for t, s in zip((tokenizers[0], gemma), sides, strict=True))
  chat = [chats.user("a"), chats.reply("the 漢 é")]
  token_G, _ = packed(tokenizers, "chatml", chat)
  segment = ChatAligner(a, b, *sides)(token_G)
  axis = b"".join(a.bytes_V[i] or b"\xff" for i in token_G.tolist())
  answer = axis.index("the 漢 é".encode())
  spelt = b""
  for i, start, end in zip(segment.id_H, segment.start_H, segment.end_H, strict=True):
    if end > start >= answer:
      spelt += b.bytes_V[i] or b"\xff"
  # The first token, "▁t", begins with the dummy space, before the content.
  assert spelt == "he 漢 é".encode() + b"\xff"


def test_other_forms_are_skipped(aligner, tokenizers):
  made = aligner("chatml", "llama")
  encode = lambda text: np.array(tokenizers[0].encode(text))
  turn = "<|im_start|>{}\n{}<|im_end|>\n"
  for text in (
    "no chat",
    "",
    turn.format("tool", "4"),
    turn.format("user", "a") + turn.format("user", "b"),
    turn.format("user", "a") + turn.format("assistant", "b") + "more",
    turn.format("system", "a"),
  ):
    assert made(encode(text)) == FORM
  ab = turn.format("user", "a") + turn.format("assistant", "b")
  assert made(encode(ab.replace("a<", "a</s><"))) == FORM
  assert made(encode(ab + turn.format("tool", "4"))) == FORM
  assert aligner("chatml", "mistral")(packed(tokenizers, "chatml", SEVERAL)[0]) == REFUSED
  asked = encode(ab + turn.format("user", "c"))
  student = made._template.render([chats.user("a"), chats.reply("b"), chats.user("c")])
  assert check(made, asked, np.ones(len(asked), bool), student)


def test_a_text_cut_inside_of_a_character(aligner, tokenizers):
  chat = [chats.user("a"), chats.reply("Fine 漢")]
  token_G, mask_G = packed(tokenizers, "chatml", chat)
  cut = token_G[:-3]  # without a byte of the character, the end of the turn and the line
  assert tokenizers[0].decode(cut.tolist()).endswith("\ufffd")
  made = aligner("chatml", "phi")
  assert check(made, cut, mask_G[:-3], "<|user|>\na<|end|>\n<|assistant|>\nFine ") == b"Fine "


def test_the_same_template_and_tokenizer_keep_every_token(tokenizers):
  a = chat_vocabulary(tokenizers[0], template("chatml"))
  same = ChatAligner(a, a, *[template("chatml")] * 2)
  token_G, _ = packed(tokenizers, "chatml", SEVERAL)
  segment = same(token_G)
  np.testing.assert_array_equal(segment.id_H, token_G)
  np.testing.assert_array_equal(segment.start_H, segment.start_G)


def test_templates_that_cannot_be_used_are_refused(tokenizers):
  for source, message in (
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "does not end an assis"),
    ("{% for m in messages %}{{ m.role }}</s>{% endfor %}", "does not write each message once"),
    (
      "{% for m in messages %}{{ loop.index }}{{ m.role }} {{ m.content }}</s>{% endfor %}",
      "writes turns differently depending on their number",
    ),
  ):
    with pytest.raises(InputError, match=message):
      chat_vocabulary(tokenizers[0], template(source))


def test_tokens_around_messages_are_control_tokens_whatever_their_flag():
  tokenizer = small_tokenizers.byte_level(
    special=("<s>", "</s>"), literal=["<｜User｜>", "<｜Assistant｜>", "<think>", "  "]
  )
  source = chats.TEMPLATES["r1"].replace("<|User|>", "<｜User｜>  ").replace("<|Assis", "<｜Assis")
  source = source.replace("tant|>", "tant｜>")
  folder = TokenizerFiles(tokenizer.raw.decode(), None, {"chat_template": source} | dict(NAMED))
  ids = {tokenizer.token_id(t) for t in ("<｜User｜>", "<｜Assistant｜>")}
  for is_chat in (True, False):  # also in texts, where the template is not used
    made = side(tokenizer, folder, (), is_chat).vocabulary
    assert ids < made.control
    assert made.bytes_V[tokenizer.token_id("<think>")] == b"<think>"
    assert made.bytes_V[tokenizer.token_id("  ")] == b"  "
  assert not ids & side(tokenizer, None, (), False).vocabulary.control


def test_an_aligner_can_be_pickled(aligner, tokenizers):
  made = aligner("chatml", "llama")
  token_G, _ = packed(tokenizers, "chatml", SEVERAL)
  for x, y in zip(made(token_G), pickle.loads(pickle.dumps(made))(token_G), strict=True):
    np.testing.assert_array_equal(x, y)
