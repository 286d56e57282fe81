"""Bits per byte: models with different tokenizers on the same bytes."""

import dataclasses
import json
import math

import numpy as np
import pytest
import slow
import small_tokenizers
import tiny
import tiny_checkpoints
from hypothesis import given, settings
from hypothesis import strategies as st
from train_sentencepiece import train_sentencepiece

from distill_jax import config
from distill_jax.commands import evaluate
from distill_jax.cross_tokenizer.vocabulary import Vocabulary
from distill_jax.data import sources
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError
from distill_jax.evals import bits_per_byte, heldout
from distill_jax.models import loading
from distill_jax.report import model_card
from distill_jax.report.html_report import write_report

LENGTH = 32


def ends_of(lengths):
  return np.concatenate([[0], np.cumsum(lengths)])


@settings(max_examples=40, deadline=None)
@given(
  st.lists(st.integers(1, 4), min_size=1, max_size=60),
  st.lists(st.integers(1, 4), min_size=1, max_size=60),
  st.integers(2, 9),
  st.integers(0, 1),
)
def test_all_tokenizers_have_the_same_bytes_in_each_part(one, two, length, prefix):
  """`prefix` is a dummy prefix: its first token begins one byte before the text."""
  n = max(sum(one), sum(two))
  one, two = [*one, n - sum(one)], [*two, n - sum(two)]
  ends = [ends_of([x for x in lengths if x]) for lengths in (one, two)]
  ends[1][0] -= prefix
  parts = bits_per_byte.cut([(np.zeros(len(e) - 1, int), e) for e in ends], length)
  common = sorted(set(ends[0]) & set(ends[1]) - {0})
  # The longest stretch without a common boundary, in tokens.
  stretches = [
    [int(np.searchsorted(e, b) - np.searchsorted(e, a)) for e in ends]
    for a, b in zip(common, common[1:], strict=False)
  ]
  first = [int(np.searchsorted(e, common[0])) for e in ends]
  if parts is None:  # there is no way to cut it
    begin = [a + b - 1 for a, b in zip(first, stretches[0], strict=True)]
    assert max(max(begin), *map(max, stretches)) > length
    return
  spans = [[(e[b], e[c]) for _, b, c in part] for part, e in zip(parts, ends, strict=True)]
  assert spans[0] == spans[1]
  flat = [place for span in spans[0] for place in span]
  assert flat[1:-1:2] == flat[2::2]  # without gaps
  if flat:
    assert (flat[0], flat[-1]) == (common[0], n)
  else:
    assert len(common) == 1
  for part in parts:
    for i, (a, b, c) in enumerate(part):
      assert a < b < c and c - a - 1 <= length and (b - a == 1 if i else a == 0)
  # No part could be joined with the next one.
  for i in range(len(parts[0]) - 1):
    nexts = [part[i + 1][1] for part in parts]
    after = [next(x for x in common if x > e[b]) for e, b in zip(ends, nexts, strict=True)]
    longer = [
      np.searchsorted(e, x) - part[i][0] - 1 for e, x, part in zip(ends, after, parts, strict=True)
    ]
    assert max(longer) > length


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A teacher with a token for each byte, and a student with pieces, whose logits are all 0."""
  folder = tmp_path_factory.mktemp("texts")
  for name, size in (("teacher", 260), ("student", 384)):
    c = dataclasses.replace(tiny_checkpoints.CONFIG, vocab_size=size, tie_word_embeddings=False)
    weights = {n: 0.2 * x for n, x in tiny_checkpoints.tensors(c).items()}
    weights["lm_head.weight"] = 0 * weights["lm_head.weight"]
    tiny_checkpoints.write_folder(folder / name, c, weights)
    (folder / name / "tokenizer.json").unlink()
  tiny.write_tokenizer(folder / "teacher" / "tokenizer.json")
  train_sentencepiece(tiny.sentences(), 300, folder / "student" / "tokenizer.model", "bpe")
  lines = [json.dumps({"text": f"{s} é漢字\n{s}"}) for s in tiny.sentences(6)]
  lines[2] = json.dumps({"text": "a \u2581 b"})  # pieces do not spell it
  (folder / "text.jsonl").write_text("\n".join(lines))
  return folder


def asked(folder):
  c = config.base()
  c.teacher.source, c.student.source = str(folder / "teacher"), str(folder / "student")
  c.data.update(kind="jsonl", path=str(folder / "text.jsonl"), heldout_fraction=0.0)
  c.data.seq_len, c.evaluate.batch_size, c.evaluate.chunk = LENGTH, 4, 16
  c.evaluate.examples, c.evaluate.texts = 0, 4
  return c


@pytest.mark.parametrize("compared", [False, slow.param(True)])
def test_uniform_models_need_the_bits_of_their_tokens(compared, folder, tmp_path):
  """Closed form; rows of the head without a token have no probability."""
  c = asked(folder)
  c.evaluate.heldout = compared
  result = evaluate.run(config.resolve(c), tmp_path)
  # The student's tokens are others.
  assert list(result["models"]) == (["teacher"] if compared else [])
  texts = result["texts"]
  assert (texts["texts"], texts["skipped"]) == (4, 1)
  source = sources.DocumentSource("jsonl", c.data.path, "heldout", heldout_fraction=0.0)
  used = [t for t in sources.documents(source) if "\u2581" not in t][:4]
  for name, model in (("teacher", "teacher"), ("start", "student")):
    tokenizer = load_tokenizer(folder / model)
    pieces = load_tokenizer(folder / "student")
    n_bytes = n_tokens = 0
    for text in used:
      first = pieces.piece(pieces.encode(text)[0]).replace("\u2581", " ")
      assert text.startswith(first)
      n_bytes += len(text.encode()) - len(first.encode())
      n_tokens += len(tokenizer.encode(text)) - len(tokenizer.encode(first))
    assert texts["bytes"] == n_bytes
    row = texts["models"][name]
    want = n_tokens * math.log2(tokenizer.vocab_size) / n_bytes
    assert row["bits_per_byte"] == pytest.approx(want, rel=1e-6)
    assert row["bytes_per_token"] == pytest.approx(n_bytes / n_tokens)
  assert json.loads((tmp_path / "evaluation.json").read_text()) == result
  heading = f"its per byte, 4 texts, {n_bytes:,} bytes: teacher"
  assert heading in evaluate.text(result)
  assert heading in model_card.card(config.resolve(c), 1, result)
  write_report(tmp_path)
  assert heading.partition("teacher")[0] in (tmp_path / "report.html").read_text()


def test_tokens_are_those_of_the_whole_text(folder):
  """A text is not tokenized again where it is cut, and begins as in training."""
  tokenizers = {m: load_tokenizer(folder / m) for m in ("teacher", "student")}
  tokenizers["prefix"] = small_tokenizers.sentencepiece_model(prefix=True)  # a dummy space
  assert [len(t.begin) for t in tokenizers.values()] == [0, 1, 1]
  vocabularies = {m: Vocabulary(t) for m, t in tokenizers.items()}
  text = "12 times 15 is 180, as anyone can see. 漢字" * 9
  shared = bits_per_byte.share([text], vocabularies, LENGTH, 1)
  for name, pairs in shared.pairs.items():
    ids = [*tokenizers[name].begin, *tokenizers[name].encode(text)]
    assert [*pairs[0].given, *(i for pair in pairs for i in pair.scored)] == ids
    assert all(len(pair.given) + len(pair.scored) - 1 <= LENGTH for pair in pairs)


def test_tokenizers_that_differ_need_bits_per_byte(folder):
  c = asked(folder)
  c.evaluate.texts = 0
  resolved = config.resolve(c)
  models = {
    "teacher": loading.open_source(resolved.teacher),
    "start": loading.open_source(resolved.student),
  }
  with pytest.raises(InputError, match="evaluate.texts is 0; .* tokenizer of 'start' is not the"):
    heldout.comparable(resolved, models)
  c.data.tokenizer = str(folder / "student")
  with pytest.raises(InputError, match="has 300 tokens, but the model's embedding has 260 rows"):
    heldout.comparable(config.resolve(c), models)
  c.data.tokenizer = str(folder / "teacher")
  assert heldout.comparable(config.resolve(c), models) == models


def test_chats_and_unusable_texts_are_refused(folder, tmp_path):
  c = asked(folder)
  c.data.kind = "chat"
  with pytest.raises(InputError, match="evaluate.texts is 4; expected 0, because the data are not"):
    bits_per_byte.measure(config.resolve(c), {})
  c.data.kind, c.data.path = "text", str(tmp_path / "t.txt")
  (tmp_path / "t.txt").write_text("a \u2581 b")
  c.evaluate.heldout = False
  with pytest.raises(InputError, match="No held-out text of .* can be scored"):
    evaluate.run(config.resolve(c), tmp_path)
