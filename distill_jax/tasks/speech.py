"""Sounds to texts: speech recognition, by Whisper (arXiv:2212.04356, arXiv:2311.00430)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.data import mel, sources
from distill_jax.data.tokenizers import Tokenizer, load_tokenizer
from distill_jax.errors import InputError
from distill_jax.generation.beam_search import Search
from distill_jax.tasks import _scores, _seq2seq_targets, _texts
from distill_jax.tasks._skipped import LeftOut, check_on_bad
from distill_jax.types import Sounds, SourceTarget


@dataclasses.dataclass(frozen=True)
class Task:
  """Sounds and what is said in them.

  Attributes:
    path: a .jsonl file, whose wav files are named from its folder on; or a folder of wav files,
      each beside a .txt file of its name. What `generate` has written is such a file.
    audio, text: fields of a line.
    heldout: where the held-out sounds are, as `path`; "": a share `heldout_fraction` of path's, by
      a hash of each text, so that no sentence is on both sides.
    frames, bins: of what the model reads: 100 frames a second. A longer sound cannot be used.
    resample: sounds of another rate than 16 kHz are brought to it; else they cannot be used.
    max_tokens: of a text with its end token; a longer one cannot be used.
    prompt: tokens that a text begins with, which nobody learns; end: the token that ends it.
    tokenizer: a file; "": the model's own.
    on_bad: "stop" at a sound that cannot be used, or "skip" it and count.
    beams: of what `evaluate` scores and `generate` writes; 1: greedy.
    max_wer: generate leaves out what differs from the transcript by more wrong words a word.
    batch_size: sounds that are decoded at once.
  """

  path: str = ""
  audio: str = "audio"
  text: str = "text"
  heldout: str = ""
  heldout_fraction: float = 0.1
  frames: int = 3_000
  bins: int = 80
  resample: bool = True
  max_tokens: int = 128
  prompt: tuple[str, ...] = ("<|startoftranscript|>", "<|notimestamps|>")
  end: str = "<|endoftext|>"
  tokenizer: str = ""
  on_bad: str = "stop"
  beams: int = 1
  max_wer: float = 0.1
  batch_size: int = 8

  def __post_init__(self):
    check_on_bad("speech", self.on_bad)
    numbers = (self.frames, self.bins, self.max_tokens, self.beams, self.batch_size)
    if min(numbers) < 1 or not self.prompt:
      raise InputError(
        f"speech has frames {self.frames}, bins {self.bins}, max_tokens {self.max_tokens}, beams "
        f"{self.beams}, batch_size {self.batch_size} and prompt {self.prompt}; each is at least 1"
      )

  def open(self, split: str, pretrained: Any) -> Source:
    tokenizer = _texts.tokenizer_of("speech", self.tokenizer, pretrained)
    path = self.heldout if split == "heldout" and self.heldout else self.path
    fraction = 0.0 if self.heldout else self.heldout_fraction
    of = sources.Source("jsonl", path, split, self.text, fraction)
    left_out, found = LeftOut("speech", self.on_bad), []
    for audio, text, where in self._lines(of, left_out):
      if not _seq2seq_targets.is_text(text):
        left_out(where, "has no text, or none in UTF-8")
      elif not isinstance(audio, str) or not Path(audio).is_file():
        left_out(where, f"names no file in its field {self.audio!r}")
      elif sources.chosen(text, of):
        found.append((Path(audio), text))
    with ThreadPoolExecutor(8) as pool:
      said = list(pool.map(lambda pair: self._useless(pair[0]), found))
    for (file, _), (why, _) in zip(found, said, strict=True):
      if why:
        left_out(str(file), why)
    used = [(*pair, digest) for pair, (why, digest) in zip(found, said, strict=True) if not why]
    return Source(self, used, tokenizer, left_out)

  def _lines(self, of: sources.Source, left_out: LeftOut) -> Iterator[tuple[Any, Any, str]]:
    """(the wav file, its text, where that stands) of every sound."""
    path = Path(of.path)
    if path.is_dir():
      for file in sorted(path.glob("*.wav")):
        yield str(file), _text(file.with_suffix(".txt")), str(file)
      return
    for line, where in _seq2seq_targets.objects(of, left_out):
      audio = line.get(self.audio)
      at = str(path.parent / audio) if isinstance(audio, str) else audio
      yield at, line.get(self.text), where

  def _useless(self, audio: Path) -> tuple[str, str]:
    """(why a sound cannot be used, "" if it can; its sha256)."""
    try:
      x, rate = mel.read_wav(audio)
    except InputError:
      return "is damaged, empty or no wav file of whole numbers", ""
    if rate != mel.RATE and not self.resample:
      return f"has {rate} samples a second, and resample is False", ""
    if len(x) > self.frames * mel.HOP * rate / mel.RATE:
      return f"is longer than {self.frames} frames", ""
    return "", hashlib.sha256(audio.read_bytes()).hexdigest()

  def inputs(self, stack: Callable[[str], np.ndarray]) -> SourceTarget:
    mel_BSM: Any = stack("mel_SM")
    return SourceTarget(Sounds(mel_BSM), _seq2seq_targets.target(stack))

  def check(self, config: Any) -> None:
    if not hasattr(config, "num_mel_bins"):
      raise InputError(
        "speech wants a model of sounds, such as whisper, and this is a "
        f"{type(config).__module__.rpartition('.')[2]}"
      )
    want = config.num_mel_bins, 2 * config.max_source_positions
    if (self.bins, self.frames) != want:
      raise InputError(
        f"speech has {self.bins} bins and {self.frames} frames and the model reads {want[0]} and "
        f"{want[1]}; set them alike"
      )
    if (n := self.positions) > config.max_target_positions:
      raise InputError(
        f"speech says up to {n} tokens, its prompt among them, and the model at most "
        f"{config.max_target_positions}; lower max_tokens"
      )
    if self.tokenizer:
      start = _seq2seq_targets.token_id("speech", load_tokenizer(self.tokenizer), self.prompt[0])
      _seq2seq_targets.check_start("speech", start, config)

  @property
  def positions(self) -> int:
    return len(self.prompt) - 1 + self.max_tokens

  def hub(self, config: Any) -> dict[str, dict[str, Any]]:
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

  def search(self, config: Any, source: Source, generation: dict[str, Any]) -> Search:
    """How a model of this config writes down what it hears."""
    never = lambda name: tuple(generation.get(name) or ())  # another program's file
    return Search(
      tuple(source.prompt),
      source.eos,
      config.pad_token_id,
      self.max_tokens,
      self.beams,
      suppress=never("suppress_tokens"),
      suppress_first=never("begin_suppress_tokens"),
    )

  def scores(self, said: Sequence[str], source: Source) -> dict[str, float]:
    """Of what was said of the first examples of a source, in their order."""
    return _scores.word_error_rate(said, source.texts[: len(said)])

  def labelled(self, said: Sequence[str], source: Source) -> tuple[list[dict[str, Any]], int]:
    """(lines of a file that this task reads, with what was said as the text; how many differ too
    much from the transcript: Distil-Whisper's filter)."""
    if lost := _scores.missing("jiwer", "transformers"):
      raise InputError(f"max_wer needs {' and '.join(lost)}; pip install {' '.join(lost)}")
    errors = _scores.word_errors(said, source.texts)
    lines = [
      {self.audio: str(audio.absolute()), self.text: new, "reference": old, "wrong": wrong}
      for new, old, audio, (wrong, words) in zip(
        said, source.texts, source.files, errors, strict=True
      )
      if new.strip() and wrong <= self.max_wer * words
    ]
    return lines, len(said) - len(lines)


def _text(file: Path) -> str | None:
  """What a file says; None where it is not there, or not in UTF-8."""
  try:
    return file.read_bytes().decode() if file.is_file() else None
  except UnicodeDecodeError:
    return None


class Source:
  """Sounds in the order of the file; see distill_jax/tasks. They are read when asked for.

  Attributes:
    files, texts: of each.
    tokenizer, prompt, eos: the prompt as ids.
  """

  def __init__(
    self, task: Task, used: list[tuple[Path, str, str]], tokenizer: Tokenizer, left_out: LeftOut
  ):
    self._task, self.tokenizer = task, tokenizer
    self.classes, self.positions = tokenizer.vocab_size, task.positions
    self.prompt = [_seq2seq_targets.token_id("speech", tokenizer, t) for t in task.prompt]
    self.eos = _seq2seq_targets.token_id("speech", tokenizer, task.end)
    self.files, self.texts, self._ids, digests = [], [], [], []
    # A text begins with a space, as Whisper was trained.
    encoded = tokenizer.encode_batch([" " + text.strip() for _, text, _ in used])
    for (audio, text, digest), ids in zip(used, encoded, strict=True):
      if len(ids) + 1 > task.max_tokens:
        left_out(str(audio), f"has a text of more than {task.max_tokens} tokens")
        continue
      self.files.append(audio)
      self.texts.append(text)
      self._ids.append(ids)
      digests.append(digest)
    left_out.report(len(self.files))
    said = hashlib.sha256(json.dumps([self._ids, self.prompt, self.eos, digests]).encode())
    said.update(tokenizer.digest.encode())
    self.digest = said.hexdigest()

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    x, rate = mel.read_wav(self.files[i])
    frames = mel.log_mel(mel.resampled(x, rate), self._task.frames, self._task.bins)
    target = _seq2seq_targets.fields(self.prompt, self._ids[i], self.eos, self.positions)
    return {"mel_SM": frames, **target}
