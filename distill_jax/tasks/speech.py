"""Speech recognition, with Whisper (arXiv:2212.04356) and Distil-Whisper (arXiv:2311.00430)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from distill_jax.data import mel, sources
from distill_jax.data.tokenizers import Tokenizer, load_tokenizer
from distill_jax.errors import InputError, bad_value
from distill_jax.generation.beam_search import Search
from distill_jax.hub.pretrained import Pretrained
from distill_jax.models import FamilyConfig
from distill_jax.runtime import extras
from distill_jax.tasks import _scores, _seq2seq_targets
from distill_jax.tasks._base import Example, PseudoLabels, Stack, TextTask
from distill_jax.tasks._jsonl_task import BadExamples, JsonlTask, is_text, read_media
from distill_jax.tasks._model_configs import (
  Seq2SeqConfig,
  SpeechConfig,
  check_as_in_model,
  wrong_kind,
)
from distill_jax.types import JsonObject, Sounds, SourceTarget


class Sound(NamedTuple):
  """An audio file, its transcript, and the sha256 of the file."""

  file: Path
  text: str
  digest: str


@dataclasses.dataclass(frozen=True)
class Task(JsonlTask, TextTask):
  """Transcription of audio files."""

  path: str = ""
  """A .jsonl file, or a folder of wav files.

  A .jsonl file names wav files relative to its own folder; `generate` writes such a file. In a
  folder of wav files, the transcript of x.wav is in x.txt.
  """
  audio: str = "audio"
  """Name of the .jsonl field with the wav file's name."""
  text: str = "text"
  """Name of the .jsonl field with the transcript."""
  heldout: str = ""
  """Path of the held-out examples, in the format of `path`.

  "" holds out a fraction `heldout_fraction` of `path`, chosen by a hash of each transcript, so that
  a sentence is never in both splits.
  """
  frames: int = 3_000
  """Number of frames of the model's input, 100 per second. Longer audio cannot be used."""
  bins: int = 80
  """Number of mel bins of the model's input."""
  resample: bool = True
  """True to resample audio to 16 kHz; False to treat other sample rates as unusable."""
  max_tokens: int = 128
  """Maximum number of tokens of a transcript, with its end token. Longer ones cannot be used."""
  prompt: tuple[str, ...] = ("<|startoftranscript|>", "<|notimestamps|>")
  """Tokens that every text begins with. They are not trained on."""
  end: str = "<|endoftext|>"
  """The end token of texts."""
  beams: int = 1
  """Number of beams in `evaluate` and `generate`; 1 for greedy decoding."""
  max_wer: float = 0.1
  """Word error rate against the transcript above which `generate` rejects an output."""
  batch_size: int = 8
  """Number of audio files that are decoded at once."""

  def __post_init__(self):
    super().__post_init__()
    for key in ("frames", "bins", "max_tokens", "beams", "batch_size"):
      if (value := getattr(self, key)) < 1:
        raise bad_value(key, value, "at least 1", "Raise it")
    if not self.prompt:
      raise bad_value("prompt", self.prompt, "one token or more", "Name the start token")

  @property
  def positions(self) -> int:
    """Number of positions of the decoder: the prompt, except its last token, and the text."""
    return len(self.prompt) - 1 + self.max_tokens

  def open(self, split: str, pretrained: Pretrained | None) -> TranscribedSounds:
    tokenizer = self.load_tokenizer(pretrained)
    source, bad = self.document_source(split, self.text), self.bad_examples()
    entries: list[tuple[Path, str]] = []
    for name, text, where in read_media(source, self.audio, _wav_files, bad):
      if not is_text(text):
        bad.reject_subject(where, "has no text in UTF-8")
      elif not Path(name).is_file():
        bad.reject_subject(where, f"has no existing file in its field {self.audio!r}")
      elif sources.in_split(text, source):
        entries.append((Path(name), text))
    with ThreadPoolExecutor(8) as pool:
      defects = list(pool.map(self._defect, (file for file, _ in entries)))
    sounds = []
    for (file, text), defect in zip(entries, defects, strict=True):
      if defect:
        bad.reject_subject(str(file), defect)
      else:
        sounds.append(Sound(file, text, hashlib.sha256(file.read_bytes()).hexdigest()))
    return TranscribedSounds(self, sounds, tokenizer, bad)

  def _defect(self, file: Path) -> str:
    """Returns the reason why an audio file cannot be used; "" if it can."""
    try:
      samples, rate = mel.read_wav(file)
    except InputError:
      return "is damaged, empty or not a wav file of integers"
    if rate != mel.RATE and not self.resample:
      return f"has {rate} samples per second, and resample is False"
    if len(samples) > self.frames * mel.HOP * rate / mel.RATE:
      return f"is longer than {self.frames} frames"
    return ""

  def inputs(self, stack: Stack) -> SourceTarget:
    mel_BSM: Any = stack("mel_SM")
    return SourceTarget(Sounds(mel_BSM), _seq2seq_targets.target_inputs(stack))

  def check(self, config: FamilyConfig) -> None:
    if not isinstance(config, SpeechConfig):
      raise wrong_kind(self.kind, "a speech model, e.g. whisper", config)
    check_as_in_model(self.kind, "bins", self.bins, config.num_mel_bins)
    check_as_in_model(self.kind, "frames", self.frames, 2 * config.max_source_positions)
    if self.positions > (limit := config.max_target_positions):
      most = limit - (len(self.prompt) - 1)
      expected = f"at most {most}, because the model outputs up to {limit} tokens with the prompt"
      raise bad_value(f"{self.kind}.max_tokens", self.max_tokens, expected, "Lower it")
    if self.tokenizer:
      start = _seq2seq_targets.token_id(self.kind, load_tokenizer(self.tokenizer), self.prompt[0])
      _seq2seq_targets.check_start(self.kind, start, config)

  def hub_files(self, config: FamilyConfig) -> JsonObject:
    del config
    return {
      "preprocessor_config.json": {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": self.bins,
        "sampling_rate": mel.RATE,
        "hop_length": mel.HOP,
        "n_fft": mel.WINDOW,
        "chunk_length": self.frames // 100,
        "nb_max_frames": self.frames,
        "n_samples": self.frames * mel.HOP,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
      }
    }

  def search(
    self, config: Seq2SeqConfig, source: TranscribedSounds, generation: JsonObject
  ) -> Search:
    return Search(
      tuple(source.prompt),
      source.eos,
      config.pad_token_id,
      self.max_tokens,
      self.beams,
      # In generation_config.json keys may be missing or null.
      suppress=tuple(generation.get("suppress_tokens") or ()),
      suppress_first=tuple(generation.get("begin_suppress_tokens") or ()),
    )

  def scores(self, outputs: Sequence[str], source: TranscribedSounds) -> dict[str, float]:
    return _scores.word_error_rate(outputs, source.texts[: len(outputs)])

  def shown(self, source: TranscribedSounds, count: int) -> list[tuple[str, str]]:
    names = (Path(file).name for file in source.files)
    return list(zip(names, source.texts[:count], strict=False))

  def pseudo_labels(self, outputs: Sequence[str], source: TranscribedSounds) -> PseudoLabels:
    """Returns the outputs with a word error rate of at most `max_wer`, as in Distil-Whisper.

    Raises:
      InputError: A package for the word error rate is not installed.
    """
    if packages := extras.not_installed(*_scores.WORD_ERROR_PACKAGES):
      raise extras.missing(packages[0], "text")
    errors = _scores.word_errors(outputs, source.texts)
    lines = [
      {
        self.audio: str(file.absolute()),
        self.text: output,
        "reference": transcript,
        "wrong": error.wrong,
      }
      for output, transcript, file, error in zip(
        outputs, source.texts, source.files, errors, strict=True
      )
      if output.strip() and error.wrong <= self.max_wer * error.words
    ]
    return PseudoLabels(lines, len(outputs) - len(lines))


def _wav_files(folder: Path) -> list[Path]:
  return sorted(folder.glob("*.wav"))


class TranscribedSounds:
  """A TaskSource of transcribed audio in the order of the file. Audio is read on access.

  Attributes:
    files: The audio files.
    texts: Their transcripts.
    tokenizer: The tokenizer.
    prompt: Ids of the tokens that a text begins with.
    eos: Id of the end token.
  """

  def __init__(self, task: Task, sounds: Sequence[Sound], tokenizer: Tokenizer, bad: BadExamples):
    self._task, self.tokenizer = task, tokenizer
    self.classes = self.token_rows = tokenizer.vocab_size
    self.positions = task.positions
    self.prompt = [_seq2seq_targets.token_id(task.kind, tokenizer, t) for t in task.prompt]
    self.eos = _seq2seq_targets.token_id(task.kind, tokenizer, task.end)
    self.files: list[Path] = []
    self.texts: list[str] = []
    self._ids: list[list[int]] = []
    digests = []
    # Whisper was trained on texts that begin with a space.
    encoded = tokenizer.encode_batch([" " + sound.text.strip() for sound in sounds])
    for sound, ids in zip(sounds, encoded, strict=True):
      if len(ids) + 1 > task.max_tokens:
        bad.reject_subject(str(sound.file), f"has a text of more than {task.max_tokens} tokens")
        continue
      self.files.append(sound.file)
      self.texts.append(sound.text)
      self._ids.append(ids)
      digests.append(sound.digest)
    bad.finish(len(self.files))
    data = hashlib.sha256(json.dumps([self._ids, self.prompt, self.eos, digests]).encode())
    data.update(tokenizer.digest.encode())
    self.digest = data.hexdigest()

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, i: int) -> Example:
    samples, rate = mel.read_wav(self.files[i])
    frames = mel.log_mel(mel.resampled(samples, rate), self._task.frames, self._task.bins)
    fields = _seq2seq_targets.target_fields(self.prompt, self._ids[i], self.eos, self.positions)
    return {"mel_SM": frames, **fields}
