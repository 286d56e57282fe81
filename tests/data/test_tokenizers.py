"""Tokenizers give the ids and texts of transformers and sentencepiece."""

import io
import json
import pickle
import shutil

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from train_sentencepiece import train_sentencepiece

from distill_jax.data import corpus as corpus_module
from distill_jax.data.options import DataOptions
from distill_jax.data.sources import DocumentSource, documents
from distill_jax.data.tokenizers import Tokenizer, load_tokenizer
from distill_jax.errors import InputError

pytestmark = pytest.mark.smoke

TEXTS = ["def f(x):\n  return x  ", "", " é漢字 😀\t\r\n", "a<|endoftext|>b", "the the" * 50]


@pytest.fixture(scope="module")
def corpus():
  return [d[:3000] for d in documents(DocumentSource("pydoc", split="heldout"))]


@pytest.fixture(scope="module")
def bpe(corpus):
  """Returns a byte-level BPE tokenizer, the kind of most tokenizer.json files."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=500,
    special_tokens=["<|im_end|>", "<|endoftext|>", "<s>"],
    show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )
  backend.train_from_iterator(corpus, trainer)
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
  )
  return backend


@pytest.fixture(scope="module")
def spm(corpus, tmp_path_factory):
  path = tmp_path_factory.mktemp("spm") / "own.model"
  train_sentencepiece(corpus, 400, path)
  return path


def test_tokenizer_json_equals_transformers(bpe, corpus, tmp_path):
  from transformers import PreTrainedTokenizerFast

  bpe.save(str(tmp_path / "tokenizer.json"))
  theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
  ours = load_tokenizer(tmp_path)
  for text in TEXTS + corpus:
    ids = theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False) == text
  assert ours.encode_batch(TEXTS) == [ours.encode(t) for t in TEXTS]
  assert ours.vocab_size == len(theirs) and ours.kind == "huggingface"


def test_a_file_a_folder_and_text_give_the_same_tokenizer(bpe, tmp_path):
  bpe.save(str(tmp_path / "tokenizer.json"))
  as_text = (tmp_path / "tokenizer.json").read_text()
  three = [load_tokenizer(s) for s in (tmp_path, str(tmp_path / "tokenizer.json"), as_text)]
  assert len({t.digest for t in three}) == 1
  assert len({tuple(t.encode(TEXTS[0])) for t in three}) == 1
  assert three[2].raw.decode() == as_text and three[2].filename == "tokenizer.json"
  assert load_tokenizer(json.dumps(json.loads(as_text), indent=7)).digest == three[0].digest
  changed = json.loads(as_text)
  changed["model"]["merges"].reverse()
  assert load_tokenizer(json.dumps(changed)).digest != three[0].digest


def test_a_length_limit_in_the_file_does_not_cut_text(bpe):
  limited = tokenizers.Tokenizer.from_str(bpe.to_str())
  limited.enable_truncation(4)
  limited.enable_padding(length=64)
  ours, long = load_tokenizer(limited.to_str()), TEXTS[4]
  assert ours.decode(ours.encode(long)) == long and len(ours.encode(long)) > 4
  assert ours.encode_batch([long, "a"]) == [ours.encode(long), ours.encode("a")]
  assert len(ours.encode("a")) == 1


def test_only_the_named_file_is_exported_with_a_student(bpe, spm, tmp_path):
  """Its name does not matter, and neither do other tokenizers in its folder."""
  (tmp_path / "tokenizer.json").write_text("{}")
  (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "t"}')
  bpe.save(str(tmp_path / "own.json"))
  shutil.copy(spm, tmp_path / "own")
  for name in ("own.json", "own"):
    found = corpus_module.files_of(DataOptions(tokenizer=str(tmp_path / name)), None)
    data = found.sentencepiece if found.json is None else found.json.encode()
    assert data == (tmp_path / name).read_bytes()
    assert None in (found.json, found.sentencepiece) and found.chat_template == "t"


def test_vocab_size_is_the_largest_id_plus_one(bpe):
  text = json.loads(bpe.to_str())
  text["model"]["vocab"]["far"] = 900  # ids may have holes
  assert load_tokenizer(json.dumps(text)).vocab_size == 901


def test_special_tokens(bpe, tmp_path):
  bpe.save(str(tmp_path / "tokenizer.json"))
  im_end, eos, s = (bpe.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>", "<s>"))
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps({"eos_token": {"content": "<|im_end|>", "lstrip": False}, "bos_token": None})
  )
  found = load_tokenizer(tmp_path)  # documents do not end with the end of a turn
  assert (found.eos_id, found.bos_id) == (eos, s)
  assert load_tokenizer(tmp_path, eos="<s>", bos=5).eos_id == s
  assert load_tokenizer(tmp_path, bos=5).bos_id == 5
  bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
  assert load_tokenizer(bare.to_str()).eos_id is None
  for wrong, message in (
    ("<none>", "has no token '<none>'"),
    (500, "Token id 500 is outside the vocabulary"),
    (-1, "Token id -1 is outside the vocabulary"),
  ):
    with pytest.raises(InputError, match=message):
      load_tokenizer(tmp_path, eos=wrong)
  (tmp_path / "tokenizer_config.json").write_text("{")
  with pytest.raises(InputError, match="tokenizer_config.json is not JSON"):
    load_tokenizer(tmp_path)


def test_an_ordinary_token_with_the_name_of_a_special_one_has_no_role():
  """Gemma 3 has <s> and </s> as HTML tags, R1-Distill-Qwen as ordinary text."""
  tags = ["<s>", "</s>"]
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({t: i for i, t in enumerate(tags)}))
  backend.add_tokens(tags[:1])
  backend.add_special_tokens(["<bos>", "<eos>", "<|im_start|>"])
  raw = backend.to_str().encode()
  found = Tokenizer(raw, "here", named={"eos_token": "</s>", "bos_token": "<s>"})
  assert (found.piece(found.eos_id), found.piece(found.bos_id)) == ("<eos>", "<bos>")
  without = raw.replace(b"<bos>", b"<b>").replace(b"<eos>", b"<e>")
  assert Tokenizer(without, "here").eos_id is None
  named = Tokenizer(without, "here", named={"eos_token": "<e>", "bos_token": "<|im_start|>"})
  assert (named.piece(named.eos_id), named.bos_id) == ("<e>", None)  # it begins turns, not texts


def test_sentencepiece_equals_sentencepiece(spm, corpus):
  theirs, ours = sentencepiece.SentencePieceProcessor(model_file=str(spm)), load_tokenizer(spm)
  for text in TEXTS + corpus:
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)) == text
  assert ours.encode_batch(TEXTS) == [theirs.encode(t) for t in TEXTS]
  assert (ours.vocab_size, ours.eos_id, ours.bos_id) == (400, theirs.eos_id(), theirs.bos_id())
  assert ours.token_id("no such piece") is None and ours.kind == "sentencepiece"


@settings(max_examples=200, deadline=None)
@given(text=st.text().filter(lambda t: "▁" not in t))
def test_trained_sentencepiece_loses_nothing(spm, text):
  ours = load_tokenizer(spm)
  assert ours.decode(ours.encode(text)) == text
  assert 0 not in ours.encode(text)  # <unk>


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_training_is_reproducible_and_compresses(corpus, tmp_path, model_type):
  a = train_sentencepiece(corpus, 400, tmp_path / "a.model", model_type)
  b = train_sentencepiece(iter(corpus), 400, tmp_path / "deep" / "b.model", model_type)
  assert a.raw == b.raw == (tmp_path / "a.model").read_bytes() and a.digest == b.digest
  assert a.vocab_size == 400
  # The 140 pieces that are not bytes were trained on this corpus, so its text gets shorter.
  # The corpus is the documentation of the running Python: a factor of 1.48 or more.
  assert sum(map(len, corpus)) > 1.45 * sum(map(len, a.encode_batch(corpus)))
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a.model", "deep"]


def test_training_keeps_long_lines(tmp_path):
  """By default, sentencepiece skips lines over 4,192 bytes almost silently."""
  one_line = " ".join(["wonderful"] * 1000)
  assert train_sentencepiece([one_line], 285, tmp_path / "a.model", "bpe").token_id("▁wonderful")


def test_training_errors_keep_the_old_file(tmp_path):
  out = tmp_path / "a.model"
  out.write_bytes(b"kept")
  for docs, size, kind, message in [
    ([], 300, "unigram", "has no text"),
    (["", "\n"], 300, "bpe", "has no text"),
    (["abc"], 5000, "unigram", "5000 pieces.*too high"),
    (["abc"], 10, "bpe", "10 pieces"),
    (["abc"], 300, "word", "model_type is 'word'"),
  ]:
    with pytest.raises(InputError, match=message):
      train_sentencepiece(docs, size, out, kind)

  def broken():
    yield "abc"
    raise InputError("file x is not UTF-8")

  with pytest.raises(InputError, match="^file x is not UTF-8$"):
    train_sentencepiece(broken(), 300, out)
  assert out.read_bytes() == b"kept" and len(list(tmp_path.iterdir())) == 1


def test_pickles(bpe, spm):
  for ours in (load_tokenizer(bpe.to_str()), load_tokenizer(spm)):
    again = pickle.loads(pickle.dumps(ours))
    assert again.encode_batch(TEXTS) == ours.encode_batch(TEXTS)
    for name in ("digest", "vocab_size", "eos_id", "bos_id", "kind", "raw"):
      assert getattr(again, name) == getattr(ours, name)


def test_decoding_an_id_outside_the_vocabulary_is_an_error(bpe, spm):
  for ours in (load_tokenizer(bpe.to_str()), load_tokenizer(spm)):
    for bad in (-1, ours.vocab_size):
      with pytest.raises(InputError, match=f"Token id {bad} is outside the vocabulary"):
        ours.decode([0, bad])


@pytest.mark.parametrize(
  "raw, message",
  [
    (b"", "is empty"),
    (b"not a model at all\n", "neither"),
    (b"\0" * 64, "neither"),
    (b"{", "not complete JSON"),
    (b'{"text": "a"}', "without a 'model'"),
    (b'{"model": {"type": "Unheard"}}', "not a tokenizer that `tokenizers` can read"),
    (b'{"model": {"\xff": 1}}', "not complete JSON"),
  ],
)
def test_a_file_that_is_not_a_tokenizer_is_an_error(tmp_path, raw, message):
  (file := tmp_path / "tokenizer.json").write_bytes(raw)
  with pytest.raises(InputError, match=message):
    load_tokenizer(file)


def test_truncated_files_are_errors(bpe, spm, tmp_path):
  for raw in (bpe.to_str().encode(), spm.read_bytes()):
    for part in (0.1, 0.5, 0.9, 0.999):
      (file := tmp_path / "cut").write_bytes(raw[: int(len(raw) * part)])
      with pytest.raises(InputError):
        load_tokenizer(file)


def test_a_sentencepiece_model_without_eos_has_none(corpus, tmp_path):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(corpus),
    model_writer=model,
    vocab_size=300,
    minloglevel=2,
    eos_id=-1,
    bos_id=-1,
    hard_vocab_limit=False,
  )
  (file := tmp_path / "tokenizer.model").write_bytes(model.getvalue())
  assert load_tokenizer(tmp_path).eos_id is None and load_tokenizer(file).bos_id is None


def test_missing_files_are_errors(tmp_path):
  with pytest.raises(InputError, match="does not exist"):
    load_tokenizer(tmp_path / "tokenizer.json")
  with pytest.raises(InputError, match="has no tokenizer.json or tokenizer.model"):
    load_tokenizer(tmp_path)
