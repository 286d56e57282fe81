"""Control tokens are matched by role: ends of texts and turns, BOS and padding."""

import pytest
import small_tokenizers

from distill_jax.cross_tokenizer.roles import match_roles, stop_set
from distill_jax.cross_tokenizer.vocabulary import Vocabulary
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError

pytestmark = pytest.mark.smoke

LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>")


@pytest.fixture(scope="module")
def qwen():
  """Returns a tokenizer with a literal <think> and its own <|pad|>."""
  special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
  return small_tokenizers.byte_level(special=special, literal=["<think>"])


@pytest.fixture(scope="module")
def llama():
  return small_tokenizers.byte_level(300, special=LLAMA)


def named(teacher, student, roles):
  piece = lambda v, i: v.tokenizer.piece(i)
  return {piece(teacher, t): piece(student, s) for t, s in roles.items()}


def test_the_whole_stop_set_ends_the_students_texts(qwen, llama):
  a, b = Vocabulary(qwen), Vocabulary(llama)
  assert named(a, b, match_roles(a, b, {})) == {
    "<|endoftext|>": "<|end_of_text|>",
    "<|im_end|>": "<|end_of_text|>",
    "<|pad|>": "<|finetune_right_pad_id|>",
  }
  assert named(b, a, match_roles(b, a, {})) == {
    "<|end_of_text|>": "<|endoftext|>",
    "<|eot_id|>": "<|endoftext|>",
    "<|finetune_right_pad_id|>": "<|pad|>",
  }


def test_the_token_that_begins_texts(llama):
  other = small_tokenizers.metaspace(prefix=False)
  a, b = Vocabulary(llama), Vocabulary(other)
  assert named(a, b, match_roles(a, b, {}))["<|begin_of_text|>"] == "<s>"
  assert named(b, a, match_roles(b, a, {}))["<s>"] == "<|begin_of_text|>"


def test_in_chats_the_stop_set_ends_the_students_turns(qwen, llama):
  a, b = Vocabulary(qwen), Vocabulary(llama, end=llama.token_id("<|eot_id|>"))
  roles = named(a, b, match_roles(a, b, {}))
  assert roles["<|endoftext|>"] == roles["<|im_end|>"] == "<|eot_id|>"


def test_stop_tokens_of_a_models_configs(qwen, llama):
  think = qwen.token_id("<think>")
  found = stop_set(qwen, {"eos_token_id": [think, 0]}, {"eos_token": {"content": "<|im_end|>"}}, {})
  assert found == {think, 0, qwen.token_id("<|im_end|>")}
  assert stop_set(qwen, {"eos_token_id": 2}, {"eos_token": None}) == {2}
  a, b = Vocabulary(qwen, stops=found), Vocabulary(llama)
  assert a.bytes_V[think] is None and match_roles(a, b, {})[think] == llama.eos_id
  for wrong, message in (
    ({"eos_token_id": 4000}, "names 4000 as the end of a text, which byte-level lacks"),
    ({"eos_token_id": [True]}, "names True as"),
    ({"eos_token": "</s>"}, "names '</s>' as the end of a text"),
  ):
    with pytest.raises(InputError, match=message):
      stop_set(qwen, wrong)


def test_equal_tokenizers_keep_every_control_token(qwen):
  a = Vocabulary(qwen)
  same = Tokenizer(qwen.raw, "a copy", None, None)
  assert match_roles(a, Vocabulary(same), {}) == {i: i for i in a.control}


def test_given_pairs_come_first(qwen, llama):
  a, b = Vocabulary(qwen), Vocabulary(llama)
  given = {"<|im_end|>": "<|eot_id|>", "<think>": "<|begin_of_text|>"}
  roles = named(a, b, match_roles(a, b, given))
  assert {t: roles[t] for t in given} == given and roles["<|endoftext|>"] == "<|end_of_text|>"
  for pair, whose in (
    ({"<|none|>": "<|eot_id|>"}, r"the teacher's \(byte-level\) lacks '<\|none\|>'"),
    ({"<|im_end|>": "<|none|>"}, r"the student's \(byte-level\) lacks '<\|none\|>'"),
  ):
    with pytest.raises(InputError, match=rf"retarget\.roles is {{.*; expected .*{whose}\. Corr"):
      match_roles(a, b, pair)


def test_a_student_without_an_end_of_text_is_refused(qwen):
  endless = Vocabulary(small_tokenizers.byte_level(special=("<|begin_of_text|>",)))
  a = Vocabulary(qwen)
  with pytest.raises(InputError, match=r"has no token that ends a text.*retarget\.roles"):
    match_roles(a, endless, {})
  given = dict.fromkeys(("<|endoftext|>", "<|im_end|>"), "<|begin_of_text|>")
  assert named(a, endless, match_roles(a, endless, given)) == given
