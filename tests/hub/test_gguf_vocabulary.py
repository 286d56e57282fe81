"""The vocabulary of a GGUF file: its content, that it can be read back, and what is refused."""

import json

import gguf_words
import hard_texts
import pytest
import small_tokenizers
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from distill_jax.errors import InputError
from distill_jax.hub.gguf_pretokenizers import PRE_TOKENIZERS, name_of
from distill_jax.hub.gguf_tokenizer import tokenizer_files
from distill_jax.hub.gguf_vocabulary import differences, vocabulary
from distill_jax.hub.tokenizer import TokenizerFiles

pytestmark = pytest.mark.smoke

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"


def meta_of(parsed, config=None, generation=None, rows=None, **named):
  """The metadata without its prefix of a tokenizer.json, which ends texts by <|endoftext|>."""
  files = TokenizerFiles(json.dumps(parsed), None, {"eos_token": "<|endoftext|>", **named})
  rows = rows or files.size()
  entries = vocabulary(files, {"vocab_size": rows, **(config or {})}, generation or {})
  return {key.removeprefix("tokenizer.ggml."): value for key, value in entries}


def differences_of(parsed):
  """What llama.cpp does differently with a tokenizer.json."""
  return " ".join(differences(TokenizerFiles(json.dumps(parsed), None, {})))


def byte_level(name="gpt-2", **kwargs):
  """A small byte-level tokenizer.json with a pre-tokenizer of llama.cpp."""
  parsed = json.loads(small_tokenizers.byte_level(**kwargs).raw)
  parsed["pre_tokenizer"] = PRE_TOKENIZERS[name].json()
  parsed["model"]["ignore_merges"] = PRE_TOKENIZERS[name].ignore_merges
  return parsed


def sentences(prefix):
  """A sentencepiece model, with a user-defined run of spaces unless it prepends one."""
  return small_tokenizers.sentencepiece_model(prefix, runs=() if prefix else (SPACE * 4,))


def pieces(prefix=True, **kwargs):
  """A sentencepiece model as a tokenizer.json, converted as transformers does it."""
  proto = sentencepiece_model_pb2.ModelProto()
  proto.ParseFromString(sentences(prefix).raw)
  vocab = {p.piece: i for i, p in enumerate(proto.pieces)}
  best_first = sorted(proto.pieces, key=lambda p: p.score, reverse=True)
  cuts = ((p.piece[:i], p.piece[i:]) for p in best_first for i in range(len(p.piece) - 1, 0, -1))
  merges = [[a, b] for a, b in cuts if a in vocab and b in vocab]
  parsed = json.loads(small_tokenizers.metaspace(prefix).raw)
  parsed["model"] |= {"vocab": vocab, "merges": merges} | kwargs
  parsed["added_tokens"] = [t for t in parsed["added_tokens"] if t["id"] < 3]
  return parsed


def test_the_metadata():
  parsed = byte_level(literal=["<think>"])
  n = len(parsed["model"]["vocab"])
  chat = {"chat_template": "{{ messages }}", "pad_token": {"content": "<|im_end|>"}}
  meta = meta_of(parsed, rows=n + 3, **chat)
  vocab = parsed["model"]["vocab"]
  assert [meta["tokens"][i] for i in vocab.values()] == list(vocab)
  assert meta["tokens"][n:] == ["<think>", f"[PAD{n + 1}]", f"[PAD{n + 2}]"]
  kinds = dict(zip(meta["tokens"], meta["token_type"], strict=True))
  special = [kinds.pop("<|endoftext|>"), kinds.pop("<|im_end|>"), kinds.pop("<think>")]
  assert special == [CONTROL, CONTROL, USER_DEFINED]
  assert [kind for token, kind in kinds.items() if token.startswith("[PAD")] == [UNUSED] * 2
  assert {kind for token, kind in kinds.items() if token in vocab} == {NORMAL}
  assert meta["merges"] == [" ".join(pair) for pair in parsed["model"]["merges"]]
  assert (meta["model"], meta["pre"]) == ("gpt2", "gpt-2")
  assert (meta["eos_token_id"], meta["padding_token_id"]) == (0, 1)
  assert (meta["add_bos_token"], meta["add_eos_token"]) == (False, False)
  assert "bos_token_id" not in meta and "unknown_token_id" not in meta
  assert meta["tokenizer.chat_template"] == "{{ messages }}"


def test_the_token_that_begins_a_text():
  parsed = byte_level()
  template = {
    "type": "TemplateProcessing",
    "single": [
      {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}},
      {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "special_tokens": {"<|im_end|>": {"id": "<|im_end|>", "ids": [1], "tokens": ["<|im_end|>"]}},
  }
  bytes_ = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
  parsed["post_processor"] = {"type": "Sequence", "processors": [bytes_, template]}
  meta = meta_of(parsed, bos_token="<|endoftext|>")
  assert (meta["add_bos_token"], meta["bos_token_id"]) == (True, 1)
  del parsed["post_processor"]
  meta = meta_of(parsed, bos_token="<|endoftext|>")
  assert (meta["add_bos_token"], meta["bos_token_id"]) == (False, 0)


@pytest.mark.parametrize(
  "named, config, generation, want",
  [
    ("<|endoftext|>", {}, {}, {"eos": 0}),
    (None, {}, {}, {"eos": 0}),  # by its name, as in training
    ("<|im_end|>", {"eos_token_id": 0}, {}, {"eos": 0}),  # it is not among the model's
    ("<|im_end|>", {"eos_token_id": 0}, {"eos_token_id": [0, 1]}, {"eos": 1, "eot": 0}),
    (None, {"eos_token_id": 5}, {"eos_token_id": [6, 0, 7]}, {"eos": 6, "eot": 7, "eom": 0}),
  ],
)
def test_the_tokens_that_end_a_text(named, config, generation, want):
  meta = meta_of(byte_level(), config, generation, eos_token=named)
  found = {role: meta.get(f"{role}_token_id") for role in ("eos", "eot", "eom")}
  assert {role: i for role, i in found.items() if i is not None} == want


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_reading_back_gives_the_same_ids(name, tmp_path):
  parsed = byte_level(name, literal=["<think>"])
  meta = meta_of(parsed, rows=420)
  assert meta["pre"] == name
  full = {f"tokenizer.ggml.{key}": value for key, value in meta.items()}
  read = tokenizer_files({**full, "general.architecture": "llama"}, tmp_path / "x.gguf")
  assert read.size() == 401  # the rows without a token are not in it
  ours = tokenizers.Tokenizer.from_str(json.dumps(parsed))
  theirs = tokenizers.Tokenizer.from_str(read.json)
  texts = [*hard_texts.BASE, "a<think>b<|im_end|>c"]
  want, got = (t.encode_batch(texts, add_special_tokens=False) for t in (ours, theirs))
  assert [e.ids for e in want] == [e.ids for e in got]


def test_other_forms_of_the_same_pre_tokenizer():
  form = json.loads(json.dumps(PRE_TOKENIZERS["llama-bpe"].json()))
  split, bytes_ = form["pretokenizers"]
  split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(r"\r", "\r").replace(r"\n", "\n")
  nested = {"type": "Sequence", "pretokenizers": [{"type": "Sequence", "pretokenizers": [split]}]}
  nested["pretokenizers"].append({**bytes_, "trim_offsets": False})
  assert name_of(nested, True) == "llama-bpe"
  assert name_of(nested, False) == "smaug-bpe"
  assert name_of({"type": "ByteLevel", "add_prefix_space": True}, False) is None
  assert name_of(split, True) is None  # the bytes are not converted
  assert name_of({**nested, "pretokenizers": nested["pretokenizers"][::-1]}, True) is None
  split["behavior"] = "Removed"
  assert name_of(nested, True) is None
  assert name_of(None, False) is None


@pytest.mark.parametrize("prefix", [True, False])
def test_scores_replace_merges(prefix):
  """Llama.cpp's rule with the file's scores gives the ids of sentencepiece and of its merges."""
  model = sentences(prefix)
  files = TokenizerFiles(None, model.raw, {})
  entries = dict(vocabulary(files, {"vocab_size": model.vocab_size + 1}, {}))
  kinds = [UNKNOWN, CONTROL, CONTROL, BYTE if prefix else USER_DEFINED]
  assert entries["tokenizer.ggml.token_type"][:4] == kinds
  if not prefix:  # it is found in the text before spaces are replaced
    assert entries["tokenizer.ggml.tokens"][3] == "    "
  assert entries["tokenizer.ggml.token_type"][-1] == UNUSED
  assert entries["tokenizer.ggml.token_type"].count(BYTE) == 256
  want = {"bos": 1, "eos": 2, "unknown": 0}
  assert {role: entries[f"tokenizer.ggml.{role}_token_id"] for role in want} == want
  assert entries["tokenizer.ggml.add_bos_token"] is True

  parsed = pieces(prefix)
  merged = tokenizers.Tokenizer.from_str(json.dumps(parsed))
  meta = meta_of(parsed, eos_token="</s>")
  first = {key.removeprefix("tokenizer.ggml."): value for key, value in entries.items()}
  assert meta["add_space_prefix"] == first["add_space_prefix"] == prefix
  texts = [
    text for text in small_tokenizers.CORPUS + hard_texts.BASE if text and "    " not in text
  ]
  for text in {text.replace("\u0000", "") for text in texts if len(text) < 250}:
    ids = merged.encode(text, add_special_tokens=False).ids
    assert gguf_words.by_score(meta, text) == ids, text
    if text.strip(" "):
      assert gguf_words.by_score(first, text) == model.encode(text), text


def test_runs_of_a_letter_share_a_score():
  """Gemma's merges of spaces are interleaved with those of tabs; the longest is made first."""
  parsed = pieces(prefix=False)
  model = parsed["model"]
  runs = [c * n for c in (SPACE, "\t") for n in range(2, 6)]
  for token in [*runs, "\t"]:
    model["vocab"].setdefault(token, len(model["vocab"]))
  old = [m for m in model["merges"] if "".join(m) not in runs]
  new = [[r[:i], r[i:]] for r in runs for i in range(1, len(r))]
  model["merges"] = sorted(new, key=lambda m: (len(m[0]), len(m[1])), reverse=True) + old
  meta = meta_of(parsed, eos_token="</s>")
  ours = tokenizers.Tokenizer.from_str(json.dumps(parsed))
  for text in (" " * 7 + "x", "\t" * 13, " \t\t \t\t\t   a  b"):
    assert gguf_words.by_score(meta, text) == ours.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_metaspace_as_a_pre_tokenizer(scheme):
  cut = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
  parsed = {**pieces(), "normalizer": None, "pre_tokenizer": cut}
  assert meta_of(parsed, eos_token="</s>")["add_space_prefix"] == (scheme == "always")
  assert ("space" in differences_of(parsed)) == (scheme != "never")


def test_differences_of_llama_cpp():
  assert "Give it composed text" in differences_of(byte_level("qwen2", normalizer="NFC"))
  assert not differences_of(byte_level("qwen2"))
  assert "combining marks" in differences_of(byte_level("tekken"))


def changed(parsed, *path, value):
  *parents, last = path
  at = parsed
  for key in parents:
    at = at[key]
  at[last] = value
  return parsed


def without_merge(parsed):
  """Drops a merge of a token that has several."""
  merges = parsed["model"]["merges"]
  made = ["".join(m) for m in merges]
  twice = next(i for i, token in enumerate(made) if made.count(token) > 1)
  return changed(parsed, "model", "merges", value=merges[:twice] + merges[twice + 1 :])


def swapped(parsed):
  """Moves the first merge of a token with several behind the merges of the next token."""
  merges = parsed["model"]["merges"]
  made = ["".join(m) for m in merges]
  at = next(i for i in range(len(made)) if made[i] == made[i + 1] and len({*made[i]}) > 1)
  merges.insert(next(i for i in range(at, len(made)) if made[i] != made[at]) + 1, merges.pop(at))
  return parsed


REFUSED = {
  "Unigram": lambda: changed(byte_level(), "model", "type", value="Unigram"),
  "dropout": lambda: changed(byte_level(), "model", "dropout", value=0.1),
  "unknown pre_tokenizer": lambda: changed(
    byte_level(), "pre_tokenizer", value={"type": "Whitespace"}
  ),
  "normalizer Lowercase": lambda: changed(byte_level(), "normalizer", value={"type": "Lowercase"}),
  "with lstrip": lambda: changed(byte_level(), "added_tokens", 0, "lstrip", value=True),
  "BertProcessing": lambda: changed(
    byte_level(), "post_processor", value={"type": "BertProcessing"}
  ),
  "token for every byte": lambda: pieces(byte_fallback=False),
  "not all divisions": lambda: without_merge(pieces()),
  "before and after": lambda: swapped(pieces()),
  "found after the text is normalized": lambda: changed(
    pieces(), "added_tokens", 0, "normalized", value=True
  ),
  "changes texts by": lambda: changed(pieces(), "pre_tokenizer", value={"type": "Digits"}),
  "with split": lambda: changed(
    {**pieces(), "normalizer": None}, "pre_tokenizer", value={"type": "Metaspace"}
  ),
  "is damaged": lambda: changed(byte_level(), "model", "merges", value=[["a"]]),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_llama_cpp_cannot_do_is_refused(fault):
  with pytest.raises(InputError, match=fault) as caught:
    meta_of(REFUSED[fault](), rows=1000)
  assert "export.format" in str(caught.value) or fault == "is damaged"


def test_ends_that_cannot_be_written_are_refused():
  with pytest.raises(InputError, match="no token that ends a text"):
    meta_of(byte_level(special=["<a>", "<b>"]))
  with pytest.raises(InputError, match="eos_token_id is 999"):
    meta_of(byte_level(), {"eos_token_id": 999})
  with pytest.raises(InputError, match="more than three tokens that end"):
    meta_of(byte_level(), generation={"eos_token_id": [5, 6, 7, 8]}, eos_token=None)
  known = meta_of(byte_level(), generation={"eos_token_id": [5, 6, 7, 0]}, eos_token=None)
  assert (known["eos_token_id"], known["eom_token_id"]) == (5, 7)  # 0 is known by its name
  with pytest.raises(InputError, match="401 tokens, but the model's embedding has 300 rows"):
    meta_of(byte_level(literal=["<x>"]), rows=300)


def test_sentencepiece_models_that_are_refused():
  def convert(raw):
    return vocabulary(TokenizerFiles(None, raw, {}), {"vocab_size": 500}, {})

  with pytest.raises(InputError, match="other than BPE"):
    convert(small_tokenizers.sentencepiece_model(True, "unigram").raw)
  with pytest.raises(InputError, match="damaged"):
    convert(b"\xff" * 40)
  proto = sentencepiece_model_pb2.ModelProto()
  with pytest.raises(InputError, match="user-defined piece '\u2581\u2581"):
    convert(small_tokenizers.sentencepiece_model(True).raw)
  proto.ParseFromString(sentences(True).raw)
  proto.normalizer_spec.remove_extra_whitespaces = True
  with pytest.raises(InputError, match="normalizes texts by the rule 'identity'"):
    convert(proto.SerializeToString())
