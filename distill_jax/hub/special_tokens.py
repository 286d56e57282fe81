"""The special tokens of published vocabularies by their role, in order of preference."""

from collections.abc import Mapping
from typing import Any

# The end of a document precedes the end of a turn, since packing separates documents.
EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "<|im_end|>")
BOS = ("<|begin_of_text|>", "<s>", "<bos>", "<｜begin▁of▁sentence｜>")
TURN_START = "<|im_start|>"  # which some tokenizer_config.json name as their BOS


def named_token(config: Mapping[str, Any], role: str) -> str | None:
  """Returns the "eos_token", "bos_token" etc. of a tokenizer_config.json; None without one.

  A token is a string, or an object with the string as its "content".
  """
  token = config.get(role)
  return (token["content"] if isinstance(token, dict) else token) or None
