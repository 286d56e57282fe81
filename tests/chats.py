"""Chat templates, chats and a tokenizer for tests; the templates resemble published ones."""

import itertools
import json
from pathlib import Path

import tokenizers
from hypothesis import strategies as st

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


def write_folder(out: Path) -> Path:
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
  backend.save(str(out / "tokenizer.json"))
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": {"__type": "AddedToken", "content": "</s>"},
    "pad_token": None,
  }
  (out / "tokenizer_config.json").write_text(json.dumps(config))
  return out


TEXTS = st.text(st.sampled_from([*"ab é漢😀\n\t▁"]) | st.characters(codec="utf-8"), max_size=9)


def trained_on(template, tokenizer, messages, tools=None, **extra):
  """Returns the texts that are trained on, each a contiguous run of tokens."""
  ids, mask = template.tokens_and_mask(tokenizer, messages, tools, **extra)
  runs = itertools.groupby(zip(ids, mask, strict=True), key=lambda x: x[1])
  return [tokenizer.decode([i for i, _ in run]) for on, run in runs if on]
