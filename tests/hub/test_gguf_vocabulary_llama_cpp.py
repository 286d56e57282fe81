"""The ids that llama.cpp gives with the vocabularies of this project, against our tokenizers'."""

import json
import unicodedata

import gguf_words
import hard_texts
import llama_cpp
import pytest
import real_tokenizers
import small_tokenizers
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from distill_jax.hub.gguf_pretokenizers import PRE_TOKENIZERS
from distill_jax.hub.gguf_vocabulary import vocabulary
from distill_jax.hub.tokenizer import TokenizerFiles

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(bool(llama_cpp.missing()), reason=llama_cpp.missing()),
]

TEXTS = hard_texts.BASE + hard_texts.fuzz(seed=0, n=300)


def check(vocabulary, encode, texts):
  """Asserts that llama.cpp's ids of the texts are those of `encode`."""
  for text, ids in zip(texts, vocabulary.texts, strict=True):
    assert ids == encode(text), ascii(text)


@pytest.mark.parametrize("name", real_tokenizers.REAL)
def test_published_tokenizers(name, tmp_path):
  ours, (_, size, control, literal) = real_tokenizers.load(name), real_tokenizers.REAL[name]
  gguf_words.write(tmp_path / "x.gguf", gguf_words.entries_of(name))
  sentences = ours.kind == "sentencepiece"  # our tokenizer then finds no special tokens in a text
  texts = [*TEXTS, "".join(f"{t}a{t}{t} b\n" for t in (*control, *literal) if not sentences)]
  if name == "gemma3":  # whose added tokens of several U+2581 are spaces in llama.cpp
    texts[-1] = texts[-1].replace("\u2581", "")
  seen = llama_cpp.LlamaCpp().vocabulary(tmp_path / "x.gguf", texts, special=not sentences)
  check(seen, ours.encode, texts)
  assert seen.size == size + 5
  assert seen.begins_with_bos == bool(ours.begin)
  assert [seen.bos] == ours.begin if ours.begin else True
  assert seen.eos == ours.token_id(control[0])
  assert {ours.token_id(t) for t in control if "end" in t or "eo" in t} <= set(seen.end)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizers(name, tmp_path):
  """The merges cross every place at which a pre-tokenizer divides, so that a division shows."""
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  trainer = trainers.BpeTrainer(
    vocab_size=4000,
    show_progress=False,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    special_tokens=["<eos>"],
  )
  backend.train_from_iterator(hard_texts.BASE + hard_texts.fuzz(seed=1, n=400), trainer)
  parsed = json.loads(backend.to_str())
  parsed["pre_tokenizer"] = PRE_TOKENIZERS[name].json()
  parsed["model"]["ignore_merges"] = PRE_TOKENIZERS[name].ignore_merges
  files = TokenizerFiles(json.dumps(parsed), None, {"eos_token": "<eos>"})
  gguf_words.write(tmp_path / "x.gguf", vocabulary(files, {"vocab_size": files.size()}, {}))
  ours = tokenizers.Tokenizer.from_str(files.json)
  texts = TEXTS
  if PRE_TOKENIZERS[name].note:  # combining marks
    texts = [t for t in texts if not any(unicodedata.category(c)[0] == "M" for c in t)]
  seen = llama_cpp.LlamaCpp().vocabulary(tmp_path / "x.gguf", texts)
  check(seen, lambda text: ours.encode(text).ids, texts)
  divided = [backend.encode(text).ids != ours.encode(text).ids for text in texts]
  assert sum(divided) > 0.8 * len(texts)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_metaspace_with_the_space_that_the_notes_name(scheme, tmp_path):
  files = real_tokenizers.files("llama2")
  parsed = json.loads(files.json)
  cut = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
  parsed |= {"normalizer": None, "pre_tokenizer": cut}
  files = TokenizerFiles(json.dumps(parsed), None, files.config)
  gguf_words.write(tmp_path / "x.gguf", vocabulary(files, {"vocab_size": 32_000}, {}))
  ours = tokenizers.Tokenizer.from_str(files.json)
  texts = [t for t in TEXTS if t and not t.startswith(" ")] + ["a</s>b </s>c", "</s>a </s> b"]
  given = [" " + t if scheme == "first" and not t.startswith("</s>") else t for t in texts]
  if scheme == "always":  # a space after a special token is the start of a text, too
    given = texts = texts[:-1]
  seen = llama_cpp.LlamaCpp().vocabulary(tmp_path / "x.gguf", given)
  want = {
    g: ours.encode(t, add_special_tokens=False).ids for g, t in zip(given, texts, strict=True)
  }
  check(seen, want.get, given)


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_model(prefix, tmp_path):
  ours = small_tokenizers.sentencepiece_model(prefix, runs=() if prefix else ("\u2581" * 4,))
  files = TokenizerFiles(None, ours.raw, {})
  gguf_words.write(tmp_path / "x.gguf", vocabulary(files, {"vocab_size": ours.vocab_size}, {}))
  texts = [t for t in [*small_tokenizers.CORPUS, *TEXTS] if t and "\x00" not in t]
  seen = llama_cpp.LlamaCpp().vocabulary(tmp_path / "x.gguf", texts, special=False)
  check(seen, ours.encode, texts)
