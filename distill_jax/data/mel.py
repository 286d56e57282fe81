"""Whisper's audio features: log-mel frames of wav files at 16 kHz (arXiv:2212.04356)."""

from __future__ import annotations

import functools
import io
import wave
from math import gcd
from pathlib import Path

import numpy as np

from distill_jax.errors import InputError

RATE = 16_000  # samples per second
WINDOW, HOP = 400, 160  # length of a frame and distance between frames, in samples
FLOOR, RANGE = 1e-10, 8.0  # minimum energy, and maximum range below the peak in units of log10
EXTENSIBLE = b"\xfe\xff"  # a format that is named by 16 bytes at the end of the header
INTEGERS = bytes.fromhex("0100000000001000800000aa00389b71")  # the name of integer samples


def read_wav(path: Path) -> tuple[np.ndarray, int]:
  """Reads a wav file with integer samples.

  Returns:
    The mean of all channels, float32 [samples] in [-1, 1]; and the number of samples per second.

  Raises:
    InputError: If the file is not a wav file with integer samples, is truncated, or is empty.
  """
  try:
    with wave.open(io.BytesIO(_plain(path.read_bytes())), "rb") as f:
      width, channels, rate = f.getsampwidth(), f.getnchannels(), f.getframerate()
      n_samples = f.getnframes()
      raw = f.readframes(n_samples)
  except (OSError, EOFError, wave.Error) as e:
    reason = str(e) or "it ends early"
    raise InputError(f"{path} is not a wav file with integer samples ({reason}).") from e
  if not n_samples:
    raise InputError(f"{path} has no samples.")
  if len(raw) < n_samples * width * channels:
    n = len(raw) // (width * channels)
    raise InputError(f"{path} is truncated: it has {n} of the {n_samples} samples in its header.")
  if width == 3:  # pad to four bytes per sample
    wide = np.zeros((len(raw) // 3, 4), np.uint8)
    wide[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
    x = wide.view("<i4")[:, 0]
  else:
    x = np.frombuffer(raw, {1: "u1", 2: "<i2", 4: "<i4"}[width])
  if width == 1:  # 8-bit samples are unsigned
    x = (x.astype(np.float32) - 128) / 128
  else:
    x = x / np.float32(2.0 ** (x.itemsize * 8 - 1))
  return x.reshape(-1, channels).mean(1, dtype=np.float32), rate


def _plain(raw: bytes) -> bytes:
  """Returns a wav file with the plain header of integer samples if it has the extensible one.

  Python 3.11 does not read WAVE_FORMAT_EXTENSIBLE.
  """
  at = 12  # the first chunk: a name, the size of its content, and the content
  while (name := raw[at : at + 4]) and name != b"fmt ":
    size = int.from_bytes(raw[at + 4 : at + 8], "little")
    at += 8 + size + size % 2
  if raw[at + 8 : at + 10] == EXTENSIBLE and raw[at + 32 : at + 48] == INTEGERS:
    return raw[: at + 8] + b"\x01\x00" + raw[at + 10 :]
  return raw


def resampled(x: np.ndarray, rate: int) -> np.ndarray:
  """Resamples a sound to RATE with a polyphase filter.

  Args:
    x: float32 [samples].
    rate: The number of samples per second.

  Returns:
    float32 [samples * RATE / rate].
  """
  if rate == RATE:
    return x
  from scipy.signal import resample_poly

  n = gcd(rate, RATE)
  return resample_poly(x, RATE // n, rate // n).astype(np.float32)


def log_mel(x: np.ndarray, frames: int, bins: int) -> np.ndarray:
  """Computes log-mel features, equal to those of transformers' WhisperFeatureExtractor.

  Shorter sounds are padded with silence, and longer ones are cut.

  Args:
    x: float32 [samples] at RATE.
    frames: The number of frames.
    bins: The number of mel bins.

  Returns:
    float32 [frames, bins].
  """
  n = frames * HOP
  x = np.pad(x[:n], (0, max(0, n - len(x)))).astype(np.float32)
  x = np.pad(x, WINDOW // 2, mode="reflect")
  rows = np.lib.stride_tricks.sliding_window_view(x, WINDOW)[::HOP][:frames]
  hann = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)).astype(np.float32)
  energy = np.abs(np.fft.rfft(rows * hann)).astype(np.float32) ** 2
  y = np.log10(np.maximum(energy @ filters(bins), FLOOR))
  return ((np.maximum(y, y.max() - RANGE) + 4) / 4).astype(np.float32)


@functools.lru_cache
def filters(bins: int) -> np.ndarray:
  """Returns the mel filter bank: triangles of equal area at equal steps of Slaney's mel scale.

  Returns:
    float32 [WINDOW // 2 + 1, bins], from the frequencies of the FFT to mel bins.
  """
  edges = _hertz(np.linspace(0, _mel(RATE / 2), bins + 2))
  of_fft = np.linspace(0, RATE / 2, WINDOW // 2 + 1)
  slopes = edges[None] - of_fft[:, None]
  up, down = -slopes[:, :-2] / np.diff(edges)[:-1], slopes[:, 2:] / np.diff(edges)[1:]
  area = 2 / (edges[2:] - edges[:-2])
  return (np.maximum(0, np.minimum(up, down)) * area).astype(np.float32)


def _mel(hertz: float) -> float:
  """Converts Hz to mels: linear up to 1,000 Hz (15 mels), then 27 mels per factor of 6.4."""
  return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * np.log(hertz / 1000) / np.log(6.4)


def _hertz(mel: np.ndarray) -> np.ndarray:
  return np.where(mel < 15, 200 * mel / 3, 1000 * 6.4 ** ((mel - 15) / 27))
