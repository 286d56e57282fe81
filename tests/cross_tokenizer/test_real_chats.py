"""Chats between the templates of published models; see real_tokenizers.py."""

import functools
import itertools

import numpy as np
import pytest
from real_tokenizers import files, load

from distill_jax.cross_tokenizer.chat_markers import dated
from distill_jax.cross_tokenizer.chats import ChatAligner, chat_vocabulary
from distill_jax.data.chat_template import ChatTemplate

pytestmark = pytest.mark.slow
NAMES = ("qwen3", "deepseek_v3", "llama3_1", "gemma3", "smollm2")
END = {
  "qwen3": "<|im_end|>",
  "deepseek_v3": "<｜end▁of▁sentence｜>",
  "llama3_1": "<|eot_id|>",
  "gemma3": "<end_of_turn>",
  "smollm2": "<|im_end|>",
}
user = lambda content: {"role": "user", "content": content}
reply = lambda content: {"role": "assistant", "content": content}
CHAT = [
  user("What is 12 * 345? Zürich, 東京, 😀."),
  reply("It is 4140.\n\n```python\nprint(12 * 345)\n```"),
  user("Thanks!\n\nAnd 1 + 1?"),
  reply("Two: 2, e\u0301 excluded 👩‍👩‍👧.".replace("e\u0301 ", "")),
]


@functools.cache
def template(name):
  return dated(ChatTemplate.of(files(name), name))


@functools.cache
def vocabulary(name):
  return chat_vocabulary(load(name), template(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_end_of_a_turn_and_the_markers(name):
  v = vocabulary(name)
  assert v.tokenizer.piece(v.end) == END[name] and v.end in v.stops
  if name == "deepseek_v3":  # they have no flag
    assert {v.tokenizer.token_id(f"<｜{role}｜>") for role in ("User", "Assistant")} <= v.control
  if name == "qwen3":
    assert v.bytes_V[v.tokenizer.token_id("<think>")] == b"<think>"


@pytest.mark.parametrize(("teacher", "student"), [*itertools.permutations(NAMES, 2)])
@pytest.mark.parametrize("system", [False, True])
def test_every_byte_of_the_answers_is_aligned(teacher, student, system):
  a, b = vocabulary(teacher), vocabulary(student)
  align = ChatAligner(a, b, template(teacher), template(student))
  chat = [{"role": "system", "content": "Be brief."}] * system + CHAT
  text = template(teacher).render(chat)
  token_G = np.array(a.tokenizer.encode_places(text)[0], np.int64)
  segment = align(token_G)
  assert not isinstance(segment, str), segment
  axis = b"".join(a.bytes_V[i] or b"\xff" for i in token_G.tolist())
  spelt, ends = b"", 0
  for i, start, end in zip(segment.id_H, segment.start_H, segment.end_H, strict=True):
    if end > start:
      if b.bytes_V[i] is None:
        assert i == b.end and axis[start:end] == b"\xff"
        ends += 1
        spelt += b"|"
      else:
        assert axis[start:end] == b.bytes_V[i]
        spelt += b.bytes_V[i]
  want = "".join(m["content"] + "|" * (m["role"] == "assistant") for m in chat)
  thought = "<think>\n\n</think>\n\n"  # of Qwen's last turn
  merged = want.replace("Be brief.", "Be brief.\n\n")  # a template without system messages
  assert spelt.decode().replace(thought, "") in (want, merged) and ends == 2
  # The student's text is that of its own template.
  if teacher == "gemma3" and system:  # it has no system messages
    chat = [user(f"Be brief.\n\n{CHAT[0]['content']}"), *CHAT[1:]]
  own = template(student).render(chat)
  ours = b.tokenizer.decode(segment.id_H.tolist())
  assert ours.replace(thought, "") == own.replace(thought, "")
