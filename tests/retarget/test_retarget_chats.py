"""`retarget` of chats: turns between the texts of the student's chat template."""

import json
import shutil

import chats
import numpy as np
import pytest
import retarget_runs
import small_tokenizers
from retarget_runs import N, made, run

from distill_jax.cross_tokenizer.align import CHANGED, FORM
from distill_jax.data.chat_template import ChatTemplate
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError
from distill_jax.hub.tokenizer import read_tokenizer
from distill_jax.records.store import open_store

pytestmark = pytest.mark.smoke
T = 96
LLAMA = chats.LLAMA.replace(" | trim }}{%", " }}{%")
CHATS = [
  [chats.user("Is 12 times 7 84?"), chats.reply("Fine é漢😀!")],
  [*chats.TWO[:2], chats.user("12"), chats.reply("the other one")],
  [{"role": "system", "content": "the theme"}, chats.user("a"), chats.reply("def f(x):\n  x")],
  [chats.user(" then "), chats.reply("b")],  # the student's template strips the question
]


def write_model(folder, source, size, **added):
  """Writes a tokenizer with a chat template."""
  folder.mkdir(parents=True)
  tokenizer = small_tokenizers.byte_level(size, special=chats.SPECIAL, **added)
  (folder / "tokenizer.json").write_bytes(tokenizer.raw)
  named = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
  (folder / "tokenizer_config.json").write_text(json.dumps(named | {"chat_template": source}))
  return folder


def template(folder):
  return ChatTemplate.of(read_tokenizer(folder), "m")


def records(folder, messages):
  """Returns records of which half of the samples are the label, and half the end of a text."""
  tokenizer, out = load_tokenizer(folder), []
  for chat in messages:
    ids, mask = template(folder).tokens_and_mask(tokenizer, chat)
    pad = T - len(ids)
    tokens_T = np.array(ids + [0] * pad, np.int32)
    label_T = np.append(tokens_T[1:], 0)
    ids_TN = np.tile(label_T[:, None], N)
    ids_TN[:, N // 2 :] = tokenizer.token_id("</s>")
    row = {
      "tokens_T": tokens_T,
      "segments_T": (np.arange(T) < len(ids)).astype(np.int32),
      "mask_T": np.append(mask[1:] + [False] * pad, False),
      "ids_TN": np.sort(ids_TN, 1).astype(np.int32),
      "argmax_T": label_T,
      "entropy_T": np.ones(T, np.float32),
      "label_logp_T": np.full(T, np.log((N // 2) / N), np.float32),
    }
    out.append(row)
  return out


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp("chats")
  teacher = write_model(folder / "teacher.json", chats.CHATML, 420)
  write_model(folder / "student.json", LLAMA, 330)
  retarget_runs.write_store(folder / "records", teacher, records(teacher, CHATS), seq_len=T)
  return folder


def converted(source, out, **options):
  c = made(source, **options)
  c.data.kind, c.data.path = "chat", "unused.jsonl"
  return run(c, out)


def test_chats_get_the_students_form(source, tmp_path):
  summary = converted(source, tmp_path)
  store, folder = open_store(tmp_path), source / "student.json"
  tokenizer = load_tokenizer(folder)
  for i, chat in enumerate(CHATS[:3]):
    row = store[i]
    marked = template(folder).mark(tokenizer, chat)
    text = marked.text.replace(marked.text.split("Today: ")[1].split("\n")[0], "01 Jan 2025")
    assert row["tokens_T"][row["segments_T"] > 0].tolist() == tokenizer.encode(text)
    contents = [m["content"] + "<|eot|>" for m in chat if m["role"] == "assistant"]
    labels = row["tokens_T"][1:][row["mask_T"][:-1]].tolist()
    assert tokenizer.decode(labels) == "".join(contents)
    # The teacher's other stop token ends the student's turn.
    at = np.flatnonzero(row["mask_T"])
    end = tokenizer.token_id("<|eot|>")
    ended = ((row["ids_TK"] == end) * row["weight_TK"])[at].sum(1)
    is_end = np.array(labels) == end
    np.testing.assert_allclose(ended[is_end], 1, atol=1e-6)
    begins = np.append(True, is_end[:-1])  # elsewhere, tokens may begin inside of the teacher's
    np.testing.assert_allclose(ended[begins], 1 - (N // 2) / N, atol=1e-6)
  assert not store[3]["mask_T"].any() and not store[3]["segments_T"].any()
  assert summary[f"skipped.{CHANGED}"] == 1


def test_the_same_template_gives_the_same_rows(source, tmp_path):
  """With another tokenizer of the same tokens, contents are found again, token for token."""
  folder = tmp_path / "same"
  shutil.copytree(source, folder)
  shutil.rmtree(folder / "student.json")
  write_model(folder / "student.json", chats.CHATML, 420, literal=["<another>"])
  converted(folder, tmp_path / "out", seq_len=T)
  end = load_tokenizer(folder / "student.json").token_id("<|im_end|>")
  before, after = open_store(folder / "records"), open_store(tmp_path / "out")
  for i in range(len(CHATS)):
    for key in ("tokens_T", "segments_T", "mask_T", "argmax_T", "label_logp_T"):
      used = slice(None)
      if key in ("argmax_T", "label_logp_T"):  # at the end of a turn, all samples are the label now
        used = before[i]["mask_T"] & (np.append(before[i]["tokens_T"][1:], 0) != end)
      np.testing.assert_array_equal(before[i][key][used], after[i][key][used], err_msg=key)


def test_chats_of_another_form_are_refused(source, tmp_path):
  with pytest.raises(InputError, match="None of the 4 texts .* set retarget.chat for chats"):
    run(made(source), tmp_path / "a")  # as texts without a form
  folder = tmp_path / "other"
  shutil.copytree(source, folder)
  config = folder / "teacher.json" / "tokenizer_config.json"
  config.write_text(config.read_text().replace("|im_start|", "|header|"))
  with pytest.raises(InputError, match=f"4 are skipped with the reason {FORM!r}"):
    converted(folder, tmp_path / "b")
  config.write_text("{}")
  with pytest.raises(InputError, match="has no chat template"):
    converted(folder, tmp_path / "c")


def test_generated_chats_are_named_by_an_option(source, tmp_path):
  converted(source, tmp_path / "a")
  run(made(source, chat=True), tmp_path / "b")
  rows = [open_store(tmp_path / name)[0]["tokens_T"] for name in "ab"]
  np.testing.assert_array_equal(*rows)
