"""The config section `retokenize`: another tokenizer for the student."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class RetokenizeOptions:
  """The tokenizer whose tokens the student gets an embedding and a head for."""

  tokenizer: str = ""
  """The new tokenizer: a tokenizer.json, a sentencepiece model, or a folder with one of them, e.g.
  that of a model; also at a URL, "package:NAME/PATH" or "hub:ORG/NAME"."""
  roles: dict[str, str] = dataclasses.field(default_factory=dict)
  """Old tokens that special tokens of the new tokenizer start from, {new token: old token}, e.g.
  {"<|eot_id|>": "<|im_end|>"}. Tokens of the same role, such as the end of a text, are found
  without it."""
  multiple_of: int = 128
  """Number that the rows of the new embedding are a multiple of. Rows after the tokenizer's last
  token are padding."""
  dir: str = ""
  """Hugging Face folder to write. "": "model" in the workdir."""
  dtype: str = "bfloat16"
  """Dtype of the weights in the folder: "float32", "bfloat16" or "float16"."""
  shard_bytes: int = 5_000_000_000
  """Maximum size in bytes of one weight file of the folder."""
