"""Small wav files."""

import wave

import numpy as np

from distill_jax.data import mel


def sound(seconds: float, rate: int = mel.RATE) -> np.ndarray:
  """A sweep with noise and a silence in it."""
  t = np.arange(int(seconds * rate)) / rate
  noise = np.random.default_rng(0).standard_normal(len(t))
  x = 0.4 * np.sin(2 * np.pi * (200 + 900 * t) * t) + 0.05 * noise
  return np.where((t > 0.5) & (t < 0.7), 0, x).astype(np.float32)


def write_wav(path, x: np.ndarray, rate: int, width: int = 2, channels: int = 1):
  with wave.open(str(path), "wb") as f:
    f.setnchannels(channels)
    f.setsampwidth(width)
    f.setframerate(rate)
    whole = np.round(x * (2.0 ** (8 * width - 1) - 1)).astype("<i8")
    if width == 1:
      whole += 128
    f.writeframes(whole[:, None].view(np.uint8)[:, :width].tobytes())
  return path
