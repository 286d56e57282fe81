"""The pre-tokenizers that llama.cpp implements, by their names in GGUF files.

llama.cpp has them as code; a file has only their name. Here each has the form that a tokenizer.json
has for it, so that the reader can write it and the writer can recognise it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from distill_jax.types import JsonObject

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
# The regular expression of ByteLevel with use_regex.
GPT_2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
  r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
  r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
  r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
DEEPSEEK_V3 = (
  r"\p{N}{1,3}",
  "[一-龥぀-ゟ゠-ヿ]+",
  r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
  + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


class PreTokenizer(NamedTuple):
  """The division of a text into words, within which tokens are merged.

  Attributes:
    cuts: the steps as in a tokenizer.json.
    ignore_merges: whether a word that is a token is this token whatever the merges are.
    note: what llama.cpp does differently, as a sentence.
  """

  cuts: tuple[JsonObject, ...]
  ignore_merges: bool = False
  note: str = ""

  def json(self) -> JsonObject:
    """Returns the `pre_tokenizer` of a tokenizer.json."""
    cuts = list(self.cuts)
    return cuts[0] if len(cuts) == 1 else {"type": "Sequence", "pretokenizers": cuts}


def _splits(*patterns: str) -> tuple[JsonObject, ...]:
  cuts = (
    {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
    for p in patterns
  )
  return (*cuts, {**BYTES, "use_regex": False})


# By tokenizer.ggml.pre. "smollm" isolates every digit first, as SmolLM2's own tokenizer.json and
# llama.cpp do. (transformers 5.23 ignores this rule in a GGUF file, and returns different ids if
# two or more spaces precede a digit.)
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
  "gpt-2": PreTokenizer((BYTES,)),
  "smollm": PreTokenizer((DIGITS, BYTES)),
  "llama-bpe": PreTokenizer(_splits(LLAMA_3), ignore_merges=True),
  "smaug-bpe": PreTokenizer(_splits(LLAMA_3)),
  "qwen2": PreTokenizer(_splits(QWEN_2)),
  "deepseek-v3": PreTokenizer(_splits(*DEEPSEEK_V3)),
  "tekken": PreTokenizer(
    _splits(TEKKEN),
    ignore_merges=True,
    note="it divides words at some combining marks, as in Hindi and Thai.",
  ),
}


def name_of(pre_tokenizer: JsonObject | None, ignore_merges: bool) -> str | None:
  """Returns llama.cpp's name of a pre-tokenizer of byte-level tokens, None if it has none.

  Args:
    pre_tokenizer: The `pre_tokenizer` of a tokenizer.json.
    ignore_merges: The `ignore_merges` of its model.
  """
  patterns = _patterns(pre_tokenizer)
  for name, known in PRE_TOKENIZERS.items():
    if (_patterns(known.json()), known.ignore_merges) == (patterns, ignore_merges):
      return name
  return None


def _patterns(pre_tokenizer: JsonObject | None) -> tuple[str, ...] | None:
  """Returns the regular expressions that divide a text one after the other.

  None: The last step does not convert bytes, or another step is not a division at all matches.
  """
  steps = _steps(pre_tokenizer)
  if not steps or steps[-1].get("type") != "ByteLevel":
    return None
  found = [_pattern(step) for step in steps[:-1]]
  if steps[-1].get("add_prefix_space", True) or None in found:
    return None
  if steps[-1].get("use_regex", True):
    found.append(GPT_2)
  return tuple(p for p in found if p is not None)


def _steps(pre_tokenizer: JsonObject | None) -> list[JsonObject]:
  if not pre_tokenizer:
    return []
  if pre_tokenizer.get("type") != "Sequence":
    return [pre_tokenizer]
  return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]


def _pattern(step: JsonObject) -> str | None:
  """Returns the expression whose matches a step isolates, None if it does something else."""
  if step == DIGITS:
    return r"\p{N}"
  isolates = (step.get("type"), step.get("behavior"), step.get("invert", False))
  if isolates != ("Split", "Isolated", False):
    return None
  pattern = step["pattern"]
  text = pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"])
  return text.replace("\r", r"\r").replace("\n", r"\n")
