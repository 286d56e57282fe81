"""Tests of translation: pairs, an encoder-decoder from record to export, its outputs."""

import json

import jax
import numpy as np
import pytest
import tiny_run
from json_lines import read_lines
from tiny_seq2seq_tasks import EOS, PAD, record_and_train, two_steps, write_tokenizer

from distill_jax import config
from distill_jax.commands import evaluate, export, generate
from distill_jax.data import tokenizers as ours
from distill_jax.errors import InputError
from distill_jax.models import t5
from distill_jax.report import examples
from distill_jax.runtime import extras
from distill_jax.runtime.workdir import Workdir
from distill_jax.tasks import _scores, dataset, translation


def write_pairs(path, n=24):
  lines = [{"en": f"no {i}", "de": f"Nr. {i}"} for i in range(n)]
  path.write_text("\n".join(map(json.dumps, lines)))
  return str(path)


def task(folder, **changes):
  fields = {
    "path": write_pairs(folder / "pairs.jsonl"),
    "source": "en",
    "target": "de",
    "source_len": 8,
    "target_len": 10,
    "heldout_fraction": 0.3,
    "beams": 2,
    "batch_size": 4,
    "tokenizer": write_tokenizer(folder / "tokenizer.json"),
    **changes,
  }
  return config.task("translation", **fields)


def configured(folder):
  c = two_steps(folder, "t5", num_decoder_layers=1, num_layers=1)
  c.tasks.main = task(folder)
  c.data.tokenizer = c.tasks.main.tokenizer
  c.records.kind, c.records.n, c.records.batch_size = "topk", 4, 4
  c.losses.soft = config.loss("kd", weight=0.7)
  c.losses.hard = config.loss("ce", weight=0.3)
  return c


@pytest.mark.slow
def test_from_record_to_export(tmp_path, capsys):
  """The exported model has the same cross-entropy in transformers as in `evaluate`."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  c = configured(tmp_path)
  c.evaluate.models = {"student": f"run:{tmp_path / 'student'}"}
  c.export.dir, c.export.dtype = str(tmp_path / "hub"), "float32"
  resolved, last = record_and_train(c, tmp_path)
  assert 0 < last["kl/teacher"] < 10
  rows = evaluate.run(resolved, tmp_path)["models"]
  shown = examples.read(tmp_path).generations
  assert len(shown) == 3 and set(shown[0].texts) == {"teacher", "start", "student"}
  assert shown[0].prompt and shown[0].reference
  if extras.not_installed("sacrebleu"):
    skipped = "Skipping bleu and chrf. sacrebleu is not installed; expected the packages of the "
    assert skipped + "extra 'text'." in capsys.readouterr().err
  else:
    assert all(0 <= rows[m]["bleu"] <= 100 for m in ("teacher", "start", "student"))

  export.run(resolved, tmp_path / "student")
  theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "hub").eval()
  held = dataset.open_examples(resolved, "main", "heldout", None)
  read, seen, decoder_inputs, labels, mask = (
    torch.tensor(np.stack([r[k] for r in held])).long()
    for k in ("tokens_S", "valid_S", "decoder_tokens_T", "labels_T", "mask_T")
  )
  with torch.no_grad():
    z = theirs(input_ids=read, attention_mask=seen, decoder_input_ids=decoder_inputs).logits
  ce = torch.nn.functional.cross_entropy(z[mask > 0], labels[mask > 0])
  assert rows["student"]["ce"] == pytest.approx(float(ce), rel=2e-6)  # float32


def test_features_of_a_decoder_are_compared_at_its_labels(tmp_path):
  """The loss of hidden states is that of its formula, at the positions of the target text."""
  c = configured(tmp_path)
  c.train.records, c.train.online = (), True
  for model in (c.teacher, c.student):
    model.changes["num_decoder_layers"] = 2
  c.losses = {
    "hidden": config.loss("hidden", layers="0:0"),
    "relations": config.loss("relations", layers="1:1"),
    "relational": config.loss("relational", layers="0:0", tokens=4),
  }
  step, student, teacher, batch = tiny_run.step_of(config.resolve(c), t5.Model)
  _, metrics = jax.jit(step)(step.init(student), batch, {"teacher": teacher})
  tapped = jax.jit(lambda m: m(batch.inputs, step.student, (0,)).taps_PBTD[0])
  s, t = (np.asarray(tapped(m), np.float64) for m in (student, teacher))
  mask = np.asarray(batch.mask_BT)
  want = np.mean((np.sum((s - t) ** 2, -1) / np.sum(t**2, -1))[mask])
  assert metrics["hidden"] == pytest.approx(want, rel=1e-6)  # float32
  assert 0 < mask.sum() < mask.size
  assert metrics["relations"] > 0 and metrics["relational"] > 0


def test_generate_writes_pairs_in_the_format_of_the_task(tmp_path):
  c = configured(tmp_path)
  with Workdir(tmp_path / "texts", config.resolve(c)) as folder:
    made = generate.run(config.resolve(c), folder)
  lines = read_lines(tmp_path / "texts/pairs.jsonl")
  source = config.resolve(c).tasks["main"].open("train", None)
  assert made["kept"] == len(lines) and made["kept"] + made["left_out"] == len(source)
  wanted = dict(source.pairs)
  assert all(wanted[line["en"]] == line["reference"] for line in lines)
  c.tasks.main.path = str(tmp_path / "texts/pairs.jsonl")
  c.tasks.main.heldout, c.tasks.main.on_bad = str(tmp_path / "pairs.jsonl"), "skip"
  c.tasks.main.target_len = 40  # random bytes are tokenized differently after decoding
  again = config.resolve(c).tasks["main"].open("train", None)
  assert 0 < len(again) <= len(lines)
  assert len(config.resolve(c).tasks["main"].open("heldout", None)) == 24


def test_an_example_has_teacher_forcing_inputs_and_labels(tmp_path):
  resolved = config.resolve(configured(tmp_path))
  source = resolved.tasks["main"].open("train", None)
  tokenizer = ours.load_tokenizer(tmp_path / "tokenizer.json")
  for i in (0, len(source) - 1):
    en, de = source.pairs[i]
    row, n = source[i], len(de) + 1
    assert row["tokens_S"].tolist() == [*tokenizer.encode(en), EOS] + [0] * (7 - len(en))
    assert row["valid_S"].sum() == len(en) + 1
    assert row["labels_T"][:n].tolist() == [*tokenizer.encode(de), EOS]
    assert row["decoder_tokens_T"][:n].tolist() == [PAD, *tokenizer.encode(de)]
    assert row["mask_T"].tolist() == [True] * n + [False] * (10 - n)
  held = resolved.tasks["main"].open("heldout", None)
  assert not {a for a, _ in held.pairs} & {a for a, _ in source.pairs}
  assert len(held) + len(source) == 24


BAD = [
  ({"en": "one", "de": " "}, "line 25 has no text in its field 'de'"),
  ({"de": "eins"}, "line 25 has no text in its field 'en'"),
  ({"en": "much too long", "de": "zu lang"}, "line 25 has more than 8 tokens in 'en'"),
  ({"en": "no", "de": "viel zu lang"}, "line 25 has more than 10 tokens in 'de'"),
]


@pytest.mark.parametrize("line, why", BAD)
def test_a_bad_pair_stops_the_run_or_is_counted(tmp_path, capsys, line, why):
  c = config.base()
  c.tasks.main = task(tmp_path, heldout_fraction=0.0)
  with (tmp_path / "pairs.jsonl").open("a") as f:
    f.write("\n" + json.dumps(line))
  with pytest.raises(InputError, match=why):
    config.resolve(c).tasks["main"].open("train", None)
  c.tasks.main.on_bad = "skip"
  assert len(config.resolve(c).tasks["main"].open("train", None)) == 24
  assert "1 of 25 examples skipped" in capsys.readouterr().err


@pytest.mark.parametrize("raw", [b'{"en": "\xff"}', b"[1]", b"{", b'{"en": "a", "de": "\\ud800"}'])
def test_a_line_without_a_pair_stops_the_run_or_is_counted(tmp_path, raw):
  c = config.base()
  c.tasks.main = task(tmp_path, heldout_fraction=0.0)
  with (tmp_path / "pairs.jsonl").open("ab") as f:
    f.write(b"\n" + raw)
  with pytest.raises(
    InputError, match="pairs.jsonl, line 25 (is not JSON|is not a JSON object|has no text)"
  ):
    config.resolve(c).tasks["main"].open("train", None)
  c.tasks.main.on_bad = "skip"
  assert len(config.resolve(c).tasks["main"].open("train", None)) == 24


def test_a_model_that_cannot_translate_is_refused(tmp_path):
  from distill_jax.models import llama, marian, t5

  c = config.base()
  c.tasks.main = task(tmp_path)
  of = config.resolve(c).tasks["main"]
  with pytest.raises(
    InputError, match=r"needs an encoder-decoder of texts, e\.g\. t5, .*of the family llama"
  ):
    of.check(llama.TINY)
  with pytest.raises(
    InputError, match="starts texts with token 256, but the model's decoder_start_token_id is 0"
  ):
    of.check(t5.TINY)
  with pytest.raises(InputError, match="source_len is 129; expected at most 128"):
    translation.Task(source_len=129).check(marian.TINY)
  with pytest.raises(InputError, match="beams is 0; expected at least 1"):
    translation.Task(beams=0)


def test_scores_are_those_of_the_packages():
  pytest.importorskip("sacrebleu", reason="pip install sacrebleu")
  same = ["the cat sat on the mat today", "another line of five words"]
  assert _scores.bleu_and_chrf(same, same) == {"bleu": pytest.approx(100), "chrf": 100}
  assert _scores.bleu_and_chrf(["x", "y"], same)["bleu"] < 5
