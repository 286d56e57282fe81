"""Chat templates give the texts, ids and masks of transformers' apply_chat_template."""

import dataclasses
import itertools
import json
import pickle

import chats
import pytest
import transformers
from chats import (
  CALL,
  CHATML,
  CHATS,
  GENERATION,
  LLAMA,
  MISTRAL,
  PHI,
  QWEN,
  R1,
  TEMPLATES,
  TEXTS,
  THOUGHTS,
  TOOLS,
  TWO,
  reply,
  trained_on,
  user,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax.data.chat_template import ChatTemplate
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError
from distill_jax.hub.tokenizer import read_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return chats.write_folder(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def theirs(folder):
  return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
  return load_tokenizer(folder)


@pytest.fixture(scope="module")
def template(folder):
  files = read_tokenizer(folder)

  def make(source, **config):
    config = {**files.config, **config, "chat_template": source}
    return ChatTemplate.of(dataclasses.replace(files, config=config), "m")

  return make


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_and_ids_equal_those_of_transformers(name, chat, template, theirs, tokenizer):
  ours, messages = template(TEMPLATES[name]), CHATS[chat]
  for tools, extra in itertools.product((None, TOOLS), ({}, {"enable_thinking": False})):
    call = lambda tokenize, prompt, tools=tools, extra=extra: theirs.apply_chat_template(
      messages,
      tools,
      chat_template=TEMPLATES[name],
      tokenize=tokenize,
      return_dict=False,
      add_generation_prompt=prompt,
      **extra,
    )
    try:
      want = call(False, False)
    except Exception as e:  # errors of transformers are InputErrors here
      with pytest.raises(InputError) as refused:
        ours.render(messages, tools, **extra)
      assert str(e) in str(refused.value)
      continue
    assert ours.render(messages, tools, **extra) == want
    assert tokenizer.encode_places(want)[0] == call(True, False)
    if name != "mistral" or messages[-1]["role"] != "assistant":  # it has no generation prompt
      assert ours.render(messages, tools, True, **extra) == call(False, True)


def test_some_chats_are_refused_and_most_are_not(template):
  """Checks that most of the chats of the test above are not refused."""

  def renders(name, chat):
    try:
      return bool(template(TEMPLATES[name]).render(CHATS[chat]))
    except InputError:
      return False

  done = {name: {chat for chat in CHATS if renders(name, chat)} for name in TEMPLATES}
  assert done["chatml"] == set(CHATS) - {"agent", "parts"}
  assert done["llama"] == set(CHATS)
  assert done["mistral"] == set(CHATS) - {"system", "twice", "parts"}


@pytest.mark.parametrize(
  ("name", "chat", "want"),
  [
    ("chatml", "two", ["Fine é漢😀!<|im_end|>", "Bye. <|im_end|>"]),
    ("chatml", "question", ["Fine é漢😀!<|im_end|>"]),
    ("chatml", "twice", []),
    ("generation", "two", ["Fine é漢😀!<|im_end|>", "Bye. <|im_end|>"]),
    ("llama", "system", ["Fine é漢😀!<|eot|>", "Bye.<|eot|>"]),
    ("llama", "agent", ['{"name": "f", "arguments": {"x": "é<&>\'"}}<|eot|>', "It's 4<|eot|>"]),
    ("mistral", "two", [" Fine é漢😀!</s>", " Bye. </s>"]),
    ("mistral", "agent", [f"[CALLS] {json.dumps([CALL], ensure_ascii=False)}</s>", " It's 4</s>"]),
    ("qwen", "thoughts", ["<think>\nb\n</think>\n\ny<|im_end|>"]),
    ("qwen", "reasoning", ["<think>\nwhy\n</think>\n\nx<|im_end|>"]),
    ("qwen", "thinking", ["<think>\nwhy\n</think>\n\nx<|im_end|>"]),
    ("r1", "two", ["Fine é漢😀!</s>", "Bye. </s>"]),
    ("phi", "two", ["Fine é漢😀!<|end|>", "Bye. <|end|>"]),
  ],
)
def test_the_assistants_turns_are_marked(name, chat, want, template, tokenizer):
  assert trained_on(template(TEMPLATES[name]), tokenizer, CHATS[chat]) == want


def test_generation_blocks_mark_as_in_transformers(template, theirs, tokenizer):
  for chat in ("two", "question", "system", "thoughts", "twice"):
    out = theirs.apply_chat_template(
      CHATS[chat], chat_template=GENERATION, return_assistant_tokens_mask=True
    )
    ids, mask = template(GENERATION).tokens_and_mask(tokenizer, CHATS[chat])
    assert ids == out["input_ids"] and mask == [bool(m) for m in out["assistant_masks"]]
    # The result without generation blocks is the same.
    assert template(CHATML).tokens_and_mask(tokenizer, CHATS[chat]) == (ids, mask)


MACRO = """{% macro say(x) %} {% generation %}{{ x }} {% endgeneration %}{% endmacro %}
{% for m in messages %}{{ m.role }}{{ say(m.content)FILTER }}{% endfor %}"""


def test_a_generation_block_in_a_macro(template, tokenizer):
  """transformers' offsets are wrong in this case; here they are right, or an error is raised."""
  ours = template(MACRO.replace("FILTER", ""))
  assert trained_on(ours, tokenizer, [reply("abc"), reply("x")]) == ["abc ", "x "]
  with pytest.raises(InputError, match="generation block"):
    template(MACRO.replace("FILTER", "|trim")).tokens_and_mask(tokenizer, [reply("a")])


def test_turns_that_later_messages_change_are_not_marked(template, tokenizer):
  qwen = template(QWEN)
  assert qwen.mark(tokenizer, THOUGHTS).unmarked == (1,)
  assert qwen.mark(tokenizer, THOUGHTS[:2]).unmarked == ()
  assert trained_on(qwen, tokenizer, THOUGHTS[:2]) == ["<think>\na\n</think>\n\nx<|im_end|>"]
  # The generation prompt contains the empty reasoning, so the model does not generate it.
  assert trained_on(qwen, tokenizer, TWO, enable_thinking=False) == ["Bye. <|im_end|>"]
  empty = [user("q"), reply("<think>\n\n</think>\n\nx")]
  assert trained_on(qwen, tokenizer, empty, enable_thinking=False) == ["x<|im_end|>"]
  assert template(CHATML).mark(tokenizer, THOUGHTS).unmarked == ()


def test_a_token_that_contains_prompt_and_answer_is_not_trained_on(template, tokenizer):
  """The newline of a header and those of the answer are merged into one token."""
  ids, mask = template(CHATML).tokens_and_mask(tokenizer, [user("a"), reply("\n\nfine")])
  assert tokenizer.token_id("ĊĊ") in ids
  assert not mask[ids.index(tokenizer.token_id("ĊĊ"))]
  runs = trained_on(template(CHATML), tokenizer, [user("a"), reply("\n\nfine")])
  assert runs == ["\nfine<|im_end|>"]
  plain = "{% for m in messages %}{{ '\n\n' + m.role + ':' + m.content }}{% endfor %}"
  plain += "{% if add_generation_prompt %}{{ '\n\nassistant:' }}{% endif %}"
  chat = [user("a"), reply("fine\n"), user("b"), reply("Bye")]
  assert trained_on(template(plain), tokenizer, chat) == ["fine", "Bye"]


HEADERS = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"

# Reads only lists of parts. The content "i" also occurs in the special tokens' names.
PARTS = CHATML.replace("message['content']", "(message.content | map(attribute='text') | join)")
# The last turn differs from earlier ones, from a token within it on.
LAST = """{% for m in messages %}{{ '<s>' + m.role }}
{%- if loop.last and m.role == 'assistant' and not add_generation_prompt %}{{ '<|eot|>' }}
{%- endif %}{{ '<|end|>' + m.content + '</s>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<s>assistant' }}{% endif %}"""


@pytest.mark.parametrize(
  ("source", "messages", "match"),
  [
    (R1.replace("PROMPT", "<think>\\n"), TWO, "does not start the turn with its generation prompt"),
    (R1.replace("PROMPT", ""), THOUGHTS, "omits or changes a part of its content"),
    (CHATML, CHATS["reasoning"], "omits or changes a part of its reasoning_content"),
    (CHATML, [user("q"), reply("", tool_calls=[CALL])], "omits its call of 'f'"),
    (PARTS, [user("q"), reply("i")], "omits or changes a part of its content"),
    (
      LAST,
      [user("q"), reply("a")],
      "changes the end of the turn if a generation prompt follows",
    ),
    (HEADERS, TWO, "writes no generation prompt"),
    (HEADERS + "{{ '<|assistant|>' }}", TWO, "changes the end of the turn if a message follows"),
    (
      PHI.replace("<|end|>", "END"),
      TWO,
      "changes the end of the turn if a generation prompt follows",
    ),
    (
      MISTRAL,
      [user("1"), reply("2"), reply("3")],
      "Roles must alternate user and assistant",
    ),
    (CHATML, [user("q"), reply("", tool_calls=["f"])], "^A tool call is 'f'"),
  ],
)
def test_ambiguous_templates_are_errors(source, messages, match, template, tokenizer):
  match = match if match[0] == "^" else f"^The chat template of m .*{match}"
  with pytest.raises(InputError, match=match):
    template(source).tokens_and_mask(tokenizer, messages)


def test_reasoning_can_be_read_by_its_other_names(template, theirs):
  source = "{% for m in messages %}{{ m.thinking }} {{ m.reasoning_content }};{% endfor %}"
  for name in ("reasoning_content", "thinking", "reasoning"):
    chat = [user("q"), reply("x", **{name: "why"})]
    want = theirs.apply_chat_template(chat, chat_template=source, tokenize=False)
    assert template(source).render(chat) == want == " ;why why;"


def test_a_missing_generation_prompt_is_an_error(template):
  with pytest.raises(InputError, match="writes no generation prompt"):
    template(HEADERS).render(TWO[:1], add_generation_prompt=True)
  assert template(MISTRAL).render(TWO[:1], add_generation_prompt=True).endswith("[/INST]")


@pytest.mark.parametrize(
  ("source", "match"),
  [
    ("{% if %}", "is not valid Jinja"),
    ("{% generation %}", "is not valid Jinja"),
    ("{% import x %}", "is not valid Jinja"),
    ("{{ messages[0].a.b }}", "UndefinedError"),
    ("{{ nothing() }}", "UndefinedError"),
    ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ("{{ messages.append(1) }}", "SecurityError"),
    ("{{ messages[0].update(a=1) }}", "Security"),
    ("{{ raise_exception.__globals__.x }}", "SecurityError"),
    ("{% set n = namespace() %}{% set n.__html__ = raise_exception %}", "SecurityError"),
    ("{{ namespace(__html__=1) }}", "SecurityError"),
    ("{% for i in range(999999999) %}{% endfor %}", "OverflowError"),
    ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ("{{ 1 + '' }}", "TypeError"),
    ("{% include 'x' %}", "fails on these"),
    ("{{ [1] | tojson(indent={}) }}", "fails on these"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ("{{ raise_exception('own words') }}", "rejects these messages: own words"),
    ("\ufdd0{{ messages[0].role }}", "U\\+FDD0"),
  ],
)
def test_hostile_and_broken_templates_are_errors(source, match, template):
  with pytest.raises(InputError, match=match):
    template(source).render(TWO)


@pytest.mark.parametrize(
  ("messages", "more", "match"),
  [
    ([], {}, "at least one"),
    ("hi", {}, "expected a dict with a role"),
    ([{}], {}, "expected a dict with a role"),
    ([{"role": 1}], {}, "expected a dict with a role"),
    ([user(object())], {}, "a value of type object"),
    (TWO, {"tools": [len]}, "not a JSON schema"),
    (TWO, {"continue_final_message": True}, "continue_final_message is not a variable"),
  ],
)
def test_broken_messages_are_errors(messages, more, match, template):
  with pytest.raises(InputError, match=match):
    template(CHATML).render(messages, **more)


def test_special_tokens_and_templates_in_tokenizer_config(template, folder, tokenizer):
  ours = template(LLAMA)
  assert dict(ours.tokens) == {"bos_token": "<s>", "eos_token": "</s>"}
  assert pickle.loads(pickle.dumps(ours)) == ours
  several = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
  both = template(several)
  assert both.render(TWO) == "A" and both.render(TWO, TOOLS) == both.render(TWO, []) == "B"
  for config in ({"bos_token": 3}, {"bos_token": {"a": 1}}, {"added_tokens_decoder": [1]}):
    with pytest.raises(InputError, match="tokenizer_config.json of m"):
      template(CHATML, **config)
  for source in (None, 3, [{"name": "rag", "template": "A"}]):
    with pytest.raises(InputError, match="no chat template"):
      template(source)
  with pytest.raises(InputError, match="no special token '<pad>'"):
    template("{{ pad_token }}", pad_token="<pad>").tokens_and_mask(tokenizer, TWO[:1])
  # The class in transformers may define sep_token, so it must be set here, at least to null.
  sep = "{{ sep_token }}"
  assert template(sep).render(TWO) == ""
  assert template(sep, tokenizer_class="LlamaTokenizer", sep_token=None).render(TWO) == ""
  with pytest.raises(InputError, match="uses sep_token, which"):
    template(sep, tokenizer_class="LlamaTokenizer")


@settings(max_examples=60, deadline=None)
@given(chat=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
def test_exactly_the_answers_are_marked(chat, template, theirs, tokenizer):
  messages = [m for a, b in chat for m in (user(a), reply(b))]
  ours = template(CHATML)
  if any(c in "\ufdd0\ufdd1" for pair in chat for text in pair for c in text):
    return
  marked = ours.mark(tokenizer, messages)
  assert [marked.text[a:b] for a, b in marked.spans] == [b + "<|im_end|>" for _, b in chat]
  ids, mask = ours.tokens_and_mask(tokenizer, messages)
  assert ids == theirs.apply_chat_template(messages, chat_template=CHATML, return_dict=False)
  end = tokenizer.token_id("<|im_end|>")
  ends = [m for i, m in zip(ids, mask, strict=True) if i == end]
  assert ends == [False, True] * len(chat)
