"""Tests of speech: wav files, Whisper from record to export, pseudo-labels, bad audio."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from json_lines import read_lines
from tiny_seq2seq_tasks import IDS, record_and_train, two_steps, write_tokenizer
from tiny_sounds import write_wav

from distill_jax import config
from distill_jax.commands import evaluate, export, generate
from distill_jax.errors import InputError
from distill_jax.models import loading, runs, t5, whisper
from distill_jax.nn import params, sharding
from distill_jax.report import examples
from distill_jax.runtime import extras
from distill_jax.runtime.workdir import Workdir
from distill_jax.tasks import _scores, dataset
from distill_jax.training import loop

FRAMES, RATE = 32, 8_000  # frames of the tiny Whisper; sample rate of the files
WORDS = ("yes", "no", "three", "four", "up", "down")


def write_sounds(folder):
  """Writes wav files of tones with one word each, and the .jsonl file."""
  folder.mkdir()
  lines = []
  for i in range(18):
    t = np.arange(RATE // 4) / RATE
    write_wav(folder / f"{i}.wav", 0.5 * np.sin(2 * np.pi * (200 + 90 * i) * t), RATE)
    lines.append({"audio": f"{i}.wav", "text": f"{WORDS[i % 6]} {i}"})
  (folder / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
  return str(folder / "all.jsonl")


def configured(folder):
  c = two_steps(folder, "whisper", decoder_layers=1, encoder_layers=1)
  c.tasks.main = config.task(
    "speech",
    path=write_sounds(folder / "sounds"),
    frames=FRAMES,
    bins=8,
    max_tokens=12,
    prompt=("<pad>",),
    end="</s>",
    tokenizer=write_tokenizer(folder / "tokenizer.json"),
    heldout_fraction=0.3,
    batch_size=4,
    max_wer=10.0,
  )
  c.data.tokenizer = c.tasks.main.tokenizer
  c.records.n, c.records.batch_size = 7, 4
  c.losses.soft = config.loss("kd", weight=0.8)
  c.losses.hard = config.loss("ce", weight=1.0)
  return c


@pytest.mark.slow
def test_from_record_to_export(tmp_path, capsys):
  """The exported model has the same cross-entropy in transformers, with its feature extractor."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  c = configured(tmp_path)
  c.evaluate.models = {"student": f"run:{tmp_path / 'student'}"}
  c.export.dir, c.export.dtype = str(tmp_path / "hub"), "float32"
  resolved, last = record_and_train(c, tmp_path)
  assert 0 < last["kl/teacher"] < 10
  row = evaluate.run(resolved, tmp_path)["models"]["student"]
  shown = examples.read(tmp_path).generations
  assert len(shown) == 3 and set(shown[0].texts) == {"teacher", "start", "student"}
  assert shown[0].prompt and shown[0].reference
  if extras.not_installed("jiwer"):
    skipped = "Skipping wer. jiwer is not installed; expected the packages of the extra 'text'."
    assert skipped in capsys.readouterr().err
  else:
    assert row["wer"] >= 0

  export.run(resolved, tmp_path / "student")
  theirs = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "hub").eval()
  hub = json.loads((tmp_path / "hub/preprocessor_config.json").read_text())
  assert hub["feature_extractor_type"] == "WhisperFeatureExtractor" and hub["feature_size"] == 8
  held = dataset.open_examples(resolved, "main", "heldout", None)
  rows = [held[i] for i in range(len(held))]
  mel, read, labels, mask = (
    torch.tensor(np.stack([r[k] for r in rows]))
    for k in ("mel_SM", "decoder_tokens_T", "labels_T", "mask_T")
  )
  with torch.no_grad():
    z = theirs(input_features=mel.mT, decoder_input_ids=read.long()).logits
  ce = torch.nn.functional.cross_entropy(z[mask], labels[mask].long())
  assert row["ce"] == pytest.approx(float(ce), rel=2e-6)  # float32


@pytest.mark.slow
def test_a_frozen_encoder_does_not_change(tmp_path):
  """The encoder is frozen, also for weight decay, as in Distil-Whisper; the decoder changes."""
  c = configured(tmp_path)
  c.train.records, c.losses = (), {"hard": config.loss("ce")}
  c.student.train, c.student.frozen = "frozen", ("model.encoder.",)
  c.train.steps = 1
  resolved = config.resolve(c)
  with Workdir(tmp_path / "student", resolved) as folder:
    loop.train(resolved, folder)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  spec = dataclasses.replace(resolved.student, source=f"run:{tmp_path / 'student'}", changes={})
  before, after = (
    dict(params.named_params(loading.open_source(s).load(mesh, runs.keys(0)["student"]).model))
    for s in (resolved.student, spec)
  )
  for path, v in before.items():
    same = np.array_equal(v[...], after[path][...])
    assert same == v.get_metadata()["hf"].startswith("model.encoder."), path


def test_generate_writes_pseudo_labels_in_the_format_of_the_task(tmp_path):
  pytest.importorskip("jiwer", reason="pip install jiwer")
  pytest.importorskip("transformers")
  c = configured(tmp_path)
  with Workdir(tmp_path / "texts", config.resolve(c)) as folder:
    made = generate.run(config.resolve(c), folder)
  lines = read_lines(tmp_path / "texts/pairs.jsonl")
  source = config.resolve(c).tasks["main"].open("train", None)
  assert made["kept"] == len(lines) and made["kept"] + made["left_out"] == len(source)
  assert made["wer"] > 0
  assert {line["reference"] for line in lines} <= set(source.texts)
  # The outputs of a random model have a word error rate of at least 1.
  c.tasks.main.max_wer = 0.0
  with pytest.raises(InputError, match="outputs for the task 'main' are rejected"):
    generate.run(config.resolve(c), tmp_path)


def test_word_errors_are_those_of_whispers_normaliser():
  pytest.importorskip("jiwer", reason="pip install jiwer")
  pytest.importorskip("transformers")
  outputs = ["Please press one, now.", "it's mister smith", "[beep]"]
  wanted = ["please press 1 now", "It is Mr. Smith!", "hello there"]
  assert _scores.word_errors(outputs, wanted) == [(0, 4), (0, 4), (2, 2)]
  assert _scores.word_error_rate(outputs, wanted) == {"wer": 0.2}
  assert _scores.word_errors(["well"], ["[laughs]"]) == [(1, 0)]


def test_an_example_has_frames_and_teacher_forcing(tmp_path):
  source = config.resolve(configured(tmp_path)).tasks["main"].open("train", None)
  row, n = source[0], len(source.texts[0]) + 1  # the space before it
  assert row["mel_SM"].shape == (FRAMES, 8) and row["mel_SM"].dtype == np.float32
  assert row["mask_T"].sum() == n + 1
  assert (
    row["labels_T"][n] == IDS["eos_token_id"] and row["decoder_tokens_T"][0] == IDS["pad_token_id"]
  )
  held = config.resolve(configured_again(tmp_path)).tasks["main"].open("heldout", None)
  assert not set(held.texts) & set(source.texts) and len(held) + len(source) == 18


def configured_again(tmp_path):
  (tmp_path / "again").mkdir()
  return configured(tmp_path / "again")


def test_the_prompt_is_not_trained_on(tmp_path):
  c = configured(tmp_path)
  c.tasks.main.prompt = ("<pad>", "</s>")
  row = config.resolve(c).tasks["main"].open("train", None)[0]
  assert row["decoder_tokens_T"][:2].tolist() == [IDS["pad_token_id"], IDS["eos_token_id"]]
  assert row["mask_T"][:2].tolist() == [False, True]


SPOILT = {
  "damaged": (lambda p: p.write_bytes(p.read_bytes()[:-99]), "0.wav is damaged, empty"),
  "empty": (lambda p: p.write_bytes(b""), "0.wav is damaged, empty"),
  "no wav": (lambda p: p.write_text("hello"), "0.wav is damaged, empty"),
  "missing": (lambda p: p.unlink(), "line 1 has no existing file in its field"),
  "long": (
    lambda p: write_wav(p, np.zeros(9000, np.float32), RATE),
    "longer than 32 frames",
  ),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_bad_audio_file_stops_the_run_or_is_counted(tmp_path, capsys, kind):
  spoil, why = SPOILT[kind]
  c = configured(tmp_path)
  c.tasks.main.heldout_fraction = 0.0
  spoil(tmp_path / "sounds/0.wav")
  with pytest.raises(InputError, match=why):
    config.resolve(c).tasks["main"].open("train", None)
  c.tasks.main.on_bad = "skip"
  assert len(config.resolve(c).tasks["main"].open("train", None)) == 17
  assert "1 of 18 examples skipped" in capsys.readouterr().err


def test_unsuitable_models_texts_and_sample_rates_are_refused(tmp_path):
  c = configured(tmp_path)
  of = config.resolve(c).tasks["main"]
  with pytest.raises(InputError, match=r"needs a speech model, e\.g\. whisper, .*of the family t5"):
    of.check(t5.TINY)
  with pytest.raises(InputError, match="speech.bins is 8; expected 80, as in the model"):
    of.check(whisper.CONFIGS["whisper-tiny.en"])
  with pytest.raises(
    InputError, match="starts texts with token 256, but the model's decoder_start_token_id is 2"
  ):
    of.check(whisper.TINY)
  c.tasks.main.max_tokens = 3
  with pytest.raises(InputError, match="has a text of more than 3 tokens"):
    config.resolve(c).tasks["main"].open("train", None)
  c.tasks.main.resample = False
  with pytest.raises(InputError, match="has 8000 samples per second, and resample is False"):
    config.resolve(c).tasks["main"].open("train", None)


def test_a_folder_of_wav_and_text_files_is_read(tmp_path):
  c = configured(tmp_path)
  for i in range(18):
    (tmp_path / f"sounds/{i}.txt").write_text(f"{WORDS[i % 6]} {i}\n")
  (tmp_path / "sounds/all.jsonl").unlink()
  c.tasks.main.path, c.tasks.main.heldout_fraction = str(tmp_path / "sounds"), 0.0
  assert len(config.resolve(c).tasks["main"].open("train", None)) == 18
