"""Sounds to texts: speech recognition, by Whisper (arXiv:2212.04356, arXiv:2311.00430)."""

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
from distill_jax.errors import InputError
from distill_jax.generation.beam_search import Search
from distill_jax.hub.pretrained import Pretrained
from distill_jax.models import FamilyConfig
from distill_jax.runtime import extras
from distill_jax.tasks import _scores, _seq2seq_targets
from distill_jax.tasks._base import Example, PseudoLabels, Stack, TextTask
from distill_jax.tasks._jsonl_task import BadExamples, JsonlTask, is_text, read_media
from distill_jax.tasks._model_configs import Seq2SeqConfig, SpeechConfig, wrong_kind
from distill_jax.types import JsonObject, Sounds, SourceTarget


class Sound(NamedTuple):
  """A sound's file, the words in it, and the sha256 of the file."""

  file: Path
  text: str
  digest: str


@dataclasses.dataclass(frozen=True)
class Task(JsonlTask, TextTask):
  """Sounds and what is said in them; see JsonlTask for tokenizer and on_bad.

  Attributes:
    path: a .jsonl file, whose wav files are named from its folder on; or a folder of wav files,
      each beside a .txt file of its name. What `generate` has written is such a file.
    audio, text: fields of a line.
    heldout: where the held-out sounds are, as `path`; "": a share `heldout_fraction` of path's, by
      a hash of each text, so that no sentence is on both sides.
    frames, bins: of the model's input: 100 frames a second. A longer sound cannot be used.
    resample: sounds of another rate than 16 kHz are brought to it; else they cannot be used.
    max_tokens: of a text with its end token; a longer one cannot be used.
    prompt: tokens that a text begins with, which are not trained on.
    end: the token that ends a text.
    beams: of what `evaluate` scores and `generate` writes; 1: greedy.
    max_wer: `generate` leaves out outputs with a higher word error rate against the transcript.
    batch_size: sounds that are decoded at once.
  """

  audio: str = "audio"
  text: str = "text"
  heldout: str = ""
  frames: int = 3_000
  bins: int = 80
  resample: bool = True
  max_tokens: int = 128
  prompt: tuple[str, ...] = ("<|startoftranscript|>", "<|notimestamps|>")
  end: str = "<|endoftext|>"
  beams: int = 1
  max_wer: float = 0.1
  batch_size: int = 8

  def __post_init__(self):
    super().__post_init__()
    numbers = (self.frames, self.bins, self.max_tokens, self.beams, self.batch_size)
    if min(numbers) < 1 or not self.prompt:
      raise InputError(
        f"speech has frames {self.frames}, bins {self.bins}, max_tokens {self.max_tokens}, beams "
        f"{self.beams}, batch_size {self.batch_size} and prompt {self.prompt}; each is at least 1"
      )

  @property
  def positions(self) -> int:
    return len(self.prompt) - 1 + self.max_tokens

  def open(self, split: str, pretrained: Pretrained | None) -> TranscribedSounds:
    tokenizer = self.load_tokenizer(pretrained)
    source, bad = self.document_source(split, self.text), self.bad_examples()
    entries: list[tuple[Path, str]] = []
    for name, text, where in read_media(source, self.audio, _wav_files, bad):
      if not is_text(text):
        bad.reject_subject(where, "has no text, or none in UTF-8")
      elif not Path(name).is_file():
        bad.reject_subject(where, f"names no file in its field {self.audio!r}")
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
    """Returns why a sound cannot be used; "" if it can."""
    try:
      samples, rate = mel.read_wav(file)
    except InputError:
      return "is damaged, empty or no wav file of whole numbers"
    if rate != mel.RATE and not self.resample:
      return f"has {rate} samples a second, and resample is False"
    if len(samples) > self.frames * mel.HOP * rate / mel.RATE:
      return f"is longer than {self.frames} frames"
    return ""

  def inputs(self, stack: Stack) -> SourceTarget:
    mel_BSM: Any = stack("mel_SM")
    return SourceTarget(Sounds(mel_BSM), _seq2seq_targets.target_inputs(stack))

  def check(self, config: FamilyConfig) -> None:
    if not isinstance(config, SpeechConfig):
      raise wrong_kind(self.kind, "a model of sounds, such as whisper", config)
    want = config.num_mel_bins, 2 * config.max_source_positions
    if (self.bins, self.frames) != want:
      raise InputError(
        f"speech has {self.bins} bins and {self.frames} frames and the model reads {want[0]} and "
        f"{want[1]}; set them alike"
      )
    if (n := self.positions) > config.max_target_positions:
      raise InputError(
        f"speech outputs up to {n} tokens, its prompt among them, and the model at most "
        f"{config.max_target_positions}; lower max_tokens"
      )
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
      # generation_config.json is another program's file: a key may be missing or null.
      suppress=tuple(generation.get("suppress_tokens") or ()),
      suppress_first=tuple(generation.get("begin_suppress_tokens") or ()),
    )

  def scores(self, outputs: Sequence[str], source: TranscribedSounds) -> dict[str, float]:
    return _scores.word_error_rate(outputs, source.texts[: len(outputs)])

  def pseudo_labels(self, outputs: Sequence[str], source: TranscribedSounds) -> PseudoLabels:
    """Returns the outputs as texts, but those above `max_wer`: Distil-Whisper's filter."""
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
  """A TaskSource of sounds in the order of the file, which are read when they are asked for.

  Attributes:
    files, texts: of each.
    tokenizer: of the texts.
    prompt, eos: the tokens that a text begins and ends with.
  """

  def __init__(self, task: Task, sounds: Sequence[Sound], tokenizer: Tokenizer, bad: BadExamples):
    self._task, self.tokenizer = task, tokenizer
    self.classes, self.positions = tokenizer.vocab_size, task.positions
    self.prompt = [_seq2seq_targets.token_id(task.kind, tokenizer, t) for t in task.prompt]
    self.eos = _seq2seq_targets.token_id(task.kind, tokenizer, task.end)
    self.files: list[Path] = []
    self.texts: list[str] = []
    self._ids: list[list[int]] = []
    digests = []
    # A text begins with a space, as Whisper was trained.
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
