"""Chats as a corpus: the assistant's tokens are trained on, alone or mixed with soft labels."""

import json

import numpy as np
import pytest
import tiny
import tokenizers
from json_lines import write_lines
from tiny_run import train

from distill_jax import config
from distill_jax.commands.record import run as record
from distill_jax.data import chat_dataset, corpus, model_rows
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError
from distill_jax.records.store import open_store
from distill_jax.training import loader

CHATML = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder):
  """Writes a tokenizer of 258 ids (bytes and two special tokens) with the ChatML template."""
  (folder / "chat").mkdir(exist_ok=True)
  path = tiny.write_tokenizer(folder / "chat" / "tokenizer.json")
  t = tokenizers.Tokenizer.from_file(str(path))
  t.add_special_tokens(["<|im_start|>", "<|im_end|>"])
  t.save(str(path))
  fields = {"chat_template": CHATML, "eos_token": "<|im_end|>"}
  (folder / "chat" / "tokenizer_config.json").write_text(json.dumps(fields))
  return folder / "chat"


def ask(i, answer):
  return [{"role": "user", "content": f"{i}+1?"}, {"role": "assistant", "content": answer}]


LINES = [
  {"messages": ask(1, "2")},
  {"prompt": "2+1?", "text": "3"},
  {"prompt": [{"role": "system", "content": "s"}, *ask(1, "2")[:1]], "text": "two"},
  {"messages": [*ask(5, "6"), *ask(6, "7")]},
]


@pytest.fixture
def folder(tmp_path):
  write_tokenizer(tmp_path)
  write(tmp_path, LINES)
  return tmp_path


def write(folder, lines):
  write_lines(folder / "chats.jsonl", lines)


def data(folder, **changes):
  values = {
    "kind": "chat",
    "path": str(folder / "chats.jsonl"),
    "heldout_fraction": 0.0,
    "tokenizer": str(folder / "chat"),
    "seq_len": 80,
    **changes,
  }
  return config.DataOptions(**values)


def rows(data):
  return list(corpus.sequences(data, load_tokenizer(data.tokenizer)))


def test_labels_are_the_assistants_turns(folder):
  """The trained labels are each answer and the token that ends it."""
  d = data(folder)
  tokenizer, read = load_tokenizer(d.tokenizer), {}
  for row in rows(d):
    labels = model_rows.next_tokens(row["tokens_T"])
    for s in range(1, row["segments_T"].max() + 1):
      own = row["segments_T"] == s
      chat = tokenizer.decode(row["tokens_T"][own].tolist())
      assert chat.startswith("<|im_start|>") and chat.endswith("<|im_end|>\n")
      read[chat] = tokenizer.decode(labels[own & row["mask_T"]].tolist())
  labels_of = ["2<|im_end|>", "3<|im_end|>", "6<|im_end|>7<|im_end|>", "two<|im_end|>"]
  assert sorted(read.values()) == labels_of  # chats are not cut


def test_unusable_chats_are_reported_or_skipped(folder, capsys):
  bad = [{"messages": ask(9, "x" * 200)}, {"messages": ask(9, "y")[:1]}, {"answer": 1}]
  write(folder, [LINES[0], *bad])
  with pytest.raises(InputError, match="line 2 is longer than the 80 tokens"):
    rows(data(folder))
  assert len(rows(data(folder, on_bad="skip"))) == 1
  err = capsys.readouterr().err
  for why in ("longer than", "no assistant turn to train on", "neither a list of 'messages'"):
    assert "1 of 4 chats skipped" in err and why in err
  write(folder, bad)
  with pytest.raises(InputError, match="has no chat that can be used"):
    rows(data(folder, on_bad="skip"))
  with pytest.raises(InputError, match="data.on_bad is 'ignore'"):
    rows(data(folder, on_bad="ignore"))


@pytest.mark.parametrize(
  "line, words",
  [
    ("[1]", "a JSON list"),
    ("{", "The line is not JSON"),
    ('{"messages": "hi"}', "neither a list"),
    ('{"prompt": 3, "text": "x"}', "neither a list"),
    ('{"messages": [{"content": 1}]}', "neither"),
  ],
)
def test_lines_that_are_not_chats_are_errors(line, words):
  with pytest.raises(InputError, match=words):
    chat_dataset.parse(line)


# ------------------------------------------------------------------ fine-tuning


def made(folder):
  c = tiny.tiny(folder)
  c.data.tokenizer = str(write_tokenizer(folder))
  c.teacher.source, c.teacher.shape, c.student.shape = "", "tiny", "tiny"
  return c


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
  """Records a store of text with sampled targets, and a store of chats without targets."""
  folder = tmp_path_factory.mktemp("sft")
  write(folder, [{"messages": ask(i, f"It is {i + 1}.")} for i in range(40)])
  c = made(folder)
  c.data.tokenizer = str(tiny.write_tokenizer(folder / "tokenizer.json"))
  record(config.resolve(c), folder / "soft")
  plain = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
  plain = plain.replace("{{", "{% if m['role'] == 'assistant' %}{% generation %}{{").replace(
    "}}", "}}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
  )
  (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": plain}))
  c.data.kind, c.data.path, c.records.kind = "chat", str(folder / "chats.jsonl"), "text"
  c.data.sequences = 0
  record(config.resolve(c), folder / "chats")
  return folder, c


def test_fine_tuning_on_chats(stores):
  folder, c = stores
  c.losses = {"hard": config.loss("ce")}
  c.train.records, c.train.steps = (str(folder / "chats"),), 30
  train(c, folder / "sft")
  got = tiny.measured(folder / "sft")
  assert got[-1]["ce"] < 0.5 * got[0]["ce"]
  held = open_store(folder / "chats")
  assert got[0]["tokens"] < 4 * tiny.SEQ_LEN
  assert all(0 < held[i]["mask_T"].sum() < (held[i]["segments_T"] > 0).sum() for i in range(3))


def test_training_on_chats_mixed_with_soft_labels(stores):
  """Text rows have no targets: their tokens count only in the losses' divisor."""
  folder, c = stores
  both = [open_store(folder / "soft"), open_store(folder / "chats")]
  batches = loader.batches(both, batch_size=8, seed=0, mixture=(0.5, 0.5))
  for _ in range(3):
    batch = next(batches)
    t = batch.targets["teacher"]
    has = (t.weight_BTK > 0).any((1, 2))
    assert 0 < has.sum() < 8
    np.testing.assert_allclose(t.weight_BTK[has].sum(-1)[batch.mask_BT[has]], 1, rtol=1e-6)
  c.losses = {"soft": config.loss("kd", weight=0.7), "hard": config.loss("ce", weight=0.3)}
  c.train.records = (str(folder / "soft"), str(folder / "chats"))
  c.train.mixture, c.train.steps, c.train.batch_size = (0.5, 0.5), 4, 8
  train(c, folder / "mixed")
  row = tiny.measured(folder / "mixed")[0]
  # The loss divides the records' KL by the number of all tokens, and the metric by theirs only.
  assert 0 < row["soft"] < 0.9 * row["kl/teacher"]
  assert row["loss"] == pytest.approx(0.7 * row["soft"] + 0.3 * row["ce"], rel=1e-5)
  c.losses = {"soft": config.loss("kd")}
  c.train.records, c.train.mixture = (str(folder / "chats"),), ()
  with pytest.raises(InputError, match="only hold text or labels"):
    train(c, folder / "refused")
