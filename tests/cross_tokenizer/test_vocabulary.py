"""The bytes of ids, for small tokenizers of every style."""

import copy
import json
import pickle

import numpy as np
import pytest
import small_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from spelling import DECOMPOSED, TEXTS, check_id_of, check_ids, check_places

from distill_jax.cross_tokenizer.vocabulary import Vocabulary
from distill_jax.data.tokenizers import Tokenizer

pytestmark = pytest.mark.smoke

LITERAL = ("<think>", "</think>", "  ", "<｜User｜>", "mark\u2581it")
RUNS = tuple("\u2581" * n for n in (2, 3, 4, 8))
STYLES = {
  "byte-level": lambda: small_tokenizers.byte_level(),
  "byte-level with added text": lambda: small_tokenizers.byte_level(literal=LITERAL),
  "NFC": lambda: small_tokenizers.byte_level(normalizer="NFC"),
  "Metaspace": lambda: small_tokenizers.metaspace(prefix=False),
  "Metaspace with prefix": lambda: small_tokenizers.metaspace(prefix=True),
  "Metaspace with runs": lambda: small_tokenizers.metaspace(prefix=False, runs=RUNS),
  "sentencepiece": lambda: small_tokenizers.sentencepiece_model(prefix=False),
  "sentencepiece with prefix": lambda: small_tokenizers.sentencepiece_model(prefix=True),
  "unigram": lambda: small_tokenizers.sentencepiece_model(prefix=False, kind="unigram"),
}


@pytest.fixture(scope="module")
def vocabularies():
  return {name: Vocabulary(make()) for name, make in STYLES.items()}


@pytest.fixture(params=STYLES)
def vocabulary(request, vocabularies):
  return vocabularies[request.param]


def test_the_tokens_spell_the_text(vocabulary, vocabularies):
  changed = DECOMPOSED if vocabulary is vocabularies["NFC"] else ()
  prefixed = vocabulary in (
    vocabularies["Metaspace with prefix"],
    vocabularies["sentencepiece with prefix"],
  )
  for text in TEXTS:
    if text in changed:
      assert vocabulary.locate(text) is None
    else:
      assert check_places(vocabulary, text) == (-1 if prefixed and text else 0)


def test_the_bytes_of_ids_are_those_of_the_decoder(vocabulary):
  text = [b for b in vocabulary.bytes_V if b]
  assert check_ids(vocabulary) > len(text) - 256
  check_id_of(vocabulary)
  assert vocabulary.longest == max(map(len, text))
  lengths = [len(b or b"") for b in vocabulary.bytes_V]
  assert vocabulary.length_V.dtype == np.int32 and vocabulary.length_V.tolist() == lengths
  assert vocabulary.control == {i for i, n in enumerate(lengths) if not n}
  assert vocabulary.size == len(lengths) == vocabulary.tokenizer.vocab_size
  every_byte = {bytes([b]) for b in range(256)}
  assert every_byte <= vocabulary.id_of.keys()


@settings(max_examples=15, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_any_text_is_spelt(vocabularies, text):
  for vocabulary in vocabularies.values():
    place = vocabulary.locate(text)
    if place is not None:
      check_places(vocabulary, text)
    else:
      assert vocabulary is vocabularies["NFC"]


def test_text_within_a_document_has_no_prefix(vocabulary):
  for text in TEXTS[:5]:
    assert vocabulary.spell(vocabulary.encode_inner(text)) == text.encode()


def test_a_byte_token_does_not_take_the_place_of_a_piece(vocabularies):
  for name in ("Metaspace", "sentencepiece with prefix"):
    vocabulary = vocabularies[name]
    piece = vocabulary.tokenizer.token_id
    for letter in "a1x,":
      fallback = piece(f"<0x{ord(letter):02X}>")
      assert vocabulary.bytes_V[fallback] == letter.encode()
      assert vocabulary.id_of[letter.encode()] == piece(letter) != fallback
    assert vocabulary.id_of[b" "] == piece("\u2581")
    assert vocabulary.id_of[b"\x80"] == piece("<0x80>")


def test_added_tokens_without_a_role_are_text(vocabularies):
  vocabulary = vocabularies["byte-level with added text"]
  i = vocabulary.tokenizer.token_id
  assert [vocabulary.bytes_V[i(t)] for t in LITERAL] == [t.encode() for t in LITERAL]
  check_places(vocabulary, "a é  <think>b</think> mark\u2581it")
  runs = vocabularies["Metaspace with runs"]
  assert [runs.bytes_V[runs.tokenizer.token_id(r)] for r in RUNS] == [b" " * len(r) for r in RUNS]


def test_control_tokens_have_no_bytes(vocabularies):
  of = lambda name: {vocabularies[name].tokenizer.piece(i) for i in vocabularies[name].control}
  assert of("byte-level") == {"<|endoftext|>", "<|im_end|>"}
  assert of("Metaspace") == {"<unk>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>"}
  assert of("sentencepiece") == {"<unk>", "<s>", "</s>"}
  stops = lambda v: {v.tokenizer.piece(i) for i in v.stops}
  assert stops(vocabularies["byte-level"]) == {"<|endoftext|>", "<|im_end|>"}
  assert stops(vocabularies["Metaspace"]) == {"</s>", "<end_of_turn>"}


def test_a_role_takes_the_bytes_of_an_added_token_without_the_flag():
  tokenizer = small_tokenizers.byte_level(literal=LITERAL)
  user = tokenizer.token_id("<｜User｜>")
  assert user in Vocabulary(tokenizer, stops=[user]).control
  ended = Vocabulary(tokenizer, end=user)
  assert (ended.end, ended.bytes_V[user]) == (user, None) and user in ended.stops
  assert Vocabulary(tokenizer).end == tokenizer.token_id("<|endoftext|>")


def test_the_text_of_a_control_token_is_not_located(vocabularies):
  assert vocabularies["byte-level"].locate("a page about <|im_end|> tokens") is None
  assert vocabularies["Metaspace"].locate("a page about </s> tokens") is None
  assert vocabularies["Metaspace"].locate("a page about <|im_end|> tokens") is not None
  # sentencepiece never makes a control piece from text.
  check_places(vocabularies["sentencepiece"], "a page about </s> tokens")
  assert vocabularies["Metaspace"].locate("the mark \u2581") is None  # it is read as a space


def test_rows_without_a_token_have_no_bytes(vocabularies):
  tokenizer = vocabularies["byte-level"].tokenizer
  parsed = json.loads(tokenizer.raw)
  parsed["model"]["vocab"]["far"] = tokenizer.vocab_size + 3
  holed = Vocabulary(Tokenizer(json.dumps(parsed).encode(), "holes", None, None))
  holes = set(range(tokenizer.vocab_size, tokenizer.vocab_size + 3))
  assert holed.size == tokenizer.vocab_size + 4 and holes < holed.control
  assert holed.spell([*holes, holed.size - 1, holed.size + 7]) == b"far"


def test_a_byte_name_is_text_where_the_model_has_no_byte_tokens():
  parsed = json.loads(small_tokenizers.byte_level().raw)
  i = parsed["model"]["vocab"]["<0x0A>"] = len(parsed["model"]["vocab"])
  vocabulary = Vocabulary(Tokenizer(json.dumps(parsed).encode(), "names", None, None))
  assert vocabulary.bytes_V[i] == b"<0x0A>"
  check_places(vocabulary, "a <0x0A> b\n")


def test_a_piece_that_the_tokenizer_does_not_make_is_no_byte_token():
  parsed = json.loads(small_tokenizers.metaspace(prefix=False).raw)
  piece = parsed["model"]["vocab"]["N"] = len(parsed["model"]["vocab"])
  parsed["normalizer"] = {"type": "Lowercase"}
  vocabulary = Vocabulary(Tokenizer(json.dumps(parsed).encode(), "lower case", None, None))
  assert vocabulary.id_of[b"N"] == piece
  assert vocabulary.locate("N") is None


def test_an_added_token_of_byte_letters_is_text():
  vocabulary = Vocabulary(small_tokenizers.byte_level(literal=["éü"]))
  ids, ends = vocabulary.locate("a éü b")
  assert vocabulary.tokenizer.token_id("éü") in ids and ends[-1] == len("a éü b".encode())


def test_an_added_token_that_stands_for_a_byte_keeps_its_byte():
  vocabulary = Vocabulary(small_tokenizers.byte_level(literal=["é"]))  # "é" is the letter of 0xE9
  check_places(vocabulary, "退")
  assert vocabulary.locate("é") is None  # the tokenizer makes the token of 0xE9


def test_a_literal_byte_name_in_a_byte_level_vocabulary_is_text():
  vocabulary = Vocabulary(small_tokenizers.byte_level(literal=["<0x0A>"]))
  assert vocabulary.bytes_V[vocabulary.tokenizer.token_id("<0x0A>")] == b"<0x0A>"
  check_places(vocabulary, "a <0x0A> b\n")


def test_a_vocabulary_can_be_pickled(vocabulary):
  vocabulary.encode_inner("a")
  copied = pickle.loads(pickle.dumps(vocabulary))
  assert copied.bytes_V == vocabulary.bytes_V and copied.id_of == vocabulary.id_of
  assert copied.encode_inner("the other") == vocabulary.encode_inner("the other")
  assert copy.deepcopy(vocabulary).stops == vocabulary.stops
